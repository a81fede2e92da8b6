"""Small packages with Soft MoE: soft-moe-pytorch, soft-moe, soft-mixture-of-experts.

Shapes: `batch tokens dim` in and out; `phi` is `dim experts slots`.
"""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from moefold.bench.layers import DenseMlp, weights_of
from moefold.bench.peers.base import (
    AbstractPeer,
    Built,
    Given,
    imported,
    not_installed,
    only,
    stacked,
)
from moefold.bench.peers.separate import gradients_of, separate_experts
from moefold.bench.shapes import Shape

_SOFT = "it has the soft mixture only"


@final
class SoftMoePytorch(AbstractPeer):
    """lucidrains/soft-moe-pytorch; it normalises its input, also what it mixes."""

    name = "soft-moe-pytorch"
    package = "soft-moe-pytorch"

    def reasons_against(self, shape: Shape, dtype: torch.dtype, device: str) -> list[str]:
        """Other routers, and gated experts, which are GEGLU there."""
        if other := only(("soft",), shape, _SOFT):
            return other
        reasons = not_installed("soft_moe_pytorch", self.package)
        return reasons + (["its gated experts are GEGLU, ours SwiGLU"] if shape.gated else [])

    def build(self, given: Given) -> Built:
        """Make it; the biases of its experts are zero."""
        shape, weights = given.shape, weights_of(given.master)
        layer = imported("soft_moe_pytorch").SoftMoE(
            shape.dim,
            num_experts=shape.experts,
            num_slots=shape.slots,
            expert_mult=(shape.width + 0.5) / shape.dim,  # it rounds down
            offload_unused_experts_to_cpu=False,
        )
        layer.to(given.device, given.dtype)
        products = [[m for m in one if isinstance(m, nn.Linear)] for one in layer.experts.experts]
        with torch.no_grad():
            layer.slot_embeds.copy_(weights["router.phi"].permute(1, 2, 0))
            # Tokens and slots have length sqrt(dim) there, and there is no other scale.
            layer.slot_norm.gamma.fill_(float(weights["router.scale"]) / shape.dim)
            for e, (up, down) in enumerate(products):
                up.weight.copy_(weights["experts.up_proj"][e])
                down.weight.copy_(weights["experts.down_proj"][e])
                up.bias.zero_()
                down.bias.zero_()

        def gradients() -> dict[str, Tensor]:
            return {
                "router.phi": layer.slot_embeds.grad.permute(2, 0, 1),
                "experts.up_proj": stacked([up.weight.grad for up, _ in products]),
                "experts.down_proj": stacked([down.weight.grad for _, down in products]),
            }

        return Built(
            layer=layer,
            gradients=gradients,
            before=lambda x: functional.normalize(x, dim=-1) * shape.dim**0.5,
            remark="with its norm before it, and biases; the reference has the norm too",
        )


@final
class SoftMoe(AbstractPeer):
    """bwconrad/soft-moe; it normalises its input, also what it mixes."""

    name = "soft-moe"
    package = "soft-moe"

    def reasons_against(self, shape: Shape, dtype: torch.dtype, device: str) -> list[str]:
        """Other routers; what it imports, where that is missing."""
        if other := only(("soft",), shape, _SOFT):
            return other
        if reasons := not_installed("soft_moe", self.package):
            return reasons
        # timm itself does not ask for torchvision, which it imports.
        needed = [name for name in ("timm", "torchvision") if not_installed(name, name)]
        return [f"it imports {name}, which is not installed" for name in needed]

    def build(self, given: Given) -> Built:
        """Make it with our experts."""
        shape, weights = given.shape, weights_of(given.master)
        experts = separate_experts(given)
        left = list(experts)

        def next_expert() -> DenseMlp:
            return left.pop(0)

        layer = imported("soft_moe").SoftMoELayerWrapper(
            dim=shape.dim,
            num_experts=shape.experts,
            slots_per_expert=shape.slots,
            layer=next_expert,
        )
        layer.to(given.device, given.dtype)
        with torch.no_grad():
            layer.phi.copy_(weights["router.phi"])
            layer.scale.copy_(weights["router.scale"].reshape(1))

        def gradients() -> dict[str, Tensor]:
            return {
                "router.phi": layer.phi.grad,
                "router.scale": layer.scale.grad.reshape(()),
                **gradients_of(experts),
            }

        return Built(
            layer=layer,
            gradients=gradients,
            before=lambda x: functional.normalize(x, dim=-1),
            remark="with its norm before it; the reference has the norm too",
        )


@final
class SoftMixtureOfExperts(AbstractPeer):
    """fkodom/soft-mixture-of-experts: its experts are one product each, after a shared one."""

    name = "soft-mixture-of-experts"
    package = "soft-mixture-of-experts"

    def reasons_against(self, shape: Shape, dtype: torch.dtype, device: str) -> list[str]:
        """Other routers, and gated experts."""
        if other := only(("soft",), shape, _SOFT):
            return other
        reasons = not_installed("soft_mixture_of_experts", self.package)
        return reasons + (["it has no gated experts"] if shape.gated else [])

    def build(self, given: Given) -> Built:
        """Make the half of its encoder layer that stands for the MLP."""
        shape = given.shape
        layer = nn.Sequential(
            nn.Linear(shape.dim, shape.width),
            nn.GELU(),
            imported("soft_mixture_of_experts.soft_moe").SoftMoE(
                in_features=shape.width,
                out_features=shape.dim,
                num_experts=shape.experts,
                slots_per_expert=shape.slots,
            ),
        )
        return Built(
            layer=layer.to(given.device, given.dtype),
            another="its experts are the second product only; the first is shared by all",
        )


__all__ = ["SoftMixtureOfExperts", "SoftMoe", "SoftMoePytorch"]
