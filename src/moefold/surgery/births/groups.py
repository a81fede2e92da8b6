"""Birth as virtual groups: fine-grained experts that together are copies of the dense MLP.

The MLP is cut into G shards, each is copied E times, and a router's row stands G times, so that a
token takes complete groups, each of them the whole MLP:

    expert      0  1  2  3  4  5        G = 2, E = 3
    shard       0  1  0  1  0  1        expert mod G
    router row  a  a  b  b  c  c        expert div G

He et al., *Upcycling Large Language Models into Mixture of Experts*, 2024 (arXiv:2410.07524), where
this with top T is called EeGgTt, as in E8G8T8.

What has to be scaled. Let m be the sum of a token's combine weights, complete groups. Each shard
comes back with m / G, so shards must be c = G / m times as large: G for weights that sum to one
(softmax after top-k), E G^2 / T for a softmax over all experts that is about uniform (before
top-k, m = T / (E G)). The bias of the second map comes back with m, and is multiplied by c / G.

Where c may go. With the first map and its bias times a, an activation for which act(a z) is
a^p act(z), a > 0, and the second map times d, a plain expert is a^p d times as large, a gated one
a^(p + 1) d, as `up` multiplies what the gate lets through. relu, leaky_relu and identity have
p = 1, relu2 has p = 2; c^(1/2) on both maps of a plain relu expert, and c^(1/3) on those of a plain
relu2 or gated relu expert, are exact: the published exponents. gelu, silu and the others have no
p: then `up` and `down` of a gated expert take c^(1/2) each and the gate nothing, as the expert is
linear in `up`; of a plain expert `down` takes all.

Shapes: an expert is `width / granularity` wide.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from moefold.experts import activations
from moefold.moe import MoE, MoEConfig
from moefold.routers.base import check_one_of, check_positive
from moefold.routing import SparseRouting
from moefold.surgery.births.base import (
    AbstractBirth,
    divided,
    experts_per_token,
    refuse_width,
    stacked,
    start_rows,
    weight_of,
    with_geometry,
)
from moefold.surgery.births.copies import left_out
from moefold.surgery.hosts import Site
from moefold.surgery.trial import Trial

SCALINGS = ("auto", "pre-softmax", "post-softmax", "none")
SPREADS = ("exact", "published")

HOMOGENEOUS = {"identity": 1, "leaky_relu": 1, "relu": 1, "relu2": 2}
"""Activations for which act(a z) is a^p act(z), a > 0, and their p."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualGroups(AbstractBirth):
    """Shards of the dense MLP, copied, with a router that chooses complete groups.

    The function is kept where every token takes complete groups and the scale is right: for
    weights that sum to one and a `k` that `granularity` divides, whatever the router's first
    weights. A softmax over all experts is uniform for `router_start="zero"` only; the larger the
    router, the more the output exceeds that of the MLP.

    Megatron-LM copies the bias of the second map as it is, which brings it back m times: the same
    for weights that sum to one, T / (E G) of it for others, where it is scaled here. And it scales
    all maps by the published exponent whatever the activation, which changes what gelu or silu do.

    Attributes:
        granularity: G, the number of shards; it divides `num_experts` and the width of the MLP.
        scaling: "post-softmax": by G; "pre-softmax": by E G^2 / T, with the router's `k` or
            `budget` as T; "auto": the one of these that fits the router; "none"; or a number.
        spread: which maps take the scale. "exact": as published where that is exact, otherwise so
            that it is; "published": every map by exponent 1/3 for gated or squared-ReLU experts,
            1/2 for others.
    """

    granularity: int = 1
    scaling: Literal["auto", "pre-softmax", "post-softmax", "none"] | float = "auto"
    spread: Literal["exact", "published"] = "exact"

    kind: ClassVar[str] = "virtual-groups"

    def __post_init__(self) -> None:
        AbstractBirth.__post_init__(self)
        check_positive("granularity", self.granularity)
        check_one_of("spread", self.spread, SPREADS)
        if isinstance(self.scaling, str):
            check_one_of("scaling", self.scaling, SCALINGS)
        else:
            check_positive("scaling", self.scaling, integer=False)

    def fit(self, config: MoEConfig, site: Site) -> MoEConfig:
        """Experts as wide as a shard.

        Raises:
            ValueError: the granularity does not divide the experts or the width, another width is
                asked for, or the scale is not known for this router.
        """
        parts, experts = self.granularity, config.num_experts
        if experts % parts:
            raise ValueError(
                f"num_experts is {experts}, which granularity={parts} does not divide; a group has "
                f"{parts} experts, so use {parts}, {2 * parts}, {3 * parts}, ... experts"
            )
        width = divided(site, parts, f"granularity={parts}")
        refuse_width(config, site, width, parts)
        self.factor(config)
        return with_geometry(config, site, width)

    def start_router(self, router: nn.Module) -> None:
        """Draws one row for each group and repeats it."""
        weight = weight_of(router)
        if weight is None:
            return
        with torch.no_grad():
            rows = torch.empty_like(weight[:: self.granularity])
            start_rows(rows, self)
            weight.copy_(rows.repeat_interleave(self.granularity, 0))

    @torch.no_grad()
    def fill(self, moe: MoE, config: MoEConfig, site: Site) -> None:
        """Copies the shards, scaled."""
        assert site.mlp is not None
        factor, parts = self.factor(config), self.granularity
        scales = self._scales(config)
        for name, stack in stacked(moe).items():
            weight = getattr(site.mlp, name)
            if weight is None:
                stack.zero_()
            elif name == "down_bias":
                stack.copy_((weight * (factor / parts)).expand_as(stack))
            else:
                cut = weight.unflatten(1 if name == "down" else 0, (parts, -1))
                shards = cut.transpose(0, 1) if name == "down" else cut
                copies = stack.unflatten(0, (-1, parts))
                copies.copy_((shards * scales[name.removesuffix("_bias")]).expand_as(copies))

    def keeps(self, config: MoEConfig, trial: Trial) -> tuple[bool, str]:
        """It does where every shard comes back once."""
        if trial.weights is None:
            return False, "experts see mixtures of tokens"
        parts = self.granularity
        each = trial.weights.unflatten(-1, (-1, parts)).sum(-2) * self.factor(config)
        low, high = float(each.min()), float(each.max())
        if left := left_out(trial):
            return False, left
        # The weights are float32 and there are at most `num_experts` of them.
        if max(abs(low - 1), abs(high - 1)) > config.num_experts * torch.finfo(torch.float32).eps:
            chosen = (trial.weights > 0).unflatten(-1, (-1, parts))
            if bool((chosen.any(-1) != chosen.all(-1)).any()):
                return False, f"tokens take groups of {parts} experts in part"
            return False, f"the shards of a token count {low:.2f} ... {high:.2f} times, not once"
        if not self._exact(config):
            return False, (
                f"the published exponent changes what {config.activation} does; spread='exact' "
                f"does not"
            )
        return True, f"every token takes complete groups of {parts}, and each shard counts once"

    def factor(self, config: MoEConfig) -> float:
        """What the result of a shard is multiplied by.

        Raises:
            ValueError: it depends on the router's `k`, and the router has none.
        """
        if not isinstance(self.scaling, str):
            return float(self.scaling)
        if self.scaling == "none":
            return 1.0
        if self.scaling == "post-softmax" or (self.scaling == "auto" and sums_to_one(config)):
            return float(self.granularity)
        k = experts_per_token(config.router)
        if k is None:
            raise ValueError(
                f"the weights of router {config.router.name!r} do not sum to one, and it has no k "
                f"that would say how large they are; give VirtualGroups a number as scaling, or "
                f"'none'"
            )
        return config.num_experts * self.granularity / k

    def _scales(self, config: MoEConfig) -> dict[str, float]:
        """What each map is multiplied by, and the bias of a first map with it."""
        factor = self.factor(config)
        if self.spread == "published" or _degree(config) is not None:
            exponent = _published(config) if self.spread == "published" else _needed(config)
            return dict.fromkeys(("gate", "up", "down"), factor**exponent)
        if config.gated:
            return {"gate": 1.0, "up": math.sqrt(factor), "down": math.sqrt(factor)}
        return {"up": 1.0, "down": factor}

    def _exact(self, config: MoEConfig) -> bool:
        if self.spread == "exact" or self.factor(config) == 1:
            return True
        return _published(config) == _needed(config)


