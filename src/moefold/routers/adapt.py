"""What a router learns without gradient: a bias, a threshold, the strength of a penalty.

Each rule owns one tensor, the router's `state` (a buffer, float32 or better). The forward pass only
reads it. `update` computes the next one from the routings of an optimiser step; it is a function
and changes nothing itself.

Shapes: a state is ` experts` or a scalar; routings are those of `batch tokens` each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from moefold.routers.base import check_one_of, check_positive
from moefold.routing import SparseRouting

# An L1 penalty outside of these is none at all, or all there is; it must find its way back.
_WEAKEST, _STRONGEST = 1e-12, 1e4


@runtime_checkable
class Adapt(Protocol):
    """A rule by which a router's state follows its routings."""

    def initial(self, num_experts: int) -> Tensor:
        """State before any update."""
        ...

    def update(self, state: Tensor, routings: Sequence[SparseRouting]) -> Tensor:
        """State after one step that made these routings."""
        ...

    def shift(self, scores: Tensor, state: Tensor) -> Tensor:
        """Scores to choose by. Weights are made of the unshifted ones."""
        ...

    def l1_strength(self, state: Tensor) -> Tensor | None:
        """How strongly the router asks to be sparse, for the `l1` loss; None if it does not."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasBalance:
    """A bias on each expert's score that grows while the expert has too little to do.

    After a step, `b += rate * sign(mean load - load)`, or `rate * (mean load - load) / mean load`
    under the `error` rule. It lags by a step, so it sees no token of the batch it acts on, and it
    never enters the output.

    Source: Wang et al., *Auxiliary-Loss-Free Load Balancing Strategy for MoE*, 2024, algorithm 1.
    """

    rate: float = 1e-3
    rule: Literal["sign", "error"] = "sign"

    def __post_init__(self) -> None:
        check_positive("rate", self.rate, integer=False)
        check_one_of("rule", self.rule, ("sign", "error"))

    def initial(self, num_experts: int) -> Tensor:
        return torch.zeros(num_experts)

    def update(self, state: Tensor, routings: Sequence[SparseRouting]) -> Tensor:
        load = torch.stack([r.rows_per_expert for r in routings]).sum(0).to(state)
        short = load.mean() - load
        if self.rule == "sign":
            return state + self.rate * short.sign()
        return state + self.rate * short / torch.where(load.mean() > 0, load.mean(), 1.0)

    def shift(self, scores: Tensor, state: Tensor) -> Tensor:
        return scores + state.to(scores.dtype)

    def l1_strength(self, state: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningThreshold:
    """One threshold for all pairs that follows the budget: `t <- m * t + (1 - m) * t_batch`.

    `t_batch` lies between the last pair that the budget would take from the batch and the first it
    would not. A pair is chosen by itself, from a threshold learnt on earlier batches: causal.

    Source: the inference rule of Yuan et al., *Expert Race*, 2025, used in training as well.
    """

    budget: float = 2.0
    momentum: float = 0.99

    def __post_init__(self) -> None:
        check_positive("budget", self.budget, integer=False)
        if not isinstance(self.momentum, int | float) or not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum!r}; it must lie in [0, 1).")

    def initial(self, num_experts: int) -> Tensor:
        # The score of an undecided router, under a softmax and under the unified score alike.
        return torch.tensor(1.0 / num_experts)

    def update(self, state: Tensor, routings: Sequence[SparseRouting]) -> Tensor:
        scores = torch.cat([real_scores(r).reshape(-1) for r in routings])
        tokens = sum(real_scores(r).shape[0] for r in routings)
        count = min(math.floor(self.budget * tokens + 0.5), scores.numel())  # as TopPairs does
        if count == 0:
            return state
        ordered = scores.sort(descending=True).values
        last = ordered[count - 1 : count + 1].mean().to(state)
        return self.momentum * state + (1 - self.momentum) * last

    def shift(self, scores: Tensor, state: Tensor) -> Tensor:
        return scores - state.to(scores.dtype)

    def l1_strength(self, state: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveL1:
    """An L1 penalty that grows while tokens take more than `k` experts, and shrinks otherwise.

    `strength *= factor` if the share of inactive pairs is below `1 - k / E`, else `/= factor`.

    Source: Wang et al., *ReMoE*, 2024, section 3.3 and its released code (1e-8 and 1.2).
    """

    k: int = 2
    start: float = 1e-8
    factor: float = 1.2

    def __post_init__(self) -> None:
        check_positive("k", self.k)
        check_positive("start", self.start, integer=False)
        check_positive("factor", self.factor, integer=False)
        if self.factor <= 1:
            raise ValueError(f"factor is {self.factor!r}; it must be larger than 1.")

    def initial(self, num_experts: int) -> Tensor:
        return torch.tensor(self.start)

    def update(self, state: Tensor, routings: Sequence[SparseRouting]) -> Tensor:
        active = torch.stack([r.rows_per_expert.sum() for r in routings]).sum()
        tokens = sum(real_scores(r).shape[0] for r in routings)
        if tokens == 0:
            return state
        too_dense = active > self.k * tokens
        moved = torch.where(too_dense, state * self.factor, state / self.factor)
        return moved.clamp(_WEAKEST, _STRONGEST)

    def shift(self, scores: Tensor, state: Tensor) -> Tensor:
        return scores

    def l1_strength(self, state: Tensor) -> Tensor | None:
        return state / self.k


def real_scores(routing: SparseRouting) -> Tensor:
    """Scores of the real tokens, `[real tokens, experts]`, without gradient."""
    if routing.scores is None:
        raise ValueError("this routing carries no scores; adaptive routers need them.")
    scores = routing.scores.detach()
    return scores.flatten(0, 1) if routing.mask is None else scores[routing.mask]
