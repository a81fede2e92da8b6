"""Judging a model under a rule: what it loses on held-out books, what it computes, what it sees.

    losses      nats for each predicted token, by book
    experts     for each token and layer, on average
    flops       for each token of a forward pass, counted
    leakage     does a later token, another sequence or padding change a token? does decoding?

Shapes: sequences `chunks length`.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt16
from transformers import OlmoeForCausalLM

import moefold
from moefold.evaluate.language import Pieces, passed
from studies.language_model.data import Data, spread
from studies.language_model.model import FASTEST

BATCH = 16
LEAKED, LENGTH = 4, 48
"""Sequences that are looked at for leaks, and how much of them: some rules are decoded token by
token by running every prefix."""


def judge(model: OlmoeForCausalLM, data: Data) -> dict[str, Any]:
    """Everything about a model under the rule that it has now.

    Args:
        model: one that was rerouted; in evaluation mode. It comes back as it was.
        data: of the study.
    """
    found = passed(model, pieces(data), batch_size=BATCH)
    assert found.losses is not None
    some = np.concatenate([spread(chunks, 1) for chunks in data.heldout.values()])
    return {
        "losses": dict(zip(data.heldout, (found.losses / found.predicted).tolist(), strict=True)),
        "experts_per_token": found.experts_per_token,
        "flops_per_token": found.flops_per_token,
        "leakage": leaks(model, spread(some, LEAKED)[:, :LENGTH]),
    }


def pieces(data: Data) -> Pieces:
    """The held-out sequences, each with the number of its book."""
    books = list(enumerate(data.heldout.values()))
    return Pieces(
        ids=tuple(tuple(row) for _, chunks in books for row in chunks.tolist()),
        document=tuple(number for number, chunks in books for _ in chunks),
    )


def leaks(model: OlmoeForCausalLM, chunks: UInt16[np.ndarray, "chunks length"]) -> dict[str, Any]:
    """What leaks, measured in float64, where rounding moves no choice.

    Experts are computed one after the other meanwhile: `grouped_mm` knows no float64.
    """
    ids = torch.from_numpy(chunks.astype("int64"))
    model.set_experts_implementation("eager")
    try:
        found = moefold.leakage(model.double(), {"input_ids": ids})
    finally:
        model.float().set_experts_implementation(FASTEST)
    return {**asdict(found), "clean": found.clean}
