"""What may be renamed or reordered: tokens, sequences, experts; and what ties are broken by."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moefold.routers import AbstractRouter, SoftRouter, SparseRouter
from moefold.routing import SoftRouting
from tests.routers.common import (
    DRAWN,
    EXPERTS,
    ROUNDING,
    VARIANTS,
    Batch,
    batch,
    build,
    exact,
    maps,
    pairs,
    route,
    variant_id,
)

Variant = tuple[str, dict[str, Any]]


def by_arrival(variant: Variant) -> bool:
    """Whether room is found in the order of the tokens."""
    name, settings = variant
    limited = name == "switch" or "capacity" in settings or "capacity_factor" in settings
    in_order = settings.get("priority", "order") == "order"
    return name in ("switch", "token-choice") and limited and in_order


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left.double(), right.double(), rtol=0, atol=ROUNDING)


TOKENS_ALIKE = [v for v in VARIANTS if v[0] not in DRAWN and not by_arrival(v)]
EXPERTS_ALIKE = [
    v for v in VARIANTS if v[0] not in DRAWN and v[0] != "hash" and "expert_groups" not in v[1]
]


@pytest.mark.parametrize("variant", TOKENS_ALIKE, ids=variant_id)
def test_tokens_may_be_reordered(variant):
    # The same order for all sequences, so that groups by position stay together.
    router, given = build(variant[0], **variant[1]), batch()
    assert given.mask is not None
    order = torch.randperm(7)
    moved = Batch(given.x[:, order], given.mask[:, order], given.ids[:, order])
    for left, right in zip(maps(route(router, given)), maps(route(router, moved)), strict=True):
        close(left[:, order], right)


@pytest.mark.parametrize("variant", TOKENS_ALIKE, ids=variant_id)
def test_sequences_may_be_reordered(variant):
    router, given = build(variant[0], **variant[1]), batch()
    order = torch.tensor([2, 0, 1])
    moved = given.only(order.tolist())
    for left, right in zip(maps(route(router, given)), maps(route(router, moved)), strict=True):
        close(left[order], right)


@pytest.mark.parametrize("settings", [{}, {"group": "batch"}], ids=["sequence", "batch"])
def test_the_exception_is_room_by_arrival(settings):
    # Four tokens want expert 0, which has one row in each group: the first one gets it, whoever
    # that is. (token-choice with capacity and priority="order", and switch, are left out above.)
    router = exact("token-choice", 2, k=1, capacity=1, **settings)
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[3.0, 0.0], [4.0, 0.0]]], dtype=torch.float64)
    first = {(0, 0, 0)} if settings else {(0, 0, 0), (1, 0, 0)}
    assert pairs(router(x).chosen) == first
    assert pairs(router(x.flip(0, 1)).chosen) == first


def renamed(router: AbstractRouter, order: Tensor) -> AbstractRouter:
    """A router whose expert `i` is expert `order[i]` of the other."""
    with torch.no_grad():
        if isinstance(router, SoftRouter):
            router.phi.copy_(router.phi[:, order])
        elif isinstance(router, SparseRouter):
            router.weight.copy_(router.weight[order])
            if router.state is not None and router.state.ndim:
                router.state.copy_(router.state[order])
    return router


@pytest.mark.parametrize("variant", EXPERTS_ALIKE, ids=variant_id)
def test_experts_may_be_renamed(variant):
    router, given = build(variant[0], **variant[1]), batch()
    if isinstance(router, SparseRouter) and router.state is not None and router.state.ndim:
        router.state.copy_(0.3 * torch.randn(EXPERTS))
    one = route(router, given)
    before = [value.clone() for value in maps(one)]
    order = torch.tensor([2, 0, 3, 1])
    two = route(renamed(router, order), given)
    assert isinstance(one, SoftRouting) == isinstance(two, SoftRouting)
    for left, right in zip(before, maps(two), strict=True):
        close(left[:, :, order], right)


# Ties: the lowest index first


EVEN = torch.zeros(2, 4, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("token-choice", {"k": 2}, {(t, e) for t in range(4) for e in (0, 1)}),
        ("mixtral", {"k": 1}, {(t, 0) for t in range(4)}),
        ("token-choice", {"k": 1, "capacity": 2}, {(0, 0), (1, 0)}),
        ("token-choice", {"k": 1, "capacity": 2, "priority": "gate"}, {(0, 0), (1, 0)}),
        ("bias-balanced", {"k": 2}, {(t, e) for t in range(4) for e in (0, 1)}),
        ("expert-choice", {"capacity": 2}, {(t, e) for t in (0, 1) for e in range(3)}),
        ("sinkhorn-token-choice", {"k": 1}, {(t, 0) for t in range(4)}),
        ("sinkhorn-expert-choice", {"capacity": 1}, {(0, e) for e in range(3)}),
        (
            "sparse-transport-expert-choice",
            {"capacity": 4},
            {(t, e) for t in range(4) for e in range(3)},
        ),
        ("unified", {"budget": 1.25}, {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}),
        ("unified", {"budget": 1.25, "min_experts": 1}, {(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)}),
        (
            "unified",
            {"budget": 1.25, "max_experts": 2},
            {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)},
        ),
        ("seq-topk", {"k": 1}, {(t, 0) for t in range(4)}),
        ("relu", {"k": 1}, set()),
        ("threshold", {}, set()),  # 1 / 3 is not above 1 / 3
    ],
    ids=str,
)
def test_ties_go_to_the_lowest_index(name, settings, expected):
    for sequence in exact(name, 3, **settings)(EVEN).chosen:
        assert pairs(sequence) == expected


def test_a_tie_in_the_batch_goes_to_the_first_sequence():
    # Six of eight tokens' pairs: 8 * 0.75 = 6 pairs, in flat order two tokens of sequence 0.
    routing = exact("unified", 3, budget=0.75, group="batch")(EVEN)
    assert pairs(routing.chosen) == {(0, t, e) for t in (0, 1) for e in range(3)}
