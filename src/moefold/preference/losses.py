"""Losses of comparison training, each a function of a comparator and groups.

With z the log-odds that a pair's better candidate is preferred, s the scores of a group:

    pair-logistic    softplus(margin - z), pairs of a group sharing its weight     the default
    pair-squared     (1 - sigmoid(z))^2                                            as in 1988
    listwise         -log sum over the best of softmax(s)                          choice models
    listnet          cross entropy of softmax(s) with softmax(utility / temperature)
    plackett-luce    -log of the probability of the ranking, place after place
    lambda-rank      softplus(-z) |change of NDCG if the two changed places|

All are means over groups, by their weights (0 if all of these are 0). `centring` adds its
coefficient times the mean of the groups' squared mean scores, which settles the constant that
comparisons leave open.

Source: Tesauro 1988; Burges et al. 2005 (RankNet, which is the first with a consistent comparator);
Luce 1959; Plackett 1975; Cao et al. 2007 (ListNet); Burges 2010 (LambdaRank). Sharing a group's
weight among its pairs keeps a decision among hundreds of candidates from outweighing many small
ones.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from moefold.preference.comparators import (
    AbstractComparator,
    ConsistentComparator,
    KnownScorer,
    group_scores,
    log_odds,
)
from moefold.preference.groups import UNRANKED, Groups
from moefold.preference.pairs import pairs_of
from moefold.preference.ragged import log_sum_exp, total
from moefold.registry import Registry

Loss = Callable[..., Float[Tensor, ""]]

preference_losses: Registry[Loss] = Registry("preference loss")


def preference_loss(
    comparator: AbstractComparator,
    groups: Groups,
    name: str = "pair-logistic",
    *,
    centring: float = 0.0,
    **settings: Any,
) -> Float[Tensor, ""]:
    """The loss of a comparator on groups.

    Args:
        comparator: what is trained.
        groups: with a choice, ranks or utilities, as the loss asks for.
        name: one of `preference_losses.names()`.
        centring: coefficient of the mean squared mean score of a group, for a consistent
            comparator.
        **settings: of the loss: `margin`, `per_group`, `by_utility`.

    Raises:
        ValueError: no such loss or setting; the groups lack what it needs; it needs scores and the
            comparator gives none.
    """
    loss = preference_losses.get(name)
    known = set(inspect.signature(loss).parameters) - {"comparator", "groups"}
    if strangers := sorted(set(settings) - known):
        raise ValueError(
            f"the loss {name!r} has no setting {', '.join(map(repr, strangers))}; it has "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    if not centring:
        return loss(comparator, groups, **settings)
    # One evaluation for both: a second one would differ under dropout, and what rides on a
    # scorer's output (the balance of a mixture) would count twice.
    scores = group_scores(comparator, groups)
    mean = total(scores, groups.group_of_candidate, len(groups)) / groups.lengths
    found = loss(ConsistentComparator(KnownScorer(scores)), groups, **settings)
    return found + centring * _mean(mean.square(), groups)


@preference_losses.register("pair-logistic", summary="softplus of each pair's log-odds")
def pair_logistic(
    comparator: AbstractComparator,
    groups: Groups,
    *,
    per_group: bool = True,
    by_utility: bool = False,
    margin: float = 0.0,
) -> Float[Tensor, ""]:
    """-log of the probability that the better candidate is preferred, over all known pairs."""
    pairs = pairs_of(groups, per_group=per_group, by_utility=by_utility)
    z = log_odds(comparator, groups, pairs)
    return (pairs.weight.to(z) * functional.softplus(margin - z)).sum() / _weight(groups, z)


@preference_losses.register("pair-squared", summary="squared error of the probability, as in 1988")
def pair_squared(
    comparator: AbstractComparator, groups: Groups, *, per_group: bool = True
) -> Float[Tensor, ""]:
    """Squared error of the probability against 1: the historical one.

    Where a pair is badly wrong its gradient vanishes, so that such pairs are hardly learnt.
    """
    pairs = pairs_of(groups, per_group=per_group)
    z = log_odds(comparator, groups, pairs)
    return (pairs.weight.to(z) * (1 - z.sigmoid()).square()).sum() / _weight(groups, z)


@preference_losses.register("listwise", summary="softmax over a group's candidates")
def listwise(comparator: AbstractComparator, groups: Groups) -> Float[Tensor, ""]:
    """-log of the softmax probability of the best of each group; tied best ones share it."""
    scores = group_scores(comparator, groups)
    group, best = groups.group_of_candidate, groups.best
    chosen = log_sum_exp(scores[best], group[best], len(groups))
    return _mean(log_sum_exp(scores, group, len(groups)) - chosen, groups)


@preference_losses.register("listnet", summary="softmax of the scores against that of utilities")
def listnet(
    comparator: AbstractComparator, groups: Groups, *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Cross entropy with a soft choice, in which what is nearly as good is nearly as right.

    Args:
        comparator: what is trained.
        groups: with utilities.
        temperature: difference of utility by which a candidate is e times less right; near 0 it is
            `listwise`.

    Raises:
        ValueError: there are no utilities, or the temperature is not positive.
    """
    if groups.utilities is None:
        raise ValueError("'listnet' needs utilities of all candidates; the groups have none")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    scores = group_scores(comparator, groups)
    group, count = groups.group_of_candidate, len(groups)
    wanted = groups.utilities.to(scores) / temperature
    wanted = (wanted - log_sum_exp(wanted, group, count)[group]).exp()
    given = scores - log_sum_exp(scores, group, count)[group]
    return _mean(-total(wanted * given, group, count), groups)


