"""The experts of a layer: one MLP each, their parameters stacked.

The layout is that of transformers v5 (`integrations/moe.py`), so that a pretrained mixture is used
without a copy and exported by renaming:

    gated   gate_up_proj [experts, 2 * width, dim]  rows of the gate first, then what it gates
            down_proj    [experts, dim, width]
    plain   up_proj      [experts, width, dim]
            down_proj    [experts, dim, width]
    biases  gate_up_proj_bias or up_proj_bias [experts, .], down_proj_bias [experts, dim]

Shapes: `rows dim` in and out, rows sorted by expert.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moefold.experts import activations
from moefold.experts.activations import Activation
from moefold.experts.backends import AUTO, AbstractMixer, ExpertWeights, choose_backend
from moefold.ops.cpu.pages import in_huge_pages
from moefold.routing import SparseRouting


@final
class Experts(nn.Module):
    """A stack of MLPs, one per expert, each with its own rows.

    Args:
        num_experts: how many.
        dim: width of a row.
        width: hidden width of one expert.
        gated: `down(activation(gate(x)) * up(x))` instead of `down(activation(up(x)))`.
        bias: whether the products have biases.
        activation: its name, or a function of a tensor.
        device: where the parameters are made.
        dtype: what they are made of.

    Raises:
        ValueError: a size is below 1, or the activation unknown.
    """

    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        dim: int,
        width: int,
        gated: bool = True,
        bias: bool = False,
        activation: Activation = "silu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("num_experts", num_experts), ("dim", dim), ("width", width)):
            if size < 1:
                raise ValueError(f"{name}={size} is not possible; it must be at least 1")
        self.num_experts = num_experts
        self.dim = dim
        self.width = width
        self.gated = gated
        self.bias = bias
        self.activation = activations.canonical(activation)

        def parameter(*shape: int) -> nn.Parameter:
            fresh = torch.empty(num_experts, *shape, device=device, dtype=dtype)
            return nn.Parameter(in_huge_pages(fresh))

        wide = 2 * width if gated else width
        self.register_parameter(self._up_name, parameter(wide, dim))
        self.down_proj = parameter(dim, width)
        self.register_parameter(f"{self._up_name}_bias", parameter(wide) if bias else None)
        self.register_parameter("down_proj_bias", parameter(dim) if bias else None)
        self.reset_parameters()

    @property
    def _up_name(self) -> str:
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def weights(self) -> ExpertWeights:
        """The parameters, as backends get them."""
        return ExpertWeights(
            up=getattr(self, self._up_name),
            down=self.down_proj,
            up_bias=getattr(self, f"{self._up_name}_bias"),
            down_bias=self.down_proj_bias,
            gated=self.gated,
            activation=self.activation,
        )

    def reset_parameters(self) -> None:
        """Draw every parameter as `nn.Linear` does: uniform within 1 / sqrt(what it sums over)."""
        # nn.init would read the fan-in of a stack off its last two dims times the first.
        for name, parameter in self.named_parameters(recurse=False):
            fan_in = self.width if name.startswith("down_proj") else self.dim
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def forward(
        self,
        x: Float[Tensor, "*rows dim"],
        rows_per_expert: Int[Tensor, " experts"],
        backend: str = AUTO,
        routing: SparseRouting | None = None,
    ) -> Float[Tensor, "*rows dim"]:
        """Apply every expert to its rows; with a routing, go from tokens to tokens.

        Both are this one function because of what others hang on a module's forward: adapters of
        peft and the shards of FSDP are put in place there.

        Args:
            x: rows `[rows, dim]`, sorted by expert; those past `rows_per_expert.sum()` come back as
                zeros. With a routing, the tokens `[batch, tokens, dim]` that it was made for.
            rows_per_expert: how many rows each expert has.
            backend: how to compute them; see `moefold.experts.backends`.
            routing: return `routing.combine` of what experts make of `routing.dispatch(x)`. A
                backend that can does it without all rows in between.

        Raises:
            ValueError: x of another width or dtype, another number of experts, or a backend that is
                unknown or cannot run.
        """
        weights, flat = self.weights, x if x.ndim == 2 else x.flatten(0, -2)
        self._check(flat, rows_per_expert, weights)
        chosen = choose_backend(backend, flat, weights)
        if routing is None:
            return chosen.compute(flat, rows_per_expert, weights)
        if isinstance(chosen, AbstractMixer):
            return chosen.mix(flat, routing, weights).reshape(x.shape)
        return routing.combine(chosen.compute(routing.dispatch(x), rows_per_expert, weights))

    def _check(self, rows: Tensor, rows_per_expert: Tensor, weights: ExpertWeights) -> None:
        if rows.shape[-1] != self.dim:
            raise ValueError(
                f"rows are {rows.shape[-1]} wide, but these experts were made for dim={self.dim}; "
                f"build the layer with the width of its input"
            )
        if rows_per_expert.shape[0] != self.num_experts:
            raise ValueError(
                f"rows_per_expert has {rows_per_expert.shape[0]} counts, but there are "
                f"{self.num_experts} experts; router and experts must agree on num_experts"
            )
        same = rows.dtype == weights.up.dtype or torch.is_autocast_enabled(rows.device.type)
        if not same:
            raise ValueError(
                f"rows are {rows.dtype}, but the experts {weights.up.dtype}; cast the input or the "
                f"layer with .to(dtype), or run under torch.autocast"
            )

    def extra_repr(self) -> str:
        """Show the geometry in `print(model)`."""
        return (
            f"{self.num_experts} x {self.dim} -> {self.width}, gated={self.gated}, "
            f"bias={self.bias}, activation={self.activation}"
        )
