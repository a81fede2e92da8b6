"""What comparisons are compared with: each position learnt by itself, and a soft choice.

    equity           (s - u)^2
    was-it-chosen    cross entropy of sigmoid(s) with "it was the chosen one"
    soft-choice      cross entropy of the softmax of s with the softmax of u / temperature

with s the scores of a decision's plays and u their equities. All are means over plays and then over
decisions, so that a decision with many plays counts like one with few, as in comparisons.

Shapes: `candidates` of all groups.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from moefold.preference import Groups, preference_losses
from moefold.preference.comparators import AbstractComparator, group_scores
from moefold.preference.ragged import log_sum_exp, total


@preference_losses.register("equity", summary="squared error of each score to its utility")
def equity(comparator: AbstractComparator, groups: Groups) -> Float[Tensor, ""]:
    """Regression on the equities of all plays."""
    assert groups.utilities is not None
    error = group_scores(comparator, groups) - groups.utilities
    return _mean_of_means(error.square(), groups)


@preference_losses.register("was-it-chosen", summary="cross entropy of each score with the choice")
def was_it_chosen(comparator: AbstractComparator, groups: Groups) -> Float[Tensor, ""]:
    """Pointwise classification: of each play whether it was the chosen one."""
    scores = group_scores(comparator, groups)
    target = groups.best.to(scores)
    error = functional.binary_cross_entropy_with_logits(scores, target, reduction="none")
    return _mean_of_means(error, groups)


@preference_losses.register("soft-choice", summary="cross entropy with the softmax of utilities")
def soft_choice(
    comparator: AbstractComparator, groups: Groups, *, temperature: float = 0.05
) -> Float[Tensor, ""]:
    """Listwise, where plays that are nearly as good are nearly as right.

    Args:
        comparator: what is trained.
        groups: decisions with equities.
        temperature: points of equity by which a play is e times less likely.
    """
    assert groups.utilities is not None
    group, count = groups.group_of_candidate, len(groups)

    def log_softmax(x: Tensor) -> Tensor:
        return x - log_sum_exp(x, group, count)[group]

    scores = group_scores(comparator, groups)
    target = log_softmax(groups.utilities.to(scores) / temperature).exp()
    return -total(target * log_softmax(scores), group, count).mean()


def _mean_of_means(values: Tensor, groups: Groups) -> Tensor:
    return (total(values, groups.group_of_candidate, len(groups)) / groups.lengths).mean()


REGISTERED: tuple[Callable[..., torch.Tensor], ...] = (equity, was_it_chosen, soft_choice)
