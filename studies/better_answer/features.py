"""What a scorer is given of each answer, from vectors of texts and from their lengths.

Shapes: `candidates features` of answers, `groups dim` of prompts.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from moefold.preference import Groups
from moefold.preference.text import together
from studies.better_answer.settings import Arm

Vectors = Mapping[str, Float[Tensor, " dim"]]


def with_features(groups: Groups, vectors: Vectors, arm: Arm) -> Groups:
    """The same groups with numbers in the place of texts.

    Args:
        groups: of texts.
        vectors: of every text.
        arm: says which numbers.
    """
    answers, prompts = texts_of(groups)
    context = torch.stack([vectors[text] for text in prompts]) if arm.prompt_apart else None
    if arm.features == "length":
        return replace(groups, candidates=lengths_of(answers), context=context)
    rows = torch.stack([vectors[text] for text in answers])
    if arm.features != "answer":
        own = torch.stack([vectors[text] for text in prompts])
        rows = together(rows, own[groups.group_of_candidate])
    if arm.features == "answer, prompt and length":
        rows = torch.cat([rows, lengths_of(answers)], 1)
    return replace(groups, candidates=rows, context=context)


def lengths_of(answers: list[str]) -> Float[Tensor, "candidates 3"]:
    """Logarithms of the characters, words and lines of each answer, one more than there are."""
    counts = [(len(text), len(text.split()), text.count("\n")) for text in answers]
    return torch.tensor([[math.log1p(n) for n in one] for one in counts])


def characters_of(groups: Groups) -> Float[Tensor, " candidates"]:
    """Characters of each answer."""
    return torch.tensor([float(len(text)) for text in texts_of(groups)[0]])


def likeness(groups: Groups, vectors: Vectors) -> Float[Tensor, " candidates"]:
    """The cosine of each answer's vector and its prompt's."""
    answers, prompts = texts_of(groups)
    rows = torch.stack([vectors[text] for text in answers])
    own = torch.stack([vectors[text] for text in prompts])[groups.group_of_candidate]
    return torch.nn.functional.cosine_similarity(rows, own)


def texts_of(groups: Groups) -> tuple[list[str], list[str]]:
    """Answers and prompts."""
    assert isinstance(groups.candidates, list)
    assert isinstance(groups.context, list)
    return groups.candidates, groups.context
