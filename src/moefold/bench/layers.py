"""The layers that are ours, and the dense MLP they are measured against.

Shapes: `batch tokens dim` in and out; `dim` and `width` as in `Shape`.
"""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from moefold import routers
from moefold.bench.shapes import Shape
from moefold.moe import MoE, MoEConfig


@final
class DenseMlp(nn.Module):
    """The yardstick: the usual MLP without biases, gated (three products) or plain (two)."""

    def __init__(self, dim: int, width: int, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, width, bias=False) if gated else None
        self.up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to `x [batch, tokens, dim]`."""
        if self.gate is None:
            return self.down(functional.gelu(self.up(x)))
        return self.down(functional.silu(self.gate(x)) * self.up(x))


@final
class After(nn.Module):
    """A layer whose input something else has changed: what some peers do before they route."""

    def __init__(self, before: Callable[[Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.before = before
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """`layer(before(x))`."""
        return self.layer(self.before(x))


def dense(shape: Shape) -> DenseMlp:
    """The dense MLP of as much arithmetic for each token."""
    return DenseMlp(shape.dim, shape.active_width, shape.gated)


def ours(shape: Shape, backend: str) -> MoE:
    """Our layer, without the auxiliary losses that no other variant has."""
    config = MoEConfig(
        num_experts=shape.experts,
        expert_width=shape.width,
        router=routers.config(shape.router, **shape.settings),
        gated=shape.gated,
        activation="silu" if shape.gated else "gelu",
        backend=backend,
        losses={},
    )
    return config.build(shape.dim)


def reference(shape: Shape, device: str, dtype: torch.dtype) -> MoE:
    """Our layer by the definition of its experts, whose weights all variants get.

    The router is drawn so that logits have unit size: their gaps are then wide beside rounding, and
    what is mixed is not nearly a plain mean.
    """
    layer = ours(shape, "reference").to(device, dtype)
    with torch.no_grad():
        if shape.router == "soft":
            weights_of(layer)["router.scale"].fill_(shape.dim**0.5)
        else:
            weights_of(layer)["router.weight"].normal_(std=shape.dim**-0.5)
    return layer


def weights_of(layer: MoE) -> dict[str, Tensor]:
    """Its parameters by name: `router.*` and `experts.*`."""
    return dict(layer.named_parameters())


def copy_weights(source: MoE, target: MoE) -> None:
    """Give one of our layers the weights of another."""
    with torch.no_grad():
        for (name, mine), theirs in zip(
            target.named_parameters(), source.parameters(), strict=True
        ):
            assert mine.shape == theirs.shape, name
            mine.copy_(theirs)


__all__ = ["After", "DenseMlp", "copy_weights", "dense", "ours", "reference", "weights_of"]
