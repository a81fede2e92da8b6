"""Gradients of experts' matrices and biases: sums over the rows of each expert.

    outer   out[e] = sum over the rows r of expert e of left[r] outer right[r]
    sums    out[e] = sum over the rows r of expert e of weight[r] * rows[r]

Either operand may be gathered from tokens while it is read. An expert without a row gets zeros.

Shapes: `rows left` and `rows right` (or `tokens left`, `tokens right`) give `experts left right`.
"""

# ruff: noqa: N803 - constants are written large in kernels
# pyright: reportCallIssue=false

from typing import no_type_check

import triton
from jaxtyping import Float, Int
from torch import Tensor
from triton import language as tl

from moefold.ops.triton.blocks import launch, of_weights
from moefold.ops.triton.pieces import dot, place, read

# Rows and columns that one program of `sums` adds up at a time.
SUMMED_ROWS, SUMMED_COLUMNS = 32, 128


def outer(
    left: Float[Tensor, "left_inputs left"],
    right: Float[Tensor, "right_inputs right"],
    token_of_row: Int[Tensor, " rows"] | None,
    row_bounds: Int[Tensor, " bounds"],
    out: Float[Tensor, "experts left right"],
    *,
    gather_left: bool = False,
    gather_right: bool = False,
) -> None:
    """Write `out`, summed in float32.

    Args:
        left: rows, or tokens if `gather_left`; any strides.
        right: rows, or tokens if `gather_right`; any strides.
        token_of_row: where rows are gathered from.
        row_bounds: where the rows of each expert are.
        out: written, contiguous.
        gather_left: whether `left` holds tokens.
        gather_right: whether `right` holds tokens.
    """
    blocks = of_weights(left)
    experts, high, broad = out.shape
    tiles, columns = triton.cdiv(high, blocks.rows), triton.cdiv(broad, blocks.columns)
    _outer[(tiles * columns, experts)](
        left,
        right,
        left if token_of_row is None else token_of_row,
        row_bounds,
        out,
        tiles,
        high,
        broad,
        *left.stride(),
        *right.stride(),
        GATHER_LEFT=gather_left,
        GATHER_RIGHT=gather_right,
        RAGGED=high % blocks.rows != 0,
        **launch(blocks, left),
    )


@triton.jit
@no_type_check
def _outer(
    left,
    right,
    token_of_row,
    row_bounds,
    out,
    tiles,
    high,
    broad,
    left_row,
    left_column,
    right_row,
    right_column,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    RAGGED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    columns = (broad + COLUMNS - 1) // COLUMNS
    tile, column = place(tl.program_id(0), tiles, columns, GROUP)
    expert = tl.program_id(1)
    down = tile * ROWS + tl.arange(0, ROWS)
    across = column * COLUMNS + tl.arange(0, COLUMNS)
    is_down, is_across = down < high, across < broad
    start = tl.load(row_bounds + expert)
    stop = tl.load(row_bounds + expert + 1)
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for first in range(start, stop, DEPTH):
        row = first + tl.arange(0, DEPTH)
        # Rows past the last one repeat it, and count zero times: `right` is zero there.
        real = row < stop
        row = tl.minimum(row, stop - 1).to(tl.int64)
        left_source, right_source = row, row
        if GATHER_LEFT:
            left_source = tl.load(token_of_row + row).to(tl.int64)
        if GATHER_RIGHT:
            right_source = tl.load(token_of_row + row).to(tl.int64)
        lefts = left + left_source[None, :] * left_row + down[:, None] * left_column
        a = read(lefts, is_down[:, None], RAGGED)
        b = tl.load(
            right + right_source[:, None] * right_row + across[None, :] * right_column,
            mask=real[:, None] & is_across[None, :],
            other=0.0,
        )
        total = dot(a, b, total, PRECISION)
    there = expert.to(tl.int64) * high * broad + down[:, None] * broad + across[None, :]
    value = total.to(out.dtype.element_ty)
    tl.store(out + there, value, mask=is_down[:, None] & is_across[None, :])


def sums(
    rows: Float[Tensor, "inputs width"],
    token_of_row: Int[Tensor, " rows"] | None,
    weight_of_row: Float[Tensor, " rows"] | None,
    row_bounds: Int[Tensor, " bounds"],
    out: Float[Tensor, "experts width"],
) -> None:
    """Write `out`, summed in float32.

    Args:
        rows: rows, or tokens if there is a `token_of_row`; any strides.
        token_of_row: where rows are gathered from.
        weight_of_row: 1 for every row if None.
        row_bounds: where the rows of each expert are.
        out: written, contiguous.
    """
    experts, width = out.shape
    _sums[(triton.cdiv(width, SUMMED_COLUMNS), experts)](
        rows,
        rows if token_of_row is None else token_of_row,
        rows if weight_of_row is None else weight_of_row,
        row_bounds,
        out,
        width,
        *rows.stride(),
        GATHER=token_of_row is not None,
        WEIGHTED=weight_of_row is not None,
        ROWS=SUMMED_ROWS,
        COLUMNS=SUMMED_COLUMNS,
        num_warps=4,
    )


@triton.jit
@no_type_check
def _sums(
    rows,
    token_of_row,
    weight_of_row,
    row_bounds,
    out,
    width,
    rows_row,
    rows_column,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert = tl.program_id(1)
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < width
    stop = tl.load(row_bounds + expert + 1)
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for first in range(tl.load(row_bounds + expert), stop, ROWS):
        row = first + tl.arange(0, ROWS)
        real = row < stop
        row = tl.minimum(row, stop - 1).to(tl.int64)
        source = row
        if GATHER:
            source = tl.load(token_of_row + row).to(tl.int64)
        block = rows + source[:, None] * rows_row + at[None, :] * rows_column
        values = tl.load(block, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            values = values * tl.load(weight_of_row + row)[:, None]
        total += values
    found = tl.sum(total, 0)
    there = out + expert.to(tl.int64) * width + at
    tl.store(there, found.to(out.dtype.element_ty), mask=inside)
