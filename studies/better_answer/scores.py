"""The pieces of work, each of which leaves a file of scores: one for every candidate.

    learnt on AlpacaEval     fits/<pool>/<arm>-<seed>     each prompt by what the others taught
    taken to LLMBar          transfer/<arm>-<seed>        by what all of AlpacaEval taught
    learnt on LLMBar         within/<arm>-<seed>          each pair by what the others taught
    learnt on other sets     others/<arm>-<seed>          each set by what the other sets taught

Shapes: `candidates` of all groups.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moefold.evaluate.files import whole_file
from moefold.preference import Groups
from moefold.surgery.encoder import MINILM_SHA256, pretrained_encoder
from studies.better_answer.data import Answers, read_alpaca, read_llmbar
from studies.better_answer.features import Vectors, with_features
from studies.better_answer.learning import held_out_scores, learnt
from studies.better_answer.settings import ARMS, POOLS, Settings
from studies.better_answer.vectors import vectors
from studies.jobs import Job

TRANSFER, WITHIN, OTHERS = "transfer", "within", "others"
Choices = list[tuple[float, float]]
"""A learning rate and a weight decay for each training part."""

WAYS = (TRANSFER, WITHIN, OTHERS)
"""How something is learnt that judges LLMBar."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Data:
    """Texts of both sources and a vector for each."""

    alpaca: Answers
    llmbar: Answers
    vectors: Vectors


@lru_cache(maxsize=1)
def opened(source: Path, output: Path, settings: Settings) -> Data:
    """The data of a study; texts that have no vector yet are encoded."""
    alpaca = read_alpaca(source, settings.prompts)
    llmbar = read_llmbar(source, settings.pairs)
    texts = texts_of(alpaca, llmbar)
    made = vectors(texts, output / "vectors", encoder_name(), pretrained_encoder)
    return Data(alpaca=alpaca, llmbar=llmbar, vectors=made)


def texts_of(alpaca: Answers, llmbar: Answers) -> list[str]:
    """Every text of both, once."""
    return list(dict.fromkeys(alpaca.texts + llmbar.texts))


def encoder_name() -> str:
    """The encoder, by the hash of its weights."""
    return f"all-MiniLM-L6-v2 {MINILM_SHA256}"


def place(output: Path, way: str, arm: str, seed: int) -> Path:
    """The file of scores.

    Args:
        output: of the study.
        way: one of `POOLS`, which AlpacaEval is learnt from, or of `WAYS`.
        arm: of `ARMS`.
        seed: one of the settings.
    """
    name = arm.replace(", ", "_").replace(" ", "-")
    return output / "scores" / way.replace(" ", "-") / f"{name}-{seed}.safetensors"


def jobs(settings: Settings, source: Path, output: Path) -> list[Job]:
    """All work that is to be done once vectors are there, seed after seed."""
    ways = settings.learnt_from() | {
        TRANSFER: settings.transferred,
        WITHIN: settings.within,
        OTHERS: settings.within,
    }
    return [
        Job(
            name=f"{way}, {arm}, seed {seed}",
            leaves=place(output, way, arm, seed),
            call=score_one,
            given=(settings, source, output, way, arm, seed),
        )
        for seed in settings.seeds
        for way, arms in ways.items()
        for arm in arms
    ]


def score_one(
    settings: Settings, source: Path, output: Path, way: str, arm: str, seed: int
) -> None:
    """Learns one arm in one way and leaves the scores of what it has not seen."""
    data, how = opened(source, output, settings), ARMS[arm]
    if way in POOLS:
        groups = with_features(data.alpaca.groups, data.vectors, how)
        scores, chosen = held_out_scores(how, groups, settings, seed, data.alpaca.by(way))
    else:
        groups = with_features(data.llmbar.groups, data.vectors, how)
        if way == WITHIN:
            scores, chosen = held_out_scores(how, groups, settings, seed)
        elif way == OTHERS:
            scores, chosen = by_other_sets(arm, groups, settings, seed)
        else:
            scores, chosen = transferred(arm, data, groups, settings, seed)
    write_scores(place(output, way, arm, seed), scores, chosen)


def transferred(
    arm: str, data: Data, groups: Groups, settings: Settings, seed: int
) -> tuple[Float[Tensor, " candidates"], Choices]:
    """Scores of LLMBar by what AlpacaEval taught, prompts left out that are in both."""
    taught = data.alpaca.groups.with_candidates(data.alpaca.by("15 writers"))
    taught = taught.take(apart(taught, groups))
    found = learnt(ARMS[arm], with_features(taught, data.vectors, ARMS[arm]), settings, seed)
    return found.model.values(groups), [found.how]


def by_other_sets(
    arm: str, groups: Groups, settings: Settings, seed: int
) -> tuple[Float[Tensor, " candidates"], Choices]:
    """Scores of each set of LLMBar by what the others taught."""
    assert groups.category is not None
    scores, chosen = torch.full((len(groups.candidates),), torch.nan), []
    for name in sorted(set(groups.category)):
        held = torch.tensor([one == name for one in groups.category])
        taught = groups.take(apart(groups, groups.take(held)))
        found = learnt(ARMS[arm], taught, settings, seed)
        scores[held[groups.group_of_candidate]] = found.model.values(groups.take(held))
        chosen.append(found.how)
    return scores, chosen


def apart(groups: Groups, judged: Groups) -> Tensor:
    """Which of the groups have a prompt that none of the judged ones has."""
    assert groups.split is not None
    assert judged.split is not None
    known = set(judged.split)
    return torch.tensor([one not in known for one in groups.split])


def write_scores(path: Path, scores: Float[Tensor, " candidates"], chosen: Choices) -> None:
    """Writes scores, and the learning rates and decays that were chosen.

    Raises:
        ValueError: a candidate has no score.
    """
    if not bool(scores.isfinite().all()):
        raise ValueError(
            f"{int((~scores.isfinite()).sum())} of {len(scores)} candidates have no finite score "
            f"for {path.stem}; lower the learning rates"
        )
    with whole_file(path) as beside:
        save_file({"scores": scores}, beside, metadata={"chosen": json.dumps(chosen)})


def read_scores(path: Path) -> tuple[Float[Tensor, " candidates"], Choices]:
    """Reads what `write_scores` wrote."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("scores"), [
            (rate, decay) for rate, decay in json.loads(file.metadata()["chosen"])
        ]
