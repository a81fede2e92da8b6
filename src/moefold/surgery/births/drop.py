"""Birth by dropping: every expert is the dense MLP with some of its neurons drawn anew.

Nakamura et al., *Drop-Upcycling*, ICLR 2025. A neuron is a row of the first map and the column of
the second one that it feeds:

    up    [width, dim]    x x x x      down  [dim, width]    x o x     o  of a dropped neuron
                          o o o o                            x o x
                          x x x x                            x o x

Shapes: `width dim` as above, for each expert.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from moefold.moe import MoE, MoEConfig
from moefold.routers.base import check_one_of
from moefold.surgery.births.base import AbstractBirth, stacked
from moefold.surgery.births.copies import equal_experts_keep, fill_with
from moefold.surgery.hosts import Site
from moefold.surgery.trial import Trial

INDICES = ("shared", "per-matrix")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DropUpcycle(AbstractBirth):
    """Every expert starts as the dense MLP; of each, other neurons are redrawn.

    What is redrawn in a matrix comes from a normal distribution with the mean and the standard
    deviation of what was there, taken over all that is dropped of this matrix. A bias of the first
    map belongs to a neuron and is treated as one more matrix, with the indices of its own map; the
    bias of the second map belongs to none and is copied.

    The released code finds them by a permutation; the neurons of an expert keep their order here,
    which is part of no function.

    Attributes:
        fraction: share of the neurons that is dropped, rounded to whole neurons; the
            authors use one half.
        indices: "shared": a neuron is dropped in all the matrices of an expert, as the method is
            described; "per-matrix": each matrix has indices of its own, as the released code draws
            them, so that more neurons lose a part: 75% of them for two matrices at one half, 87.5%
            for three.
        router_start: uniform of standard deviation `router_std`, as in the released code.
    """

    router_start: str = "uniform"
    fraction: float = 0.5
    indices: Literal["shared", "per-matrix"] = "shared"

    kind: ClassVar[str] = "drop-upcycle"

    def __post_init__(self) -> None:
        AbstractBirth.__post_init__(self)
        if not (isinstance(self.fraction, int | float) and 0 <= self.fraction <= 1):
            raise ValueError(
                f"fraction is {self.fraction!r}; it must be a share of the neurons, from 0 to 1"
            )
        check_one_of("indices", self.indices, INDICES)

    @torch.no_grad()
    def fill(self, moe: MoE, config: MoEConfig, site: Site) -> None:
        """Copies the MLP into every expert and drops."""
        assert site.mlp is not None
        stacks = stacked(moe)
        for name, stack in stacks.items():
            fill_with(stack, getattr(site.mlp, name))
        count = self._dropped(site.width)
        if not count:
            return
        for expert in range(moe.experts.num_experts):
            one = _draw(site.width, count, moe.experts.down_proj)
            for name in ("gate", "up", "down"):
                if name not in stacks:
                    continue
                if self.indices == "per-matrix":
                    one = _draw(site.width, count, moe.experts.down_proj)
                # The neurons come first in the first maps and their biases, last in the second map.
                _redraw(stacks[name][expert], one, 1 if name == "down" else 0)
                if name != "down" and f"{name}_bias" in stacks:
                    _redraw(stacks[f"{name}_bias"][expert], one, 0)

    def keeps(self, config: MoEConfig, trial: Trial) -> tuple[bool, str]:
        """It does where nothing is dropped, and copies do."""
        assert config.expert_width is not None, "`fit` says it"
        count = self._dropped(config.expert_width)
        if count:
            return False, f"{count} of {config.expert_width} neurons of every expert are redrawn"
        return equal_experts_keep(config, trial, "nothing is dropped of the copies")

    def _dropped(self, width: int) -> int:
        return round(self.fraction * width)


def _draw(width: int, count: int, like: Tensor) -> Tensor:
    return torch.randperm(width)[:count].to(like.device)


def _redraw(matrix: Tensor, indices: Tensor, dim: int) -> None:
    """Draws the given rows (dim 0) or columns (dim 1) anew, with their own mean and deviation."""
    old = matrix.index_select(dim, indices)
    std, mean = torch.std_mean(old, correction=0)  # a single bias has a deviation too: none
    matrix.index_copy_(dim, indices, torch.randn_like(old) * std + mean)
