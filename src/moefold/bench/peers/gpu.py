"""Peers that need a GPU: ScatterMoE and SonicMoE.

Written from their code and not run by us: there was no GPU at hand. As every variant, they are
compared with the reference before they are timed, so that a mistake here is reported, not timed.

Shapes: `batch tokens dim` in and out.
"""

import sys
from typing import Any, final

import torch
from torch import Tensor, nn

from moefold.bench.layers import weights_of
from moefold.bench.peers.base import (
    AbstractPeer,
    Built,
    FirstOf,
    Given,
    imported,
    not_installed,
    only,
)
from moefold.bench.shapes import Shape


@final
class ScatterMoe(AbstractPeer):
    """shawntan/scattermoe (commit 47b5e15): the caller routes; gated experts, value first."""

    name = "ScatterMoE"
    package = "scattermoe"

    def reasons_against(self, shape: Shape, dtype: torch.dtype, device: str) -> list[str]:
        """Anything but gated experts that tokens choose, on a GPU."""
        if other := _gated_top_k(shape):
            return other
        reasons = _on_gpu(device)
        if not reasons and not_installed("scattermoe", self.package):
            reasons.append("scattermoe is not installed; it comes from its repository only")
        return reasons

    def build(self, given: Given) -> Built:
        """Make it behind a plain router."""
        shape, weights = given.shape, weights_of(given.master)
        mlp = imported("scattermoe.mlp").GLUMLP(shape.dim, shape.width, shape.experts, shape.k)
        layer = _Routed(mlp, given).to(given.device, given.dtype)
        with torch.no_grad():
            gate, value = weights["experts.gate_up_proj"].chunk(2, dim=1)
            mlp.experts.weight.copy_(torch.cat([value, gate], dim=1))
            mlp.output_experts.weight.copy_(weights["experts.down_proj"])

        def gradients() -> dict[str, Tensor]:
            value, gate = mlp.experts.weight.grad.chunk(2, dim=1)
            assert layer.router.weight.grad is not None
            return {
                "router.weight": layer.router.weight.grad,
                "experts.gate_up_proj": torch.cat([gate, value], dim=1),
                "experts.down_proj": mlp.output_experts.weight.grad,
            }

        return Built(layer=layer, gradients=gradients, remark="behind a plain router of ours")


@final
class SonicMoe(AbstractPeer):
    """Dao-AILab/sonic-moe (commit 8565e84): gate and value in turn, row by row."""

    name = "SonicMoE"
    package = "sonic-moe"

    def reasons_against(self, shape: Shape, dtype: torch.dtype, device: str) -> list[str]:
        """Anything but gated experts that tokens choose, in half precision on Hopper or newer."""
        if other := _gated_top_k(shape):
            return other
        reasons = _on_gpu(device)
        if not reasons and torch.cuda.get_device_capability(device)[0] < 9:
            reasons.append("it needs compute capability 9.0 (Hopper) or newer")
        if sys.version_info < (3, 12):
            found = ".".join(map(str, sys.version_info[:2]))
            reasons.append(f"it needs Python 3.12 or newer, and this is {found}")
        if not reasons:
            reasons += not_installed("sonicmoe", self.package)
        if dtype not in (torch.bfloat16, torch.float16):
            reasons.append("it computes in half precision only")
        return reasons

    def build(self, given: Given) -> Built:
        """Make it."""
        shape, weights = given.shape, weights_of(given.master)
        module = imported("sonicmoe")
        layer = module.MoE(
            num_experts=shape.experts,
            num_experts_per_tok=shape.k,
            hidden_size=shape.dim,
            intermediate_size=shape.width,
            activation_function=imported("sonicmoe.enums").ActivationType.SWIGLU,
            add_bias=False,
            std=0.02,
        )
        layer.to(given.device, given.dtype)
        with torch.no_grad():
            layer.router.weight.copy_(weights["router.weight"])
            gate, value = weights["experts.gate_up_proj"].chunk(2, dim=1)
            layer.c_fc.weight[:, ::2].copy_(gate)
            layer.c_fc.weight[:, 1::2].copy_(value)
            layer.c_proj.weight.copy_(weights["experts.down_proj"])

        def gradients() -> dict[str, Tensor]:
            up = layer.c_fc.weight.grad
            return {
                "router.weight": layer.router.weight.grad,
                "experts.gate_up_proj": torch.cat([up[:, ::2], up[:, 1::2]], dim=1),
                "experts.down_proj": layer.c_proj.weight.grad,
            }

        return Built(layer=FirstOf(layer), gradients=gradients)


@final
class _Routed(nn.Module):
    """A plain router in front of a layer that leaves routing to its caller."""

    def __init__(self, experts: Any, given: Given) -> None:
        super().__init__()
        self.router = nn.Linear(given.shape.dim, given.shape.experts, bias=False)
        self.experts = experts
        self.k = given.shape.k
        with torch.no_grad():
            self.router.weight.copy_(weights_of(given.master)["router.weight"])

    def forward(self, x: Tensor) -> Tensor:
        """Route by the renormalised softmax of the top k."""
        flat = x.flatten(0, 1)
        scores, experts = self.router(flat).float().softmax(-1).topk(self.k)
        scores = (scores / scores.sum(-1, keepdim=True)).to(x.dtype)
        return self.experts(flat, scores, experts).reshape(x.shape)


def _on_gpu(device: str) -> list[str]:
    if torch.device(device).type == "cuda":
        return []
    return [f"it needs a GPU, and this is {torch.device(device).type}"]


def _gated_top_k(shape: Shape) -> list[str]:
    reasons = only(("token-choice",), shape, "tokens choose")
    return reasons if shape.gated else [*reasons, "its experts are set up here as gated ones only"]


__all__ = ["ScatterMoe", "SonicMoe"]
