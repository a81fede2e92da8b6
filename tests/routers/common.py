"""What the tests of routers share: every registered router, small batches, and their routings.

Letters: batch B, tokens T, dim, experts E. Everything is float64 unless a test is about a dtype.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jaxtyping
import torch
from torch import Tensor, nn

from moefold import routers
from moefold.routers import AbstractRouter, SparseRouter
from moefold.routing import SoftRouting, SparseRouting

NAMES = tuple(routers.names())
DRAWN = ("random",)  # every pass draws anew: nothing can be compared between two passes
SPARSE = tuple(name for name in NAMES if name not in ("soft",))
LEARNT = tuple(name for name in SPARSE if name not in ("hash", "random"))
DIM, EXPERTS = 6, 4

# Every router as it comes (without what is drawn anew in each pass), and other ways to compete.
UNDRAWN = {"switch": {"jitter": 0.0}, "compete": {"rate": 0.0}}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, UNDRAWN.get(name, {})) for name in NAMES),
    ("token-choice", {"renormalize": True, "k": 3}),
    ("unified", {"capacity": 2}),
    ("unified", {"budget": 1.5, "capacity_factor": 1.0, "group": "batch"}),
    ("unified", {"capacity_factor": 1.0, "max_experts": 3}),
    ("unified", {"capacity": 2, "min_experts": 1, "max_experts": 3}),
    ("custom", {"score": "softmax", "choice": "top-pairs", "capacity": 2}),
    ("token-choice", {"k": 1, "capacity": 1}),
    ("token-choice", {"capacity": 1}),
    ("token-choice", {"capacity_factor": 0.7}),
    ("token-choice", {"capacity_factor": 0.7, "priority": "gate"}),
    ("token-choice", {"capacity_factor": 0.7, "group": "batch"}),
    ("token-choice", {"capacity_factor": 0.7, "group": "batch", "priority": "gate"}),
    ("token-choice", {"capacity_factor": 0.7, "group": "position"}),
    ("token-choice", {"capacity_factor": 0.5, "convention": "vmoe", "group": "batch"}),
    ("token-choice", {"capacity_factor": 0.5, "convention": "flaxformer", "group": "batch"}),
    ("sinkhorn-token-choice", {"group": "batch", "renormalize": True}),
    ("sinkhorn-token-choice", {"capacity_factor": 0.7, "priority": "gate"}),
    ("sinkhorn-token-choice", {"group": "position"}),
    ("expert-choice", {"group": "batch", "capacity_factor": 1.0, "renormalize": True}),
    ("expert-choice", {"group": "position", "capacity_factor": 1.0}),
    ("expert-choice", {"capacity": 2}),
    ("expert-choice", {"capacity_factor": 0.5, "convention": "vmoe", "group": "batch"}),
    ("sinkhorn-expert-choice", {"group": "batch"}),
    ("sparse-transport-expert-choice", {"group": "batch", "capacity_factor": 1.0}),
    ("soft", {"slots": 3}),
    ("soft", {"group": "batch"}),
    ("soft", {"group": "position", "slots": 2}),
    ("unified", {"budget": 1.5, "group": "batch"}),
    ("unified", {"budget": 0.75, "group": "position", "combine": "row-normalized"}),
    ("unified", {"expert_score": "token-softmax", "combine": "renormalized"}),
    ("unified", {"alpha": 1.0, "budget": 1.25, "min_experts": 1, "max_experts": 2}),
    ("seq-topk", {"k": 2, "renormalize": True}),
    ("bias-balanced", {"expert_groups": 2, "renormalize": False}),
    ("hash", {"k": 2}),
    ("base", {"group": "batch"}),
    ("custom", {"score": "sigmoid", "choice": "above", "threshold": 0.4}),
    ("custom", {"score": "unified", "expert_score": "token-softmax", "k": 1}),
    ("custom", {"score": "sinkhorn", "choice": "top-pairs", "weight": "softmax"}),
]


def variant_id(variant: tuple[str, dict[str, Any]]) -> str:
    """`token-choice k=1 capacity=1`."""
    name, settings = variant
    return " ".join([name, *(f"{key}={value}" for key, value in settings.items())])


# What differs between two float64 routings of the same tokens is the order of summation: a few
# times 1e-16. Adam inside sparse transport divides rounding by an epsilon of 1e-8 (its plan only
# chooses; weights are a softmax).
ROUNDING = 1e-12


@contextmanager
def untyped() -> Iterator[None]:
    """Call as users do, without the typing hook: it would refuse a wrong rank or dtype first."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@dataclass(frozen=True)
