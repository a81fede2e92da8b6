"""Pairs of candidates of one group of which one is known to be better.

Of a choice there are n - 1 pairs, chosen over each other candidate, and none among the others,
about which the expert said nothing (Tesauro 1988). Of ranks or utilities there is one for every two
candidates that differ.

Shapes: `pairs`, numbers of candidates in `Groups`.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefold.preference.groups import UNRANKED, Groups
from moefold.preference.ragged import ranges


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pairs:
    """Pairs, the better one first.

    Attributes:
        winner: number of the better candidate.
        loser: number of the other.
        group: number of their group.
        weight: what each counts; with `per_group` those of a group add up to the group's weight.
    """

    winner: Int[Tensor, " pairs"]
    loser: Int[Tensor, " pairs"]
    group: Int[Tensor, " pairs"]
    weight: Float[Tensor, " pairs"]

    def __len__(self) -> int:
        return len(self.winner)


def pairs_of(groups: Groups, *, per_group: bool = True, by_utility: bool = False) -> Pairs:
    """Every pair whose order is known.

    Args:
        groups: with a choice, ranks or utilities; the first of these that there is counts.
        per_group: whether the pairs of a group share its weight; else each pair has all of it, and
            a group of a hundred candidates outweighs ten of ten.
        by_utility: whether pairs count by the difference of their utilities.

    Raises:
        ValueError: nothing is known, or no utilities to weigh by.
    """
    if groups.chosen is not None:
        winner = (groups.starts + groups.chosen).repeat_interleave(groups.lengths)
        loser = torch.arange(len(groups.candidates), device=winner.device)
        known = winner != loser
    else:
        winner, loser = every_two(groups)
        known = _is_better(groups, winner, loser)
    winner, loser = winner[known], loser[known]
    group = groups.group_of_candidate[winner]
    weight = torch.ones(len(winner), dtype=torch.float64, device=winner.device)
    if by_utility:
        if groups.utilities is None:
            raise ValueError("the groups have no utilities to weigh pairs by; give utilities")
        weight = (groups.utilities[winner] - groups.utilities[loser]).abs().to(weight)
    if groups.weights is not None:
        weight = weight * groups.weights[group].to(weight)
    if per_group:
        weight = weight / group.bincount(minlength=len(groups))[group]
    return Pairs(winner=winner, loser=loser, group=group, weight=weight)


def every_two(groups: Groups) -> tuple[Tensor, Tensor]:
    """Every candidate with every candidate of its group, itself included."""
    of_each = groups.lengths.repeat_interleave(groups.lengths)
    first = torch.arange(len(of_each), device=of_each.device).repeat_interleave(of_each)
    return first, ranges(groups.starts.repeat_interleave(groups.lengths), of_each)


def _is_better(groups: Groups, one: Tensor, other: Tensor) -> Tensor:
    if groups.ranks is not None:
        place = groups.ranks.where(groups.ranks != UNRANKED, torch.iinfo(torch.long).max)
        return place[one] < place[other]
    if groups.utilities is not None:
        return groups.utilities[one] > groups.utilities[other]
    raise ValueError(
        "the groups say nothing of which candidates are better; give chosen, ranks or utilities"
    )