def _degree(config: MoEConfig) -> int | None:
    return HOMOGENEOUS.get(str(activations.canonical(config.activation)))


def _published(config: MoEConfig) -> float:
    """The exponent of the paper and of Megatron-LM, the same for every map."""
    return 1 / 3 if config.gated or _degree(config) == 2 else 1 / 2


def _needed(config: MoEConfig) -> float:
    """The exponent, the same for every map, by which experts are exactly so much larger.

    NaN, equal to no other, where none does that.
    """
    degree = _degree(config)
    return math.nan if degree is None else 1 / (degree + 1 + config.gated)


def sums_to_one(config: MoEConfig) -> bool:
    """Whether the combine weights of a token that some expert takes sum to one.

    Tried on a few random tokens with a router in float64; the random state is put back.
    """
    dim = 8
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        router = config.router.build(dim, config.num_experts).double().eval()
        routing = router(torch.randn(2, 16, dim, dtype=torch.float64))
    sparse = isinstance(routing, SparseRouting)
    weights: Tensor = routing.weights if sparse else routing.combine_weight.flatten(2)
    mass = weights.sum(-1)
    # Some routers make their weights in float32 whatever they are given.
    error = config.num_experts * torch.finfo(torch.float32).eps
    return bool(((mass - 1).abs() < error)[mass != 0].all())
