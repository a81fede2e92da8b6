"""Experts as separate modules, or as one stack of plain products, with our weights in them.

For peers that take experts from whoever builds the layer.

Shapes: `experts rows dim` for a stack; our stacked weights as in `moefold.experts`.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from moefold.bench.layers import DenseMlp, weights_of
from moefold.bench.peers.base import Given, stacked


def separate_experts(given: Given) -> list[DenseMlp]:
    """An MLP for each expert."""
    shape, weights = given.shape, weights_of(given.master)
    experts = []
    for e in range(shape.experts):
        one = DenseMlp(shape.dim, shape.width, shape.gated).to(given.device, given.dtype)
        with torch.no_grad():
            if one.gate is not None:
                gate, up = weights["experts.gate_up_proj"][e].chunk(2)
                one.gate.weight.copy_(gate)
                one.up.weight.copy_(up)
            else:
                one.up.weight.copy_(weights["experts.up_proj"][e])
            one.down.weight.copy_(weights["experts.down_proj"][e])
        experts.append(one)
    return experts


def gradients_of(experts: Sequence[DenseMlp]) -> dict[str, Tensor]:
    """Their gradients in our layout."""
    up = stacked([one.up.weight.grad for one in experts])
    found = {"experts.down_proj": stacked([one.down.weight.grad for one in experts])}
    gates = [one.gate.weight.grad for one in experts if one.gate is not None]
    if not gates:
        return {"experts.up_proj": up, **found}
    return {"experts.gate_up_proj": torch.cat([stacked(gates), up], dim=1), **found}


@final
class Stack(nn.Module):
    """All experts as batched products over `[experts, rows, dim]`."""

    def __init__(self, given: Given) -> None:
        super().__init__()
        weights = weights_of(given.master)
        name = "gate_up_proj" if given.shape.gated else "up_proj"
        self.gated = given.shape.gated
        self.up = nn.Parameter(weights[f"experts.{name}"].detach().clone())
        self.down = nn.Parameter(weights["experts.down_proj"].detach().clone())
        self._name = name

    def forward(self, x: Tensor) -> Tensor:
        """Every expert on its rows."""
        hidden = torch.bmm(x, self.up.transpose(1, 2))
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = functional.silu(gate) * value
        else:
            hidden = functional.gelu(hidden)
        return torch.bmm(hidden, self.down.transpose(1, 2))

    def gradients(self) -> dict[str, Tensor]:
        """By our names."""
        assert self.up.grad is not None
        assert self.down.grad is not None
        return {f"experts.{self._name}": self.up.grad, "experts.down_proj": self.down.grad}


__all__ = ["Stack", "gradients_of", "separate_experts"]
