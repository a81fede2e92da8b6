"""Rows of one expert in one group, by the three conventions."""

from itertools import product

import pytest
import torch

from moefold.routers import Capacity
from moefold.routers.choice import TopTokens
from tests.routers.common import exact, pairs, untyped


@pytest.mark.parametrize(
    ("settings", "tokens", "k", "experts", "rows"),
    [
        # ceil(1.25 * 16 * 2 / 8) = ceil(5)
        ({"factor": 1.25}, 16, 2, 8, 5),
        # ceil(1.05 * 16 * 2 / 8) = ceil(4.2); rounded up to a multiple of 4 it is 8
        ({"factor": 1.05}, 16, 2, 8, 5),
        ({"factor": 1.05, "convention": "vmoe"}, 16, 2, 8, 8),
        # a multiple of 4 already: ceil(1.0 * 16 * 2 / 8) = 4
        ({"factor": 1.0, "convention": "vmoe"}, 16, 2, 8, 4),
        # without k: round(2.0 * 16 / 8) = 4, half of what k = 2 has above with a factor of 2
        ({"factor": 2.0, "convention": "flaxformer"}, 16, 2, 8, 4),
        ({"factor": 2.0}, 16, 2, 8, 8),
        # at least 4: round(1.0 * 16 / 8) = 2
        ({"factor": 1.0, "convention": "flaxformer"}, 16, 1, 8, 4),
        # halves to even, as Python rounds: 52 / 8 = 6.5 -> 6
        ({"factor": 1.0, "convention": "flaxformer"}, 52, 1, 8, 6),
        # and 60 / 8 = 7.5 -> 8
        ({"factor": 1.0, "convention": "flaxformer"}, 60, 1, 8, 8),
        # 1.1 * 10 is 11.000000000000002 in floating point: 11 rows, not 12
        ({"factor": 1.1}, 100, 1, 10, 11),
        ({"factor": 1.1}, 10, 1, 1, 10),
        # never more rows than tokens
        ({"factor": 4.0}, 6, 2, 4, 6),
        ({"factor": 1.0, "convention": "vmoe"}, 3, 1, 4, 3),
        ({"factor": 1.0, "convention": "flaxformer"}, 3, 1, 4, 3),
        ({"rows": 5}, 16, 2, 8, 5),
        ({"rows": 5}, 3, 2, 8, 3),
        # any need for a row gives one
        ({"factor": 0.01}, 2, 1, 8, 1),
        # no limit: every token finds room
        ({}, 7, 2, 8, 7),
        ({"factor": 1.25}, 0, 2, 8, 0),
        ({"factor": 1.25, "convention": "vmoe"}, 0, 2, 8, 0),
        ({"factor": 1.25, "convention": "flaxformer"}, 0, 2, 8, 0),
    ],
    ids=str,
)
def test_rows_by_hand(settings, tokens, k, experts, rows):
    capacity = Capacity(**settings)
    assert capacity.of(tokens, k, experts) == rows
    assert capacity.of_groups(torch.tensor([tokens]), k, experts).tolist() == [rows]


@pytest.mark.parametrize("convention", ["moefold", "vmoe", "flaxformer"])
def test_numbers_and_tensors_agree(convention):
    tokens = torch.arange(130)
    for factor, k, experts in product((0.3, 0.7, 1.0, 1.05, 1.1, 1.25, 2.0), (1, 2, 3), (3, 7, 8)):
        capacity = Capacity(factor=factor, convention=convention)
        one_by_one = [capacity.of(n, k, experts) for n in tokens.tolist()]
        assert capacity.of_groups(tokens, k, experts).tolist() == one_by_one
        assert one_by_one == sorted(one_by_one)  # more tokens never mean less room


def test_a_factor_of_one_is_enough_for_perfect_balance():
    for tokens, k, experts in product(range(1, 40), (1, 2), (2, 3, 5)):
        rows = Capacity(factor=1.0).of(tokens, k, experts)
        assert rows * experts >= tokens * min(k, experts)
        assert (rows - 1) * experts < tokens * k


# In a router


