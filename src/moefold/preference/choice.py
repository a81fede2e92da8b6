"""Choosing with a comparator: the best of a group, a ranking, a tournament.

A consistent comparator needs one evaluation for each candidate. One that may go in circles has to
compare candidates with each other: all with all, or the winner so far with the next one, whose
result depends on the order where there are circles; a tournament says so in its report.

Shapes: `groups`, `candidates`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefold.preference.comparators import (
    AbstractComparator,
    ConsistentComparator,
    group_scores,
    log_odds,
)
from moefold.preference.groups import Groups
from moefold.preference.pairs import Pairs, every_two
from moefold.preference.ragged import fault_list, highest, select, total

METHODS = ("copeland", "borda", "king-of-the-hill")


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tournament:
    """How the candidates of each group did against each other.

    Attributes:
        best: the winner of each group, counted inside it; the first of equals.
        points: of each candidate: pairs won (a draw is half), or for Borda the sum of its
            probabilities; for king-of-the-hill 1 for the last king.
        comparisons: how many pairs met, in both orders if the comparator is not antisymmetric.
        cyclic_triples: share of triples of a group's candidates that go in a circle, over all
            groups; NaN where not all pairs were compared.
        beaten_winners: share of groups whose winner loses to some other candidate.
    """

    best: Int[Tensor, " groups"]
    points: Float[Tensor, " candidates"]
    comparisons: int
    cyclic_triples: float
    beaten_winners: float


@torch.no_grad()
def best_of(comparator: AbstractComparator, groups: Groups) -> Int[Tensor, " groups"]:
    """The best candidate of each group, counted inside it; the first of equals.

    By scores if the comparator is consistent, else by a Copeland tournament.

    Raises:
        ValueError: scores or log-odds are NaN; names the groups.
    """
    if isinstance(comparator, ConsistentComparator):
        return first_best(group_scores(comparator, groups), groups)
    return tournament(comparator, groups).best


@torch.no_grad()
def ranking(comparator: AbstractComparator, groups: Groups) -> Int[Tensor, " candidates"]:
    """The place of every candidate in its group, 0 for the best, the first of equals before.

    Raises:
        ValueError: scores or log-odds are NaN; names the groups.
    """
    if isinstance(comparator, ConsistentComparator):
        values = group_scores(comparator, groups)
        _refuse_nan(values, groups.group_of_candidate, groups, "scores")
    else:
        values = tournament(comparator, groups).points
    by_value = values.argsort(descending=True, stable=True)
    group = groups.group_of_candidate
    order = by_value[group[by_value].argsort(stable=True)]
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places - groups.starts[group]


@torch.no_grad()
def tournament(
    comparator: AbstractComparator, groups: Groups, *, method: str = "copeland"
) -> Tournament:
    """Lets the candidates of each group meet.

    Args:
        comparator: any; for one that is not antisymmetric a pair's log-odds are the mean of both
            orders.
        groups: of two candidates or more.
        method: "copeland" counts pairs won, "borda" adds probabilities, both after all have met
            all; "king-of-the-hill" lets each challenge the winner so far, in order: n - 1
            comparisons instead of n (n - 1) / 2.

    Raises:
        ValueError: no such method, or log-odds are NaN; names the groups.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if method == "king-of-the-hill":
        return _king_of_the_hill(comparator, groups)
    one, other = every_two(groups)
    half = one < other
    one, other = one[half], other[half]
    z = _meeting(comparator, groups)(one, other)
    won = z.sigmoid() if method == "borda" else ((z > 0).to(z) + (z >= 0).to(z)) / 2
    count = len(groups.candidates)
    points = total(torch.cat([won, 1 - won]), torch.cat([one, other]), count)
    best = first_best(points, groups)
    king = groups.starts + best
    group = groups.group_of_candidate[one]
    beaten = ((one == king[group]) & (z < 0)) | ((other == king[group]) & (z > 0))
    return Tournament(
        best=best,
        points=points,
        comparisons=len(z) * (1 if comparator.antisymmetric else 2),
        cyclic_triples=_cyclic_share(z, one, other, groups),
        beaten_winners=float((total(beaten.to(z), group, len(groups)) > 0).double().mean()),
    )


