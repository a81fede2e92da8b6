"""Birth by splitting: the dense MLP is cut into experts, each with a share of its neurons.

    MLP(x) = sum over its neurons  =  part_1(x) + ... + part_n(x) + b

Zhu et al., *LLaMA-MoE*, 2024; clusters of equal size as in Zhang et al., *MoEfication*, 2022.

Shapes: `width dim` is the first map; an expert gets `width / experts` of its rows.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefold.moe import MoE, MoEConfig
from moefold.routers.base import check_one_of, check_positive
from moefold.surgery.births.base import (
    AbstractBirth,
    divided,
    experts_per_token,
    refuse_width,
    stacked,
    with_geometry,
)
from moefold.surgery.hosts import Site
from moefold.surgery.trial import Trial

METHODS = ("random", "clustered")

_ROUNDS = 30
"""Most rounds of k-means; it settles after about ten."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Split(AbstractBirth):
    """The neurons of the dense MLP are dealt to the experts: no weight is copied twice.

    Expert i computes `scale * (part_i(x) + b / experts)`, where `part_i` is what its neurons
    contribute and `b` the bias of the second map, so that all experts together, each with weight
    `1 / scale`, are the dense MLP. With fewer experts the function is another, and needs training.

    Attributes:
        method: "random": a random permutation, cut; "clustered": balanced k-means over the rows of
            the map that is activated, the gate where there is one, so that neurons that answer to
            the same tokens share an expert. It starts the same way every time.
        scale: multiplies the second map and its bias. True: `num_experts / k`, with the router's
            `k` or `budget`, which LLaMA-MoE applies to the output; for combine weights of one that
            makes up for the neurons left out, while those that sum to one leave `1 / k` of it.
            False: 1. A number: that.
    """

    method: Literal["random", "clustered"] = "random"
    scale: bool | float = True

    kind: ClassVar[str] = "split"

    def __post_init__(self) -> None:
        AbstractBirth.__post_init__(self)
        check_one_of("method", self.method, METHODS)
        if not isinstance(self.scale, bool):
            check_positive("scale", self.scale, integer=False)

    def fit(self, config: MoEConfig, site: Site) -> MoEConfig:
        """Experts as wide as a part.

        Raises:
            ValueError: the width does not divide, another one is asked for, or the scale is not
                known for this router.
        """
        width = divided(site, config.num_experts, f"num_experts={config.num_experts}")
        refuse_width(config, site, width, config.num_experts)
        self._factor(config)
        return with_geometry(config, site, width)

    @torch.no_grad()
    def fill(self, moe: MoE, config: MoEConfig, site: Site) -> None:
        """Deals the neurons."""
        assert site.mlp is not None
        mlp, experts, factor = site.mlp, config.num_experts, self._factor(config)
        parts = self.parts(mlp.up if mlp.gate is None else mlp.gate, experts)
        for name, stack in stacked(moe).items():
            weight = getattr(mlp, name)
            if weight is None:
                stack.zero_()
            elif name == "down":
                stack.copy_(weight[:, parts].transpose(0, 1) * factor)
            elif name == "down_bias":
                stack.copy_((weight * (factor / experts)).expand_as(stack))
            else:
                stack.copy_(weight[parts])

    def keeps(self, config: MoEConfig, trial: Trial) -> tuple[bool, str]:
        """It does where every token takes all experts, each with weight `1 / scale`."""
        if trial.weights is None:
            return False, "experts see mixtures of tokens"
        scaled = trial.weights * self._factor(config)
        low, high = float(scaled.min()), float(scaled.max())
        if low == 0:
            return False, f"a token takes {trial.rows:.2f} of the {config.num_experts} parts"
        # The weights are float32, and each may be a quotient of a sum over the experts.
        if max(abs(low - 1), abs(high - 1)) > config.num_experts * torch.finfo(torch.float32).eps:
            return False, f"the parts count {low:.2f} ... {high:.2f} times, not once"
        return True, "every token takes all parts of the MLP, and each counts once"

    def parts(
        self, rows: Float[Tensor, "width dim"], experts: int
    ) -> Int[Tensor, "experts neurons"]:
        """Which neurons go to which expert.

        Args:
            rows: the map that is activated.
            experts: how many.
        """
        if self.method == "clustered" and not rows.is_meta:
            return balanced_clusters(rows.detach(), experts)
        order = torch.randperm(rows.shape[0], device="cpu").reshape(experts, -1)
        return order.sort(1).values.to(rows.device)

    def _factor(self, config: MoEConfig) -> float:
        if self.scale is False:
            return 1.0
        if self.scale is not True:
            return float(self.scale)
        k = experts_per_token(config.router)
        if k is None:
            raise ValueError(
                f"scale=True is num_experts / k, and router {config.router.name!r} has no k; say "
                f"Split(scale=...) with a number, or False for none"
            )
        return config.num_experts / k


def balanced_clusters(
    rows: Float[Tensor, "width dim"], clusters: int
) -> Int[Tensor, "clusters members"]:
    """Clusters of equal size by k-means, the indices of each in order.

    Rows are assigned in rounds: every free row asks for the nearest cluster with room, which takes
    those nearest to it. The centres start as k-means++ chooses them (Arthur and Vassilvitskii,
    2007), from a fixed seed; the best of all rounds is returned.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    centres = _first_centres(rows, clusters)
    best, least = None, float("inf")
    for _ in range(_ROUNDS):
        distances = torch.cdist(rows, centres).square()
        of_row = _assign(distances)
        total = float(distances.gather(1, of_row.unsqueeze(1)).sum())
        if best is not None and total >= least:
            break
        best, least = of_row, total
        members = of_row.argsort(stable=True).reshape(clusters, -1)
        centres = rows[members].mean(1)
    assert best is not None
    return best.argsort(stable=True).reshape(clusters, -1)


def _first_centres(rows: Tensor, clusters: int) -> Tensor:
    """Rows that are far from each other, drawn by the square of that distance."""
    generator = torch.Generator().manual_seed(0)
    chosen = [int(torch.randint(rows.shape[0], (1,), generator=generator))]
    nearest = torch.cdist(rows, rows[chosen]).square().squeeze(1)
    while len(chosen) < clusters:
        # Rows that are all alike have no distance to be drawn by.
        odds = nearest.cpu() + torch.finfo(torch.float32).tiny
        chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
        new = torch.cdist(rows, rows[chosen[-1:]]).square().squeeze(1)
        nearest = torch.minimum(nearest, new)
    return rows[chosen]


def _assign(distances: Float[Tensor, "width clusters"]) -> Int[Tensor, " width"]:
    """A cluster for every row, as many rows for each cluster; one fills in every round."""
    width, clusters = distances.shape
    of_row = torch.full((width,), -1, device=distances.device)
    room = torch.full((clusters,), width // clusters, device=distances.device)
    while bool((of_row < 0).any()):
        wish = distances.masked_fill(room == 0, torch.inf).argmin(1)
        for cluster in range(clusters):
            asking = torch.nonzero((of_row < 0) & (wish == cluster)).squeeze(1)
            nearest = distances[asking, cluster].argsort(stable=True)[: int(room[cluster])]
            of_row[asking[nearest]] = cluster
            room[cluster] -= len(nearest)
    return of_row
