"""A product per row: every row times the matrix of its expert.

    out[r] = matrices[e] @ rows[r] + bias[e]

Used for the second product of experts and, with transposed matrices, for the gradient of rows.
Results are not added up per token here: on recent devices a second pass that gathers is faster than
a product that scatters (SonicMoE, arXiv:2512.14080), and its sum has one order: see `combine`.

Shapes: `rows in` in, `rows out` out, matrices `experts out in` with any strides.
"""

# ruff: noqa: N803 - constants are written large in kernels
# pyright: reportCallIssue=false

from typing import no_type_check

import triton
from jaxtyping import Float
from torch import Tensor
from triton import language as tl

from moefold.ops.triton.blocks import Blocks, launch
from moefold.ops.triton.pieces import place, product, rows_of
from moefold.ops.triton.schedule import Schedule


def second(
    rows: Float[Tensor, "rows in"],
    matrices: Float[Tensor, "experts out in"],
    bias: Float[Tensor, "experts out"] | None,
    tiles: Schedule,
    blocks: Blocks,
    out: Float[Tensor, "rows out"],
    clear_spare: bool,
) -> None:
    """Write `out`; spare rows as zeros if `clear_spare`, else they are left unwritten.

    Args:
        rows: sorted by expert, contiguous.
        matrices: any strides.
        bias: added to the product.
        tiles: made for `blocks.rows`.
        blocks: sizes of tiles.
        out: written, contiguous.
        clear_spare: whether anybody reads spare rows.
    """
    columns = triton.cdiv(out.shape[1], blocks.columns)
    count = tiles.expert_of_tile.shape[0]
    _second[(count * columns,)](
        rows,
        matrices,
        matrices if bias is None else bias,
        out,
        *tiles,
        count,
        matrices.shape[0],
        rows.shape[1],
        out.shape[1],
        *matrices.stride(),
        *((0, 0) if bias is None else bias.stride()),
        BIAS=bias is not None,
        CLEAR_SPARE=clear_spare,
        RAGGED_DEPTH=rows.shape[1] % blocks.depth != 0,
        RAGGED_COLUMNS=out.shape[1] % blocks.columns != 0,
        **launch(blocks, rows),
    )


@triton.jit
@no_type_check
def _second(
    rows,
    matrices,
    bias,
    out,
    expert_of_tile,
    row_bounds,
    tile_bounds,
    tiles,
    experts,
    terms,
    width,
    matrix_expert,
    matrix_row,
    matrix_column,
    bias_expert,
    bias_column,
    BIAS: tl.constexpr,
    CLEAR_SPARE: tl.constexpr,
    PRECISION: tl.constexpr,
    RAGGED_DEPTH: tl.constexpr,
    RAGGED_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    columns = (width + COLUMNS - 1) // COLUMNS
    tile, column = place(tl.program_id(0), tiles, columns, GROUP)
    expert = tl.load(expert_of_tile + tile)
    if expert > experts:
        return
    row, real = rows_of(tile, expert, row_bounds, tile_bounds, ROWS)
    at = column * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < width
    there = out + row[:, None] * width + at[None, :]
    stored = real[:, None] & inside[None, :]
    if expert == experts:
        if CLEAR_SPARE:
            tl.store(there, tl.full((ROWS, COLUMNS), 0.0, out.dtype.element_ty), mask=stored)
        return
    total, _ = product(
        rows + row * terms,
        matrices + expert.to(tl.int64) * matrix_expert + at * matrix_row,
        0,
        inside,
        terms,
        1,
        matrix_column,
        False,
        PRECISION,
        RAGGED_DEPTH,
        RAGGED_COLUMNS,
        DEPTH,
    )
    if BIAS:
        term = bias + expert.to(tl.int64) * bias_expert + at * bias_column
        total += tl.load(term, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(there, total.to(out.dtype.element_ty), mask=stored)
