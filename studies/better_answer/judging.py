"""How good choices are: by prompt, so that prompts can be drawn again for intervals.

Values of several seeds form a table; where a prompt has no value (no pair of similar length, say)
it is NaN for every seed, and left out.

Shapes: `seeds groups` of such tables; `candidates` of all groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moefold.evaluate.intervals import crossed_bootstrap
from moefold.preference import Groups, agreement
from moefold.preference.pairs import pairs_of
from moefold.preference.ragged import total
from studies.better_answer.data import Answers
from studies.better_answer.features import Vectors, characters_of, likeness
from studies.better_answer.learning import chosen_worth, parts
from studies.better_answer.settings import Settings

METRICS = ("agreement", "worth", "pairs", "similar", "longest")
"""Of a choice: is it the judge's best; what score has it; of pairs with a clear difference, are
they ordered as by the judge, and those of similar length; is the longest chosen."""

Table = Float[np.ndarray, "seeds groups"]


def measured(
    values: Float[Tensor, " candidates"], groups: Groups, settings: Settings
) -> dict[str, Float[np.ndarray, " groups"]]:
    """All `METRICS` of each group.

    Args:
        values: what the choice goes by.
        groups: of texts, with utilities.
        settings: what is a clear difference and what a similar length.
    """
    length = characters_of(groups)
    by_length = replace(groups, utilities=length)
    found = {
        "agreement": agreement(values, groups),
        "worth": chosen_worth(values, groups),
        "pairs": pair_accuracy(values, groups, settings.clear),
        "similar": pair_accuracy(values, groups, settings.clear, length, settings.similar),
        "longest": agreement(values, by_length),
    }
    return {name: one.double().numpy() for name, one in found.items()}


def pair_accuracy(
    values: Float[Tensor, " candidates"],
    groups: Groups,
    clear: float,
    length: Float[Tensor, " candidates"] | None = None,
    similar: float = float("inf"),
) -> Float[Tensor, " groups"]:
    """The share of each group's pairs that are ordered as by utility, ties half; NaN without pairs.

    Args:
        values: what is judged.
        groups: with utilities.
        clear: only pairs whose utilities differ by at least that.
        length: of each candidate.
        similar: only pairs of which the longer is at most so many times the shorter.
    """
    assert groups.utilities is not None
    pairs = pairs_of(groups)
    kept = groups.utilities[pairs.winner] - groups.utilities[pairs.loser] >= clear
    if length is not None:
        a, b = length[pairs.winner], length[pairs.loser]
        kept &= torch.maximum(a, b) <= similar * torch.minimum(a, b)
    won = (values[pairs.winner] - values[pairs.loser]).sign().double() / 2 + 0.5
    own = pairs.group[kept]
    count = total(torch.ones_like(own, dtype=torch.double), own, len(groups))
    return total(won[kept], own, len(groups)) / count


def baselines(
    data: Answers, vectors: Vectors, settings: Settings, pool: Bool[Tensor, " candidates"]
) -> dict[str, list[Float[Tensor, " candidates"]]]:
    """What can be chosen by without learning from texts, for each seed (or once, if all agree).

    Args:
        data: of AlpacaEval.
        vectors: of every text.
        settings: of the study.
        pool: which candidates can be chosen; the first is the first of these.
    """
    groups = data.groups
    order = torch.arange(len(groups.candidates), dtype=torch.double)
    found = plain_baselines(groups, vectors)
    found["first"] = [-order]
    found["by writer"] = [by_writer(data, settings, seed, pool) for seed in settings.seeds]
    return found


def plain_baselines(groups: Groups, vectors: Vectors) -> dict[str, list[Tensor]]:
    """What needs only the texts: nothing, their length, their likeness to the prompt."""
    length = characters_of(groups)
    return {
        "chance": [torch.zeros_like(length)],
        "longest": [length],
        "most alike the prompt": [likeness(groups, vectors)],
    }


def by_writer(
    data: Answers, settings: Settings, seed: int, pool: Bool[Tensor, " candidates"]
) -> Float[Tensor, " candidates"]:
    """The mean score of each answer's writer on the prompts of other parts: no text is read."""
    groups = data.groups
    assert groups.utilities is not None
    names = sorted(set(data.writers))
    own = torch.tensor([names.index(writer) for writer in data.writers])
    part = parts(groups, settings.folds, seed)[groups.group_of_candidate]
    found = torch.full((len(own),), torch.nan, dtype=torch.double)
    for number in range(settings.folds):
        known = (part != number) & pool
        sums = total(groups.utilities[known].double(), own[known], len(names))
        count = total(torch.ones(int(known.sum()), dtype=torch.double), own[known], len(names))
        held = part == number
        found[held] = (sums / count.clamp(min=1))[own[held]]
    return found


def interval(table: Table) -> dict[str, Any]:
    """Mean and interval over seeds and groups, and the mean of each seed.

    Args:
        table: NaN in whole columns only.

    Returns:
        `mean`, `low`, `high`, `level`, `seeds`, and `groups`, of which there is something to say.
    """
    known = table[:, ~np.isnan(table).any(0)]
    if not known.shape[1]:
        return {"mean": None, "low": None, "high": None, "seeds": [], "groups": 0}
    return {
        **asdict(crossed_bootstrap(known)),
        "seeds": known.mean(1).tolist(),
        "groups": known.shape[1],
    }


def tables_of(
    values: Sequence[Float[Tensor, " candidates"]],
    kept: Bool[Tensor, " candidates"],
    groups: Groups,
    settings: Settings,
) -> dict[str, Table]:
    """All `METRICS` as tables, of choices among the kept candidates.

    Args:
        values: for each seed.
        kept: what can be chosen.
        groups: of texts, with utilities.
        settings: of the study.
    """
    choice = groups.with_candidates(kept)
    found = [measured(one[kept], choice, settings) for one in values]
    return {name: np.stack([one[name] for one in found]) for name in METRICS}


def summary(tables: Mapping[str, Table]) -> dict[str, Any]:
    """The interval of each metric."""
    return {name: interval(table) for name, table in tables.items()}
