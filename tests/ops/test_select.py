"""Selection, against loops over Python numbers: ties, counts by group, masks, buffers."""

from random import Random

import pytest
import torch
from torch import Tensor

from moefold.ops import select
from moefold.ops.select import LONG, rank, top, within_capacity

# Few distinct values: almost every selection has to break a tie.
VALUES = (0.0, 0.25, 0.5, 1.0)


def tied_scores(random: Random, *shape: int) -> Tensor:
    """Scores drawn from four values."""
    size = int(torch.tensor(shape).prod())
    return torch.tensor([random.choice(VALUES) for _ in range(size)]).reshape(shape)


def best_first(row: list[float], valid: list[bool]) -> list[int]:
    """Indices of a row, largest value first, the lowest index first among equals."""
    return sorted((i for i in range(len(row)) if valid[i]), key=lambda i: (-row[i], i))


def slow_top(row: Tensor, count: int, valid: Tensor) -> Tensor:
    """`top` of one row by sorting Python numbers."""
    marked = torch.zeros_like(valid)
    marked[best_first(row.tolist(), valid.tolist())[:count]] = True
    return marked


def slow_within_capacity(wanted: Tensor, scores: Tensor, capacity: int, by_gate: bool) -> Tensor:
    """Buffers of one group, filled by one arrival after another: [members, experts]."""
    members, experts = wanted.shape
    choices = []
    for token in range(members):
        asked = wanted[token].tolist()
        choices.append(best_first(scores[token].tolist(), asked))
    order = list(range(members))
    if by_gate:
        gate = [max((float(scores[t, e]) for e in choices[t]), default=-1.0) for t in order]
        order.sort(key=lambda t: (-gate[t], t))
    filled = [0] * experts
    kept = torch.zeros_like(wanted)
    for place in range(experts):
        for token in order:
            if place < len(choices[token]):
                expert = choices[token][place]
                if filled[expert] < capacity:
                    filled[expert] += 1
                    kept[token, expert] = True
    return kept


# By hand


def test_top_by_hand():
    # Two of .2 .7 .7 .1: both .7; two of .5 .5 .5 .5: the first two.
    scores = torch.tensor([[0.2, 0.7, 0.7, 0.1], [0.5, 0.5, 0.5, 0.5]])
    assert top(scores, 2, 1).int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    # One of the first, three of the second.
    counts = torch.tensor([1, 3])
    assert top(scores, counts, 1).int().tolist() == [[0, 1, 0, 0], [1, 1, 1, 0]]
    # Without the larger ones; never more than there are.
    valid = torch.tensor([[True, False, False, True], [False, False, True, False]])
    assert top(scores, 3, 1, valid).int().tolist() == [[1, 0, 0, 1], [0, 0, 1, 0]]


def test_rank_by_hand():
    assert rank(torch.tensor([0.1, 0.9, 0.5, 0.9])).tolist() == [3, 0, 2, 1]


def test_first_choices_come_before_second_choices():
    # Two tokens, two experts, one row each; both want both.
    #
    #     token 0:  first expert 0 (.6), then expert 1 (.4)
    #     token 1:  first expert 1 (.9), then expert 0 (.1)
    #
    # First choices: 0 -> expert 0, 1 -> expert 1. Both buffers are full when second choices come.
    scores = torch.tensor([[[0.6, 0.4], [0.1, 0.9]]])
    wanted = torch.ones(1, 2, 2, dtype=torch.bool)
    for by_gate in (False, True):
        kept = within_capacity(wanted, scores, 1, 2, by_gate)
        assert kept.int().tolist() == [[[1, 0], [0, 1]]]


def test_room_by_order_and_by_gate():
    # Three tokens want expert 0, which has two rows; token 2 is the surest, token 0 the least sure.
    scores = torch.tensor([[[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]]])
    wanted = torch.tensor([[[1, 0], [1, 0], [1, 0]]], dtype=torch.bool)
    by_order = within_capacity(wanted, scores, 2, 1, False)
    assert by_order[0, :, 0].int().tolist() == [1, 1, 0]
    by_gate = within_capacity(wanted, scores, 2, 1, True)
    assert by_gate[0, :, 0].int().tolist() == [0, 1, 1]


def test_the_gate_is_that_of_the_first_choice():
    # One row each. Token 0's gate is .8 (expert 1), token 1's .7 (expert 0). In the second round
    # both want what is left of nothing; but with two rows of expert 0, token 0's second choice
    # (.2) finds room after token 1's first.
    scores = torch.tensor([[[0.2, 0.8], [0.7, 0.3]]])
    wanted = torch.tensor([[[1, 1], [1, 0]]], dtype=torch.bool)
    kept = within_capacity(wanted, scores, torch.tensor([2]), 2, True)
    assert kept.int().tolist() == [[[1, 1], [1, 0]]]
    kept = within_capacity(wanted, scores, torch.tensor([1]), 2, True)
    assert kept.int().tolist() == [[[0, 1], [1, 0]]]


# Against the loops


