"""A backend: one way to compute experts on rows.

Shapes: `rows dim` in and out; `experts` weights are stacked. Rows past `rows_per_expert.sum()` are
spare: they must come back finite, and take part in no gradient of a weight.
"""

import abc
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from moefold.experts.activations import activation


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertWeights:
    """What a backend needs to know of the experts.

    Attributes:
        up: `[experts, hidden, dim]`; for gated experts hidden is `2 * width`, gate rows first.
        down: `[experts, dim, width]`.
        up_bias: `[experts, hidden]` or None.
        down_bias: `[experts, dim]` or None.
        gated: whether the first half of the hidden values gates the second.
        activation: name of the activation.
    """

    up: Float[Tensor, "experts hidden dim"]
    down: Float[Tensor, "experts dim width"]
    up_bias: Float[Tensor, "experts hidden"] | None
    down_bias: Float[Tensor, "experts dim"] | None
    gated: bool
    activation: str

    def activate(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows width"]:
        """What stands between the two matrices."""
        act = activation(self.activation)
        if not self.gated:
            return act(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return act(gate) * up


class AbstractBackend(abc.ABC):
    """Computes experts on rows sorted by expert."""

    @abc.abstractmethod
    def reasons_against(self, rows: Tensor, weights: ExpertWeights) -> list[str]:
        """Why this backend cannot run on these; empty if it can. Plain Python, cheap."""

    @abc.abstractmethod
    def compute(
        self,
        rows: Float[Tensor, "rows dim"],
        rows_per_expert: Int[Tensor, " experts"],
        weights: ExpertWeights,
    ) -> Float[Tensor, "rows dim"]:
        """Every row through its expert: `down(activate(up(row)))`."""
