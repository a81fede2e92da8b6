"""Stacked MLP experts.

Shapes: `rows dim` in and out, rows sorted by expert. Parameters, in the layout of transformers v5:

    gated   gate_up_proj [experts, 2 * width, dim], gate rows first
    plain   up_proj      [experts, width, dim]
    both    down_proj    [experts, dim, width]

and, with biases, the same names with `_bias` and without the last dim.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moefold.experts.activations import activation as activation_named
from moefold.experts.backends import ExpertWeights, choose_backend


@final
class Experts(nn.Module):
    """A stack of MLPs of one shape.

    Attributes:
        num_experts: number of experts.
        dim: width of a row.
        width: hidden width of one expert.
        gated: whether they are gated.
        activation: name of the activation.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        width: int,
        *,
        gated: bool = True,
        bias: bool = False,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("dim", dim), ("width", width)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a positive whole number.")
        activation_named(activation)
        self.num_experts = num_experts
        self.dim = dim
        self.width = width
        self.gated = gated
        self.activation = activation
        hidden = 2 * width if gated else width
        self._up = "gate_up_proj" if gated else "up_proj"
        self.register_parameter(self._up, nn.Parameter(torch.empty(num_experts, hidden, dim)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, width))
        up_bias = nn.Parameter(torch.empty(num_experts, hidden)) if bias else None
        self.register_parameter(f"{self._up}_bias", up_bias)
        down_bias = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self.register_parameter("down_proj_bias", down_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every expert as `nn.Linear` does: uniform within `1 / sqrt(fan-in)` of one expert.

        The fan-in is that of one matrix; torch's own rules would read it off the stacked tensor.
        """
        for parameter, fan_in in (
            (self.weights.up, self.dim),
            (self.weights.up_bias, self.dim),
            (self.weights.down, self.width),
            (self.weights.down_bias, self.width),
        ):
            if parameter is not None:
                nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    @property
    def weights(self) -> ExpertWeights:
        """The parameters, as a backend takes them."""
        return ExpertWeights(
            up=getattr(self, self._up),
            down=self.down_proj,
            up_bias=getattr(self, f"{self._up}_bias"),
            down_bias=self.down_proj_bias,
            gated=self.gated,
            activation=self.activation,
        )

    def forward(
        self,
        rows: Float[Tensor, "rows dim"],
        rows_per_expert: Int[Tensor, " experts"],
        backend: str = "auto",
    ) -> Float[Tensor, "rows dim"]:
        """Every row through its expert.

        Args:
            rows: the rows of expert 0, then those of expert 1, and so on; what is left is spare.
            rows_per_expert: how many rows each has.
            backend: name of a backend, or "auto" for the first that can run.

        Raises:
            ValueError: the backend is unknown or cannot run here.
        """
        weights = self.weights
        return choose_backend(backend, rows, weights).compute(rows, rows_per_expert, weights)
