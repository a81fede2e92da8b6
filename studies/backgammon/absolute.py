"""What comparisons are compared with: each position learnt by itself.

    equity           (s - u)^2
    was-it-chosen    cross entropy of sigmoid(s) with "it was the chosen one"

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
from moefold.preference.ragged import total


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


def _mean_of_means(values: Tensor, groups: Groups) -> Tensor:
    return (total(values, groups.group_of_candidate, len(groups)) / groups.lengths).mean()


REGISTERED: tuple[Callable[..., torch.Tensor], ...] = (equity, was_it_chosen)
