"""What a backend is: a way to compute experts on rows.

Shapes: `rows dim` in and out, sorted by expert; `experts` experts of hidden `width`; `wide` is
`width` for plain experts and `2 * width` for gated ones (the gate's rows, then what it gates).

    plain:  y = down @ activation(up @ x)
    gated:  y = down @ (activation(up[:width] @ x) * (up[width:] @ x))
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from moefold.experts.activations import Activation
from moefold.routing import SparseRouting


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertWeights:
    """All parameters of a set of experts.

    Attributes:
        up: first matrices, in the layout of `torch.nn.Linear`.
        down: second matrices.
        up_bias: added after the first product, None for nothing.
        down_bias: added after the second product, None for nothing.
        gated: whether half of the first product gates the other half.
        activation: its canonical name, or a function.
    """

    up: Float[Tensor, "experts wide dim"]
    down: Float[Tensor, "experts dim width"]
    up_bias: Float[Tensor, "experts wide"] | None = None
    down_bias: Float[Tensor, "experts dim"] | None = None
    gated: bool
    activation: Activation


class AbstractBackend(ABC):
    """A way to compute experts on rows.

    Every backend computes what `reference` computes: values, gradients, empty experts, and zeros
    for the spare rows past `rows_per_expert.sum()`.
    """

    @abstractmethod
    def reasons_against(self, rows: Tensor, weights: ExpertWeights) -> list[str]:
        """Say why this backend cannot compute these experts on these rows; empty if it can.

        Reads devices, dtypes, shapes and settings but no data, so that it can be traced.
        """

    @abstractmethod
    def compute(
        self,
        rows: Float[Tensor, "rows dim"],
        rows_per_expert: Int[Tensor, " experts"],
        weights: ExpertWeights,
    ) -> Float[Tensor, "rows dim"]:
        """Apply every expert to its rows."""


class AbstractMixer(AbstractBackend):
    """A backend that can also go from tokens to tokens, without all rows in between."""

    @abstractmethod
    def mix(
        self, x: Float[Tensor, "tokens dim"], routing: SparseRouting, weights: ExpertWeights
    ) -> Float[Tensor, "tokens dim"]:
        """Every token's weighted sum of what its experts make of it; zero if it has none.

        It is `routing.combine(self.compute(routing.dispatch(x), ...))`, values and gradients, those
        of the rows' weights too.
        """