def test_padding_makes_no_room():
    # Six real tokens out of eight, two experts, top-1, factor 1: three rows, not four. All tokens
    # want expert 0; the first three real ones get it.
    router = exact("token-choice", 2, k=1, capacity_factor=1.0)
    x = torch.tensor([3.0, 0.0], dtype=torch.float64).expand(1, 8, 2)
    mask = torch.tensor([[True, False, True, True, True, False, True, True]])
    assert pairs(router(x, mask).chosen[0]) == {(0, 0), (2, 0), (3, 0)}
    assert pairs(router(x).chosen[0]) == {(0, 0), (1, 0), (2, 0), (3, 0)}


def test_every_group_has_room_of_its_own():
    # Factor 1 with two experts: 2 rows for the 3 real tokens of sequence 0 (ceil 1.5), 1 row for
    # the 2 of sequence 1. As one group of five they have 3 rows.
    x = torch.tensor([3.0, 0.0], dtype=torch.float64).expand(2, 3, 2)
    mask = torch.tensor([[True, True, True], [False, True, True]])
    by_sequence = exact("token-choice", 2, k=1, capacity_factor=1.0)(x, mask)
    assert pairs(by_sequence.chosen) == {(0, 0, 0), (0, 1, 0), (1, 1, 0)}
    by_batch = exact("token-choice", 2, k=1, capacity_factor=1.0, group="batch")(x, mask)
    assert pairs(by_batch.chosen) == {(0, 0, 0), (0, 1, 0), (0, 2, 0)}


def test_what_was_asked_for_is_kept_where_capacity_turns_away():
    router = exact("token-choice", 2, k=1, capacity=1)
    routing = router(torch.tensor([[[3.0, 0.0], [2.0, 0.0], [0.0, 1.0]]], dtype=torch.float64))
    assert pairs(routing.chosen[0]) == {(0, 0), (2, 1)}
    assert pairs(routing.wanted[0]) == {(0, 0), (1, 0), (2, 1)}


def test_first_choices_come_first_in_a_router():
    # One row for each of two experts, top-2. Token 0 prefers expert 0, token 1 expert 1: each gets
    # its first choice, though token 0's second choice comes earlier in the sequence.
    router = exact("token-choice", 2, k=2, capacity=1)
    routing = router(torch.tensor([[[1.0, 0.5], [0.0, 3.0]]], dtype=torch.float64))
    assert pairs(routing.chosen[0]) == {(0, 0), (1, 1)}


def test_the_surest_token_finds_room_first():
    # Three tokens for one row of expert 0; sigmoid-like odds grow with the index.
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]], dtype=torch.float64)
    by_order = exact("token-choice", 2, k=1, capacity=1)(x)
    assert pairs(by_order.chosen[0]) == {(0, 0)}
    by_gate = exact("token-choice", 2, k=1, capacity=1, priority="gate")(x)
    assert pairs(by_gate.chosen[0]) == {(2, 0)}


def test_every_expert_fills_its_capacity_where_experts_choose():
    # Factor 2 of 6 tokens over 4 experts: 3 rows each.
    routing = exact("expert-choice", 4)(torch.randn(2, 6, 4, dtype=torch.float64))
    assert routing.chosen.sum(1).tolist() == [[3, 3, 3, 3]] * 2


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, "capacity is 0; it must be a positive whole number"),
        ({"rows": -3}, "capacity is -3; it must be a positive whole number"),
        ({"rows": 2.5}, "capacity is 2.5; it must be a positive whole number"),
        ({"factor": 0.0}, "capacity_factor is 0.0; it must be a positive finite number"),
        ({"factor": -1.0}, "capacity_factor is -1.0; it must be a positive finite number"),
        ({"factor": float("inf")}, "capacity_factor is inf; it must be a positive finite number"),
        ({"factor": float("nan")}, "capacity_factor is nan; it must be a positive finite number"),
        ({"rows": 4, "factor": 1.5}, "capacity is 4 and capacity_factor is 1.5; give one of them"),
        (
            {"factor": 1.0, "convention": "gshard"},
            "convention is 'gshard'; allowed: 'moefold', 'vmoe', 'flaxformer'",
        ),
    ],
    ids=str,
)
def test_a_capacity_that_is_none_is_refused(settings, message):
    with untyped(), pytest.raises(ValueError, match=message):
        Capacity(**settings)


def test_experts_that_choose_need_a_capacity():
    unlimited = Capacity()
    with pytest.raises(ValueError, match="capacity and capacity_factor are both None"):
        TopTokens(capacity=unlimited)