@pytest.mark.parametrize("dim", [1, 2], ids=["along members", "along experts"])
def test_top_is_the_loop(dim):
    random = Random(dim)
    for _ in range(60):
        groups, members, experts = (random.randint(1, high) for high in (3, 7, 5))
        scores = tied_scores(random, groups, members, experts)
        valid = torch.rand(scores.shape) < random.choice((0.3, 0.7, 1.0))
        size = scores.shape[dim]
        counts = torch.tensor([random.randint(0, size + 2) for _ in range(groups)])
        lines = (scores.transpose(dim, 2), valid.transpose(dim, 2))
        of_groups, of_all = top(scores, counts, dim, valid), top(scores, int(counts[0]), dim, valid)
        most = int(counts.max()) + random.randint(0, 2)
        assert torch.equal(top(scores, counts, dim, valid, most), of_groups)
        for g in range(groups):
            for row in range(lines[0].shape[1]):
                here = (lines[0][g, row], lines[1][g, row])
                expected = slow_top(here[0], int(counts[g]), here[1])
                assert torch.equal(of_groups.transpose(dim, 2)[g, row], expected)
                expected = slow_top(here[0], int(counts[0]), here[1])
                assert torch.equal(of_all.transpose(dim, 2)[g, row], expected)


def test_top_without_a_mask_is_top_with_everything_valid():
    scores = tied_scores(Random(0), 4, 6, 5)
    for count in (0, 1, 3, torch.tensor([0, 1, 4, 9])):
        for dim in (1, 2):
            everything = torch.ones_like(scores, dtype=torch.bool)
            assert torch.equal(top(scores, count, dim), top(scores, count, dim, everything))


def test_top_takes_infinite_scores_as_they_come():
    inf = float("inf")
    scores = torch.tensor([[1.0, inf, -inf, inf, 2.0]])
    assert top(scores, 3, 1).int().tolist() == [[0, 1, 0, 1, 1]]
    assert top(scores, 1, 1).int().tolist() == [[0, 1, 0, 0, 0]]
    assert top(scores, torch.tensor([5]), 1).int().tolist() == [[1, 1, 1, 1, 1]]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("dim", [1, 2])
def test_top_of_nothing_is_nothing(shape, dim):
    scores = torch.zeros(shape)
    for count in (2, torch.full(shape[:1], 2)):
        assert top(scores, count, dim).shape == shape
        assert not top(scores, count, dim).any()


def test_rank_is_the_loop():
    random = Random(3)
    for _ in range(40):
        row = tied_scores(random, random.randint(1, 9))
        order = best_first(row.tolist(), [True] * len(row))
        assert [order.index(i) for i in range(len(row))] == rank(row).tolist()


@pytest.mark.parametrize("by_gate", [False, True], ids=["order", "gate"])
def test_within_capacity_is_the_loop(by_gate):
    random = Random(int(by_gate))
    for _ in range(80):
        groups, members, experts = (random.randint(1, high) for high in (3, 8, 5))
        k = random.randint(1, experts)
        scores = tied_scores(random, groups, members, experts)
        real = (torch.rand(groups, members) < 0.8).unsqueeze(-1).expand_as(scores)
        wanted = top(scores, k, 2, real)
        rooms = torch.tensor([random.randint(0, members) for _ in range(groups)])
        kept = within_capacity(wanted, scores, rooms, k, by_gate)
        for g in range(groups):
            expected = slow_within_capacity(wanted[g], scores[g], int(rooms[g]), by_gate)
            assert torch.equal(kept[g], expected)
        alike = within_capacity(wanted, scores, int(rooms[0]), k, by_gate)
        assert torch.equal(alike[0], kept[0])


@pytest.mark.parametrize("by_gate", [False, True], ids=["order", "gate"])
def test_a_token_may_ask_for_fewer_than_the_others(by_gate):
    # Group-limited choice and masks leave some tokens with fewer choices, or none.
    random = Random(7)
    for _ in range(40):
        scores = tied_scores(random, 1, 6, 4)
        wanted = torch.rand(1, 6, 4) < 0.4
        kept = within_capacity(wanted, scores, 2, 4, by_gate)
        assert torch.equal(kept[0], slow_within_capacity(wanted[0], scores[0], 2, by_gate))


# Long rows, where another way is taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distinct", [4, 10**6])
def test_long_rows_agree_with_short_ones(dtype, distinct, monkeypatch):
    # The same rows by `torch.topk`, with few distinct values (all ties) and with many.
    torch.manual_seed(0)
    scores = torch.randint(distinct, (3, 2 * LONG)).to(dtype) / distinct
    valid = torch.rand(3, 2 * LONG) < 0.7
    counts = torch.tensor([0, 5, 2 * LONG])
    cases = [
        (1, None),
        (LONG, None),
        (2 * LONG, None),
        (77, valid),
        (counts, None),
        (counts, valid),
    ]
    fast = [top(scores, count, 1, mask) for count, mask in cases]
    monkeypatch.setattr(select, "_can_partition", lambda *_: False)
    monkeypatch.setattr(select, "mark", select.mark_in_order)
    for (count, mask), found in zip(cases, fast, strict=True):
        assert torch.equal(found, top(scores, count, 1, mask))


def test_long_rows_take_the_lowest_index_of_equals():
    marked = top(torch.zeros(1, LONG), 3, 1)
    assert marked.nonzero()[:, 1].tolist() == [0, 1, 2]
