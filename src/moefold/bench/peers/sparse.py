"""Small packages whose tokens choose: st-moe-pytorch, mixture-of-experts, sinkhorn-router-pytorch.

The first two put every token into a place of a padded buffer by products with matrices of
`tokens experts capacity`. We give them just the capacity with which none of the run's inputs drops
a token: with less they would compute something else, with more they would be slower.

Shapes: `batch tokens dim` in and out.
"""

from typing import final

import torch
from torch import nn

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
from moefold.bench.peers.separate import Stack, gradients_of, separate_experts
from moefold.bench.room import available_bytes
from moefold.bench.shapes import Shape


@final
class StMoe(AbstractPeer):
    """lucidrains/st-moe-pytorch: top-n with thresholds, which are set to zero here."""

    name = "st-moe-pytorch"
    package = "st-moe-pytorch"

    def reasons_against(self, shape: Shape, dtype: torch.dtype, device: str) -> list[str]:
        """Other routers, one expert for each token, buffers that do not fit."""
        if other := only(("token-choice",), shape, "tokens choose"):
            return other
        reasons = not_installed("st_moe_pytorch", self.package)
        if shape.k < 2:
            reasons.append("it needs k of 2 or more")
        return reasons or _no_room(shape, device)

    def build(self, given: Given) -> Built:
        """Make it, its thresholds at zero and without its straight-through gradient."""
        experts = separate_experts(given)
        factor = _capacity_factor(given)
        layer = imported("st_moe_pytorch").MoE(
            dim=given.shape.dim,
            num_experts=given.shape.experts,
            gating_top_n=given.shape.k,
            threshold_train=0.0,
            threshold_eval=0.0,
            capacity_factor_train=factor,
            capacity_factor_eval=factor,
            straight_through_dispatch_tensor=False,
            experts=nn.ModuleList(experts),
        )
        layer.to(given.device, given.dtype)
        router = layer.gate.to_gates.weight
        with torch.no_grad():
            router.copy_(weights_of(given.master)["router.weight"])
        return Built(
            layer=FirstOf(layer),
            gradients=lambda: {"router.weight": router.grad, **gradients_of(experts)},
            remark=f"experts given to it; capacity {given.most_rows}, so that it drops nothing",
        )


@final
class MixtureOfExperts(AbstractPeer):
    """lucidrains/mixture-of-experts: top-2 of GShard."""

    name = "mixture-of-experts"
    package = "mixture-of-experts"

    def reasons_against(self, shape: Shape, dtype: torch.dtype, device: str) -> list[str]:
        """Other routers, another k than 2, buffers that do not fit."""
        if other := only(("token-choice",), shape, "tokens choose"):
            return other
        reasons = not_installed("mixture_of_experts", self.package)
        if shape.k != 2:
            reasons.append(f"it has k of 2 only, not {shape.k}")
        return reasons or _no_room(shape, device)

    def build(self, given: Given) -> Built:
        """Make it; it always keeps the second expert."""
        stack = Stack(given)
        factor = _capacity_factor(given)
        layer = imported("mixture_of_experts").MoE(
            dim=given.shape.dim,
            num_experts=given.shape.experts,
            second_policy_train="all",
            second_policy_eval="all",
            capacity_factor_train=factor,
            capacity_factor_eval=factor,
            experts=stack,
        )
        layer.to(given.device, given.dtype)
        router = layer.gate.w_gating
        with torch.no_grad():
            router.copy_(weights_of(given.master)["router.weight"].t())
        return Built(
            layer=FirstOf(layer),
            gradients=lambda: {"router.weight": router.grad.t(), **stack.gradients()},
            remark=f"experts given to it; capacity {given.most_rows}, so that it drops nothing",
        )


@final
class SinkhornRouter(AbstractPeer):
    """lucidrains/sinkhorn-router-pytorch: every expert gets the same number of tokens."""

    name = "sinkhorn-router-pytorch"
    package = "sinkhorn-router-pytorch"

    def reasons_against(self, shape: Shape, dtype: torch.dtype, device: str) -> list[str]:
        """Other loads of experts than expert choice with a capacity factor of 1."""
        if other := only(("expert-choice",), shape, "its experts all get as many tokens"):
            return other
        reasons = not_installed("sinkhorn_router_pytorch", self.package)
        if shape.capacity_factor != 1:
            reasons.append(f"it has a capacity factor of 1, not {shape.capacity_factor:g}")
        return reasons

    def build(self, given: Given) -> Built:
        """Make it with our experts."""
        layer = imported("sinkhorn_router_pytorch").SinkhornRouter(
            given.shape.dim, experts=nn.ModuleList(separate_experts(given))
        )
        return Built(
            layer=layer.to(given.device, given.dtype),
            another="it chooses by Sinkhorn over the whole batch, with weights of 0 or 1, and "
            "averages: none of our routers computes that",
        )


def _capacity_factor(given: Given) -> float:
    """With which `int(tokens * factor / experts)` is the most rows an expert has."""
    tokens = given.shape.tokens // given.shape.sequences
    return (given.most_rows + 0.5) * given.shape.experts / tokens


def _no_room(shape: Shape, device: str) -> list[str]:
    """A reason if the matrices of a pass do not fit.

    Each of k choices makes one of `tokens experts capacity`, and about as many more are kept for
    the backward pass or made in it; a capacity is at least a fair share.
    """
    tokens = shape.tokens // shape.sequences
    fair = tokens * shape.k / shape.experts
    number = int(4 * (2 * shape.k + 6) * shape.tokens * shape.experts * 1.5 * fair)
    have = available_bytes(device)
    if number <= have:
        return []
    return [
        f"its matrices of tokens, experts and capacity would take {number / 1e9:.0f} GB, and "
        f"{have / 1e9:.0f} GB are available"
    ]


__all__ = ["MixtureOfExperts", "SinkhornRouter", "StMoe"]
