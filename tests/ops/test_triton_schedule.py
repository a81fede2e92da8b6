"""Schedules of kernels: every row is in one tile of its expert, and in the list of its token."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from moefold.ops.triton import blocks
from moefold.ops.triton.blocks import of_halves, of_rows, of_weights, precision_of
from moefold.ops.triton.schedule import Schedule, row_bounds, rows_of_tokens, schedule

ON_A_GPU = "meta"  # what no kernel runs on but is not the CPU either


def rows_of(tiles: Schedule, block: int) -> dict[int, list[int]]:
    """The rows of every expert as kernels find them, tile after tile."""
    found: dict[int, list[int]] = {}
    for tile, expert in enumerate(tiles.expert_of_tile.tolist()):
        if expert >= len(tiles.row_bounds) - 1:
            continue
        first, stop = tiles.row_bounds[expert : expert + 2].tolist()
        first += (tile - int(tiles.tile_bounds[expert])) * block
        assert first < stop, "a tile without a row"
        found.setdefault(expert, []).extend(range(first, min(first + block, stop)))
    return found


def test_the_drawing_in_the_docstring():
    tiles = schedule(torch.tensor([6, 0, 4]), 12, 4)
    assert tiles.row_bounds.tolist() == [0, 6, 6, 10, 12]
    assert tiles.tile_bounds.tolist() == [0, 2, 2, 3, 4]
    assert tiles.expert_of_tile.tolist() == [0, 0, 2, 3, 4, 4, 4]
    assert all(t.dtype == torch.int32 for t in tiles)


@pytest.mark.parametrize("block", [1, 4, 16])
def test_every_row_is_in_one_tile_of_its_expert(block):
    for _ in range(30):
        experts = int(torch.randint(1, 9, ()))
        counts = torch.randint(0, 20, (experts,)) * torch.randint(0, 2, (experts,))
        used = int(counts.sum())
        rows = used + int(torch.randint(0, 12, ()))
        starts = [0, *counts.cumsum(0).tolist(), rows]  # spare rows are those of one more expert
        wanted = {
            expert: list(range(start, stop))
            for expert, (start, stop) in enumerate(pairwise(starts))
            if start < stop
        }
        assert rows_of(schedule(counts, rows, block), block) == wanted


def test_there_are_enough_tiles_when_all_are_ragged():
    # one row more than a tile, for every expert and for the spare rows
    assert rows_of(schedule(torch.tensor([5] * 7), 40, 4), 4)[7] == [35, 36, 37, 38, 39]


def test_counts_of_too_many_rows_end_at_the_last():
    # A GPU cannot be asked without waiting; at least nothing else is read or written.
    assert row_bounds(torch.tensor([3, 9, 4]), 8).tolist() == [0, 3, 8, 8, 8]


def test_rows_of_tokens_by_hand():
    #  rows            expert 0 | 1 | 2 | spare      token 2 has no row
    token = torch.tensor([0, 3, 1, 0, 3, 0, 0])
    found = rows_of_tokens(token, torch.tensor([2, 2, 1]), 4)
    assert found.bounds.tolist() == [0, 2, 3, 3, 5]
    assert found.order[:5].tolist() == [0, 3, 2, 1, 4]
    assert found.order.dtype == found.bounds.dtype == torch.int32


def test_rows_of_tokens_are_those_that_have_the_token():
    token = torch.randint(0, 50, (400,))
    counts = torch.tensor([100, 0, 250])
    found = rows_of_tokens(token, counts, 60)
    for number in range(60):
        own = found.order[found.bounds[number] : found.bounds[number + 1]]
        assert own.tolist() == (token[:350] == number).nonzero().flatten().tolist()


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_do(rows):
    counts = torch.zeros(2, dtype=torch.int64)
    assert set(rows_of(schedule(counts, rows, 4), 4)) == ({2} if rows else set())
    assert rows_of_tokens(torch.zeros(rows).long(), counts, 5).bounds.tolist() == [0] * 6


# How large a tile is.


def like(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=ON_A_GPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_operands_fit_beside_a_multiprocessor(dtype):
    for rows in (1, 40, 700, 10**6):
        plain = of_rows(like(dtype), rows, 8)
        for b in (plain, of_halves(plain), of_weights(like(dtype))):
            assert min(b.rows, b.columns, b.depth) >= 16  # what the matrix units take
            assert all((n & (n - 1)) == 0 for n in (b.rows, b.columns, b.depth))
        # the second operand of a gated kernel has two halves, which is as much as of a plain one
        terms = plain.rows + plain.columns
        assert terms * plain.depth * dtype.itemsize * plain.stages <= 99 * 1024


def test_few_rows_for_each_expert_make_low_tiles():
    heights = [of_rows(like(torch.bfloat16), rows, 64).rows for rows in (8, 64, 2000, 4096, 10**5)]
    assert heights == [16, 16, 32, 64, 128]


def test_precision_follows_torch():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert precision_of(like(torch.float32)) == "tf32"
        assert precision_of(like(torch.bfloat16)) == "ieee"
        matmul.fp32_precision = "ieee"
        assert precision_of(like(torch.float32)) == "ieee"
    finally:
        matmul.fp32_precision = before
    assert precision_of(torch.empty(0)) == "interpreted"
    assert of_weights(torch.empty(0)).rows == blocks.INTERPRETED
