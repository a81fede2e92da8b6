"""What comparisons are compared with: each answer learnt by itself, by the same net.

    answer-score       (s - u + c)^2                                    the judge's score
    answer-was-best    cross entropy of sigmoid(s) with "it was the best of its prompt"

with s the score of the net and u the judge's. Nets have no bias at their output; c, the mean of the
training scores, stands for it. Means over answers and then over prompts, as in comparisons.

Shapes: `candidates` of all groups.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from moefold.preference import Groups, PreferenceModel, group_scores
from moefold.preference.ragged import total


class Loss(Protocol):
    """An error for each answer."""

    def __call__(
        self, scores: Float[Tensor, " candidates"], groups: Groups, mean: float
    ) -> Float[Tensor, " candidates"]: ...


def answer_score(
    scores: Float[Tensor, " candidates"], groups: Groups, mean: float
) -> Float[Tensor, " candidates"]:
    """Squared error against the judge's score.

    Args:
        scores: of the net.
        groups: with utilities.
        mean: of all training utilities.
    """
    assert groups.utilities is not None
    return (scores + mean - groups.utilities).square()


def answer_was_best(
    scores: Float[Tensor, " candidates"], groups: Groups, mean: float
) -> Float[Tensor, " candidates"]:
    """Cross entropy with whether the answer was the best of its prompt; `mean` is not used."""
    return functional.binary_cross_entropy_with_logits(
        scores, groups.best.to(scores), reduction="none"
    )


ABSOLUTE: Mapping[str, Loss] = MappingProxyType(
    {"answer-score": answer_score, "answer-was-best": answer_was_best}
)
"""Losses that do not compare, by the name an arm has them under."""


@final
class Absolute(nn.Module):
    """A model under a loss that does not compare, as `moefold.preference.fit` trains one.

    The registry of preference losses stays as it is: what is here compares nothing.

    Args:
        model: whose scorer learns.
        name: one of `ABSOLUTE`.
        train: the training data.
    """

    def __init__(self, model: PreferenceModel, name: str, train: Groups) -> None:
        super().__init__()
        assert train.utilities is not None
        self.model = model
        self.name = name
        self.mean = float(train.utilities.mean())

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """Scores and the loss."""
        groups = Groups(**inputs)
        scores = group_scores(self.model.comparator, groups)
        error = ABSOLUTE[self.name](scores, groups, self.mean)
        mean = total(error, groups.group_of_candidate, len(groups)) / groups.lengths
        return {"scores": scores, "loss": mean.mean()}


__all__ = ["ABSOLUTE", "Absolute", "answer_score", "answer_was_best"]
