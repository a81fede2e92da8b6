"""How a mixture gets its first weights.

Shapes: `experts` experts of inner width `width` on tokens of width `dim`.
"""

import dataclasses

import torch
from torch import Tensor, nn

from moefold.moe import MoE, MoEConfig
from moefold.surgery.config import Copies
from moefold.surgery.hosts import DenseMLP, Site


def fitted(config: MoEConfig, site: Site) -> MoEConfig:
    """The mixture's config with the site's geometry in it.

    Raises:
        ValueError: the config asks for experts of another width than the MLP they copy.
    """
    if config.expert_width not in (None, site.width):
        raise ValueError(
            f"{site.name}: expert_width is {config.expert_width}, but the experts are copies of an "
            f"MLP of width {site.width}; leave expert_width out or say {site.width}"
        )
    return dataclasses.replace(
        config, expert_width=site.width, bias=True, gated=False, activation=site.activation
    )


def born(config: MoEConfig, site: Site, birth: Copies) -> MoE:
    """A mixture for the site, its experts copies of the site's MLP, on its device and dtype.

    Args:
        config: what `fitted` returned.
        site: a site that can be taken.
        birth: how the weights start.

    Raises:
        ValueError: the router and the host do not go together, as the router says it.
    """
    assert site.mlp is not None
    with site.mlp.up.device:
        moe = config.build(site.dim, causal=site.causal, site=site.name)
    moe.to(site.mlp.up.dtype)
    start_router(moe.router, birth)
    copy_into_experts(moe, site.mlp, birth)
    return moe


@torch.no_grad()
def start_router(router: nn.Module, birth: Copies) -> None:
    """Draws the router's `weight` anew, if it has one."""
    weight = dict(router.named_parameters()).get("weight")
    if weight is not None:
        nn.init.normal_(weight, std=birth.router_std)


@torch.no_grad()
def copy_into_experts(moe: MoE, mlp: DenseMLP, birth: Copies) -> None:
    """Fills every expert with the MLP's weights; no storage is shared. A missing bias is zero.

    What is frozen in the MLP is frozen in its copies; a missing bias follows its weight. Router and
    shared expert are new, and trainable whatever the host is.
    """
    experts = dict(moe.experts.named_parameters())
    weights = {
        "up_proj": (mlp.up, mlp.up),
        "up_proj_bias": (mlp.up_bias, mlp.up),
        "down_proj": (mlp.down, mlp.down),
        "down_proj_bias": (mlp.down_bias, mlp.down),
    }
    for name, (weight, matrix) in weights.items():
        _fill(experts[name], weight)
        experts[name].requires_grad_((matrix if weight is None else weight).requires_grad)
        if birth.copy_noise_std:
            experts[name].add_(torch.randn_like(experts[name]), alpha=birth.copy_noise_std)
    if moe.shared is not None:
        # A shared expert is added to the copies: at birth it must add nothing.
        shared = dict(moe.shared.named_parameters())
        for name in ("down_proj", "down_proj_bias"):
            if name in shared:
                shared[name].zero_()


def _fill(stacked: Tensor, weight: Tensor | None) -> None:
    if weight is None:
        stacked.zero_()
    else:
        stacked.copy_(weight.expand_as(stacked))