@preference_losses.register("plackett-luce", summary="probability of the whole ranking")
def plackett_luce(comparator: AbstractComparator, groups: Groups) -> Float[Tensor, ""]:
    """-log of the probability that candidates are taken in the order of their ranks, one by one.

    Each ranked candidate is taken from those that are not better; unranked ones are never taken.
    Tied ones are each taken from all of their place (Breslow's way with ties).
    """
    scores = group_scores(comparator, groups)
    ranks = _ranks_of(groups)
    last = int(ranks.max()) + 1
    place = ranks.where(ranks != UNRANKED, last)
    group = groups.group_of_candidate
    # Worst first inside a group: those that a candidate is taken from stand up to its place's end.
    order = (group * (last + 2) + (last - place)).argsort(stable=True)
    s, g, p = scores[order], group[order], place[order]
    left = _running_log_sum_exp(s, g)
    ends = torch.ones_like(g, dtype=torch.bool)
    ends[:-1] = (g[1:] != g[:-1]) | (p[1:] != p[:-1])
    # Of tied candidates, the last one's sum has all of them.
    number = ends.cumsum(0) - ends.long()
    left = left[ends][number]
    taken = p != last
    return _mean(total((left - s)[taken], g[taken], len(groups)), groups)


@preference_losses.register("lambda-rank", summary="pairs by what changing places does to NDCG")
def lambda_rank(comparator: AbstractComparator, groups: Groups) -> Float[Tensor, ""]:
    """Pairs of different utility, by how much NDCG changes if the two change places.

    Gains are utilities above the group's least, discounts 1 / log2(2 + place) by the present
    scores; no gradient goes through either.
    """
    if groups.utilities is None:
        raise ValueError("the loss 'lambda-rank' needs utilities of all candidates; give utilities")
    scores = group_scores(comparator, groups)
    group, count = groups.group_of_candidate, len(groups)
    utility = groups.utilities.to(scores)
    with torch.no_grad():
        least = -utility.new_full((count,), -torch.inf).scatter_reduce(0, group, -utility, "amax")
        gain = utility - least[group]
        discount = 1 / torch.log2(2 + _places(scores, groups).to(scores))
        ideal = total(gain / torch.log2(2 + _places(utility, groups).to(scores)), group, count)
        known = Groups(
            candidates=groups.candidates, lengths=groups.lengths, utilities=groups.utilities
        )
        pairs = pairs_of(known, per_group=False)
        gains = gain[pairs.winner] - gain[pairs.loser]
        change = (gains * (discount[pairs.winner] - discount[pairs.loser])).abs()
        change = change / ideal[pairs.group]
    z = scores[pairs.winner] - scores[pairs.loser]
    return _mean(total(change * functional.softplus(-z), pairs.group, count), groups)


def _weight(groups: Groups, like: Tensor) -> Tensor:
    """What all groups weigh; 1 if nothing, for the sum over them is 0 then, and stays so."""
    if groups.weights is None:
        return like.new_tensor(float(max(1, len(groups))))
    weight = groups.weights.to(like).sum()
    return weight.where(weight > 0, 1.0)


def _mean(values: Float[Tensor, " groups"], groups: Groups) -> Tensor:
    if groups.weights is not None:
        values = values * groups.weights.to(values)
    return values.sum() / _weight(groups, values)


def _ranks_of(groups: Groups) -> Tensor:
    if groups.ranks is not None:
        return groups.ranks
    if groups.chosen is not None:
        return groups.best.long() - 1  # 0 for the chosen, UNRANKED for the others
    if groups.utilities is not None:
        return _dense_places(groups.utilities, groups)
    raise ValueError(
        "the groups say nothing of which candidates are better; give chosen, ranks or utilities"
    )


def _places(values: Tensor, groups: Groups) -> Tensor:
    """How many of its group stand before each candidate, the largest first, ties by number."""
    order = _sorted(values, groups)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places - groups.starts[groups.group_of_candidate]


def _dense_places(values: Tensor, groups: Groups) -> Tensor:
    """The same with equal places for equal values: 0 0 1."""
    order = _sorted(values, groups)
    v, g = values[order], groups.group_of_candidate[order]
    new = torch.ones_like(g)
    new[1:] = ((v[1:] != v[:-1]) | (g[1:] != g[:-1])).long()
    number = new.cumsum(0)
    first = number[groups.starts]
    places = torch.empty_like(number)
    places[order] = number - first[g]
    return places


def _sorted(values: Tensor, groups: Groups) -> Tensor:
    """Candidates by group, inside it the largest first."""
    by_value = values.argsort(descending=True, stable=True)
    return by_value[groups.group_of_candidate[by_value].argsort(stable=True)]


def _running_log_sum_exp(values: Tensor, group: Tensor) -> Tensor:
    """log of the sum of exp of a group's values up to each, the groups one after the other.

    A recursive doubling: each step adds the sum of as many values before, if of the same group.
    """
    found, step = values, 1
    while step < len(values):
        same = group[step:] == group[:-step]
        if not bool(same.any()):
            break
        before = found[:-step].masked_fill(~same, -torch.inf)
        found = torch.cat([found[:step], torch.logaddexp(found[step:], before)])
        step *= 2
    return found