def first_best(values: Float[Tensor, " candidates"], groups: Groups) -> Int[Tensor, " groups"]:
    """The largest value of each group, counted inside it, the first of equals.

    Raises:
        ValueError: values are NaN, of which none is the largest; names the groups.
    """
    group = groups.group_of_candidate
    _refuse_nan(values, group, groups, "scores")
    top = highest(values, group, len(groups))
    number = torch.arange(len(values), device=values.device)
    number = number.where(values == top[group], len(values))
    first = groups.starts.new_full((len(groups),), len(values))
    return first.scatter_reduce(0, group, number, "amin") - groups.starts


def _meeting(
    comparator: AbstractComparator, groups: Groups
) -> Callable[[Tensor, Tensor], Float[Tensor, " pairs"]]:
    """What gives the log-odds of numbered candidates against others, in both orders."""
    if isinstance(comparator, ConsistentComparator):
        # Each is scored once: in another batch its last digit may differ, and of candidates that
        # are equal another one would win.
        scores = group_scores(comparator, groups)
        _refuse_nan(scores, groups.group_of_candidate, groups, "scores")
        return lambda one, other: scores[one] - scores[other]

    def met(one: Tensor, other: Tensor) -> Tensor:
        a, b = select(groups.candidates, one), select(groups.candidates, other)
        context = groups.context_rows(one)
        z = comparator(a, b, context)
        if not comparator.antisymmetric:
            z = (z - comparator(b, a, context)) / 2
        _refuse_nan(z, groups.group_of_candidate[one], groups, "log-odds")
        return z

    return met


def _refuse_nan(values: Tensor, group: Tensor, groups: Groups, what: str) -> None:
    broken = total(values.isnan().float(), group, len(groups)) > 0
    if faults := fault_list(broken, f"group {{}} has {what} that are NaN"):
        raise ValueError(
            f"{'; '.join(faults)}: nothing can be chosen; look for NaN in the candidates "
            f"(Groups.check) and in the weights (a learning rate that is too high)"
        )


def _cyclic_share(z: Tensor, one: Tensor, other: Tensor, groups: Groups) -> float:
    """Of n candidates, all but sum of C(wins, 2) triples are circles (Kendall and Smith 1940)."""
    count = len(groups.candidates)
    wins = total(torch.cat([(z > 0).double(), (z <= 0).double()]), torch.cat([one, other]), count)
    in_order = float((wins * (wins - 1) / 2).sum())
    n = groups.lengths.double()
    triples = float((n * (n - 1) * (n - 2) / 6).sum())
    return (triples - in_order) / triples if triples else 0.0


def _king_of_the_hill(comparator: AbstractComparator, groups: Groups) -> Tournament:
    king, met = groups.starts.clone(), _meeting(comparator, groups)
    compared = 0
    for step in range(1, int(groups.lengths.max()) if len(groups) else 0):
        open_to = (groups.lengths > step).nonzero().squeeze(1)
        challenger = groups.starts[open_to] + step
        z = met(challenger, king[open_to])
        king[open_to] = challenger.where(z > 0, king[open_to])
        compared += len(z) * (1 if comparator.antisymmetric else 2)
    points = torch.zeros(len(groups.candidates), device=king.device)
    points[king] = 1.0
    return Tournament(
        best=king - groups.starts,
        points=points,
        comparisons=compared,
        cyclic_triples=float("nan"),
        beaten_winners=float("nan"),
    )


@torch.no_grad()
def probability(
    comparator: AbstractComparator, groups: Groups, pairs: Pairs, *, temperature: float = 1.0
) -> Float[Tensor, " pairs"]:
    """Probability that the first of each pair is preferred, from log-odds over the temperature.

    Args:
        comparator: any.
        groups: the candidates.
        pairs: which are compared.
        temperature: what calibration found, see `fit_temperature`.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    return (log_odds(comparator, groups, pairs) / temperature).sigmoid()
