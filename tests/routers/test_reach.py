"""How far routers look: what they say, against what changing one token does to the others."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moefold.routers import AbstractRouter
from tests.routers.common import DIM, DRAWN, VARIANTS, Batch, batch, build, maps, route, variant_id

SEQUENCES, TOKENS = 2, 5

Variant = tuple[str, dict[str, Any]]

COMPARABLE: list[Variant] = [
    *(variant for variant in VARIANTS if variant[0] not in DRAWN),
    ("expert-choice", {"group": 2}),  # the third of five groups holds a token of each sequence
]


def flat_maps(router: AbstractRouter, given: Batch) -> Tensor:
    """Everything about the routing of each token, one row for each."""
    parts = [part.double().flatten(0, 1).flatten(1) for part in maps(route(router, given))]
    return torch.cat(parts, 1)


def changes(router: AbstractRouter) -> Tensor:
    """Whether token s (row) can change the routing of token t (column).

    In some draw, by holding something else or by not being there. A token changes itself as it
    likes.
    """
    flat = SEQUENCES * TOKENS
    changed = torch.zeros(flat, flat, dtype=torch.bool)
    for _ in range(3):
        given = batch(SEQUENCES, TOKENS, padded=False)
        before = flat_maps(router, given)
        for source in range(flat):
            x, mask = given.x.clone(), torch.ones(SEQUENCES, TOKENS, dtype=torch.bool)
            x.view(-1, DIM)[source] = 3 * torch.randn(DIM, dtype=torch.float64)
            mask.view(-1)[source] = False
            for other in (Batch(x, None, given.ids), Batch(given.x, mask, given.ids)):
                # Far above rounding (1e-16), far below any change of a weight that is one.
                differs = (before - flat_maps(router, other)).abs() > 1e-9
                changed[source] |= differs.any(1)
    return changed.fill_diagonal_(False)


def a_prefix_differs(router: AbstractRouter) -> bool:
    """Whether tokens are routed otherwise when those behind them are not there at all."""
    given = batch(SEQUENCES, TOKENS, padded=False)
    whole = flat_maps(router, given).unflatten(0, (SEQUENCES, TOKENS))
    for length in range(1, TOKENS):
        part = Batch(given.x[:, :length], None, given.ids[:, :length])
        alone = flat_maps(router, part).unflatten(0, (SEQUENCES, length))
        if ((alone - whole[:, :length]).abs() > 1e-9).any():
            return True
    return False


@pytest.mark.parametrize("variant", COMPARABLE, ids=variant_id)
def test_a_router_looks_exactly_as_far_as_it_says(variant):
    name, settings = variant
    router = build(name, **settings)
    seen = changes(router)
    flat = torch.arange(SEQUENCES * TOKENS)
    sequence, position = flat // TOKENS, flat % TOKENS
    own = sequence[:, None] == sequence[None, :]
    later = own & (position[:, None] > position[None, :])  # the source comes later

    if router.reach == "token":
        assert not seen.any()
    if router.reach == "past":
        assert (seen & own & ~later).any()
        assert not (seen & ~own).any()
    if router.reach == "group":
        assert not (seen & ~own).any()
    if router.reach == "batch":
        assert (seen & ~own).any()
    # What a causal host asks: no later token of the own sequence.
    assert router.is_causal == (not (seen & later).any() and not a_prefix_differs(router))
    # Groups do not see each other.
    of_token = {"sequence": sequence, "batch": flat * 0, "position": position, 2: flat // 2}
    group = of_token[router.group]
    assert not (seen & (group[:, None] != group[None, :])).any()


def test_more_than_one_choice_by_arrival_is_not_the_past():
    # Second choices come after all first choices, so token 1's first choice takes the row that
    # token 0 wants as its second: an earlier token depends on a later one.
    assert build("token-choice", k=1, capacity=2).reach == "past"
    assert build("token-choice", k=2, capacity=2).reach == "group"
    assert build("token-choice", k=1, capacity=2, priority="gate").reach == "group"
    # A factor of the number of tokens depends on how many will come.
    assert build("token-choice", k=1, capacity_factor=1.0).reach == "group"
    assert build("token-choice", k=1, capacity=2, group="batch").reach == "batch"


def test_base_looks_at_the_group_in_training_only():
    router = build("base")
    assert changes(router.train()).any()
    assert not changes(router.eval()).any()