class Batch:
    """What a router is given: x [B, T, dim], mask [B, T] or None, ids [B, T]."""

    x: Tensor
    mask: Tensor | None
    ids: Tensor

    def only(self, sequences: list[int]) -> "Batch":
        """Some of the sequences."""
        mask = None if self.mask is None else self.mask[sequences]
        return Batch(self.x[sequences], mask, self.ids[sequences])

    def with_x(self, x: Tensor) -> "Batch":
        """The same batch with other tokens."""
        return replace(self, x=x)


def batch(
    sequences: int = 3, tokens: int = 7, *, padded: bool = True, dtype: torch.dtype = torch.float64
) -> Batch:
    """Random tokens; if padded, some are missing at the end, at the start and in between."""
    x = torch.randn(sequences, tokens, DIM, dtype=dtype)
    ids = torch.randint(0, 1000, (sequences, tokens))
    if not padded:
        return Batch(x, None, ids)
    mask = torch.ones(sequences, tokens, dtype=torch.bool)
    mask[0, -2:] = False
    mask[1 % sequences, 0] = False
    mask[2 % sequences, tokens // 2] = False
    return Batch(x, mask, ids)


def build(name: str, *, experts: int = EXPERTS, dim: int = DIM, **settings: Any) -> AbstractRouter:
    """A router in float64, its logits spread enough for tokens to differ."""
    router = routers.build(name, dim=dim, num_experts=experts, **settings).double()
    if name == "relu":  # adaptation has barely begun: an L1 that counts shows mistakes
        state_of(router).fill_(0.5)
    return router


def exact(name: str, experts: int, **settings: Any) -> SparseRouter:
    """A sparse router whose logits are its tokens: its weight is the identity, dim = experts."""
    router = build(name, experts=experts, dim=experts, **settings)
    assert isinstance(router, SparseRouter)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
    return router


def state_of(router: nn.Module) -> Tensor:
    """What the router adapts."""
    assert isinstance(router, SparseRouter)
    assert router.state is not None
    return router.state


def route(router: AbstractRouter, given: Batch) -> SparseRouting | SoftRouting:
    return router(given.x, given.mask, given.ids)


def maps(routing: SparseRouting | SoftRouting) -> tuple[Tensor, Tensor]:
    """Who is in which row of whom, [B, T, E, rows of each expert in each group], and what returns.

    For a sparse routing: the chosen pairs and their weights, [B, T, E].
    """
    if isinstance(routing, SparseRouting):
        return routing.chosen, routing.weights
    merge = routing.grouping.merge
    return merge(routing.dispatch_weight), merge(routing.combine_weight)


def output(router: AbstractRouter, given: Batch) -> Tensor:
    """The layer's output with experts that are a fixed nonlinear function of their number."""
    routing = route(router, given)
    rows = routing.dispatch(given.x)
    own = (routing.expert_of_row.to(rows.dtype) + 1).unsqueeze(1)
    return routing.combine(torch.tanh(rows * own) + 0.1 * own)


def shifted(given: Batch, *, left: int, right: int, junk: float) -> Batch:
    """The same real tokens with more padding around them, which holds junk."""
    size = (given.x.shape[0], left + given.x.shape[1] + right)
    inside = slice(left, left + given.x.shape[1])
    x = torch.full((*size, given.x.shape[2]), junk, dtype=given.x.dtype)
    mask, ids = torch.zeros(size, dtype=torch.bool), torch.full(size, 999)
    x[:, inside] = given.x
    mask[:, inside] = True if given.mask is None else given.mask
    ids[:, inside] = given.ids
    return Batch(x, mask, ids)


def pairs(chosen: Tensor) -> set[tuple[int, ...]]:
    """The indices of what is True: (token, expert) or (sequence, token, expert)."""
    return {tuple(index) for index in chosen.nonzero().tolist()}
