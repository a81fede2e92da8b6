"""What kernels share: the place of a program, and the product of its rows with a matrix.

Shapes: `rows terms` times `terms columns` in blocks of `depth` terms, summed as `rows columns` in
float32.
"""

# ruff: noqa: N803 - constants are written large in kernels

from collections.abc import Iterator
from contextlib import contextmanager
from typing import no_type_check

import torch
import triton
from torch import Tensor
from triton import language as tl


@triton.jit
@no_type_check
def place(
    program: tl.tensor, tiles: tl.tensor, columns: tl.tensor, GROUP: tl.constexpr
) -> tl.tuple:
    """Return the tile and the column of a program.

    Programs that run at the same time should read the same memory. So GROUP tiles go through all
    columns together: each block of a matrix serves them all, and they stay in the cache meanwhile.
    """
    group = program // (GROUP * columns)
    first = group * GROUP
    size = min(tiles - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % size, inside // size


@triton.jit
@no_type_check
def rows_of(
    tile: tl.tensor,
    expert: tl.tensor,
    row_bounds: tl.tensor,
    tile_bounds: tl.tensor,
    ROWS: tl.constexpr,
) -> tl.tuple:
    """Return the rows of a tile, and which of them exist.

    Those past the last row of the expert repeat it: what is computed for them is not stored, and
    no load needs a mask.
    """
    stop = tl.load(row_bounds + expert + 1)
    first = tl.load(row_bounds + expert) + (tile - tl.load(tile_bounds + expert)) * ROWS
    row = first + tl.arange(0, ROWS)
    return tl.minimum(row, stop - 1).to(tl.int64), row < stop


@triton.jit
@no_type_check
def read(pointers: tl.tensor, mask: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    """Load a block; what the mask leaves out is zero."""
    return tl.load(pointers, mask=mask, other=0.0) if MASKED else tl.load(pointers)


@triton.jit
@no_type_check
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Add a product of two blocks to a total."""
    if PRECISION == "interpreted":
        # It cannot multiply bfloat16. Products of those are exact in float32, as on a GPU.
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
@no_type_check
def product(
    left: tl.tensor,
    right: tl.tensor,
    beyond: tl.tensor,
    inside: tl.tensor,
    terms: tl.tensor,
    left_step: tl.tensor,
    right_step: tl.tensor,
    TWO: tl.constexpr,
    PRECISION: tl.constexpr,
    RAGGED_DEPTH: tl.constexpr,
    RAGGED_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tuple:
    """Return the product of rows and columns and, for gated experts, that with a second half.

    Args:
        left: where the first term of each row is.
        right: where the first term of each column is.
        beyond: how far beyond it that of the second half is.
        inside: which columns exist.
        terms: how many each has.
        left_step: from a term of a row to the next.
        right_step: from a term of a column to the next.
        TWO: whether there is a second half; without one, its product is zero.
        PRECISION: how blocks are multiplied.
        RAGGED_DEPTH: whether the last block of terms is not whole.
        RAGGED_COLUMNS: whether some columns may not exist.
        DEPTH: terms read at a time.
    """
    depth = tl.arange(0, DEPTH)
    lefts = left[:, None] + depth[None, :] * left_step
    rights = right[None, :] + depth[:, None] * right_step
    one = tl.full((left.shape[0], right.shape[0]), 0.0, tl.float32)
    two = tl.full((left.shape[0], right.shape[0]), 0.0, tl.float32)
    masked: tl.constexpr = RAGGED_DEPTH or RAGGED_COLUMNS
    for start in range(0, terms, DEPTH):
        within = depth < terms - start
        given = within[:, None] & inside[None, :]
        a = read(lefts, within[None, :], RAGGED_DEPTH)
        one = dot(a, read(rights, given, masked), one, PRECISION)
        if TWO:
            two = dot(a, read(rights + beyond, given, masked), two, PRECISION)
        lefts += DEPTH * left_step
        rights += DEPTH * right_step
    return one, two


@contextmanager
def on_device_of(like: Tensor) -> Iterator[None]:
    """Launch kernels where this tensor is, whatever the current device."""
    if like.device.type != "cuda":
        yield
        return
    with torch.cuda.device(like.device):
        yield
