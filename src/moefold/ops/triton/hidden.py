"""Backward through the second product and the activation of experts, made again from `pre`.

With w the weight of row r (1 without weights), g the gradient of its token, b the second bias:

    d          = down[e].T @ g
    of_weight  = <d, hidden[r]> + <g, b>           = <g, result of row r>, which was not kept
    of_pre     = activation'(pre[r]) * w * d                           plain
               = the same * pre[r, width:], and activation(pre[r, :width]) * w * d      gated
    weighted   = w * hidden[r]                     whose products with g are the gradient of `down`

Shapes: `tokens dim` or `rows dim` gradients and `rows wide` pre in; `rows wide`, `rows width` and
`columns rows` out: every column of tiles adds its own part of `of_weight`, to be summed by the
caller. Spare rows are left unwritten.
"""

# ruff: noqa: N803 - constants are written large in kernels
# pyright: reportCallIssue=false

from typing import no_type_check

import triton
from jaxtyping import Float, Int
from torch import Tensor
from triton import language as tl

from moefold.ops.triton.activation import activated
from moefold.ops.triton.blocks import Blocks, launch, of_halves
from moefold.ops.triton.pieces import place, product, read, rows_of
from moefold.ops.triton.schedule import Schedule


def columns_of(blocks: Blocks, width: int) -> int:
    """Return how many parts of `of_weight` there are."""
    return triton.cdiv(width, of_halves(blocks).columns)


def hidden_backward(
    grad: Float[Tensor, "inputs dim"],
    token_of_row: Int[Tensor, " rows"] | None,
    weight_of_row: Float[Tensor, " rows"] | None,
    down: Float[Tensor, "experts dim width"],
    down_bias: Float[Tensor, "experts dim"] | None,
    pre: Float[Tensor, "rows wide"],
    tiles: Schedule,
    blocks: Blocks,
    activation: str,
    of_pre: Float[Tensor, "rows wide"],
    weighted: Float[Tensor, "rows width"] | None,
    of_weight: Float[Tensor, "columns rows"] | None,
) -> None:
    """Write `of_pre`, and the other two where they are given.

    Args:
        grad: of tokens, or of rows if there is no `token_of_row`; any strides.
        token_of_row: where each row's gradient is gathered from.
        weight_of_row: float32.
        down: second matrices, any strides.
        down_bias: only needed for `of_weight`.
        pre: what `first` kept.
        tiles: made for `blocks.rows`.
        blocks: sizes of tiles.
        activation: one of `activation.activated`.
        of_pre: written.
        weighted: written, or None.
        of_weight: `columns_of` float32 parts, written, or None.
    """
    width = down.shape[2]
    sizes = of_halves(blocks)
    columns = triton.cdiv(width, sizes.columns)
    count = tiles.expert_of_tile.shape[0]
    bias = None if of_weight is None else down_bias
    _hidden_backward[(count * columns,)](
        grad,
        grad if token_of_row is None else token_of_row,
        pre if weight_of_row is None else weight_of_row,
        down,
        down if bias is None else bias,
        pre,
        of_pre,
        of_pre if weighted is None else weighted,
        of_pre if of_weight is None else of_weight,
        *tiles,
        count,
        down.shape[0],
        grad.shape[1],
        width,
        pre.shape[0],
        *grad.stride(),
        *down.stride(),
        *((0, 0) if bias is None else bias.stride()),
        GATHER=token_of_row is not None,
        WEIGHTED=weight_of_row is not None,
        GATED=pre.shape[1] == 2 * width,
        BIAS=bias is not None,
        FOR_DOWN=weighted is not None,
        FOR_WEIGHT=of_weight is not None,
        ACTIVATION=activation,
        RAGGED_DEPTH=grad.shape[1] % sizes.depth != 0,
        RAGGED_COLUMNS=width % sizes.columns != 0,
        **launch(sizes, grad),
    )


@triton.jit
@no_type_check
def _hidden_backward(
    grad,
    token_of_row,
    weight_of_row,
    down,
    bias,
    pre,
    of_pre,
    weighted,
    of_weight,
    expert_of_tile,
    row_bounds,
    tile_bounds,
    tiles,
    experts,
    dim,
    width,
    rows,
    grad_row,
    grad_column,
    down_expert,
    down_row,
    down_column,
    bias_expert,
    bias_column,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    FOR_DOWN: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    if expert >= experts:
        return
    row, real = rows_of(tile, expert, row_bounds, tile_bounds, ROWS)
    source = row
    if GATHER:
        source = tl.load(token_of_row + row).to(tl.int64)
    at = column * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < width
    back = grad + source * grad_row
    total, _ = product(
        back,
        down + expert.to(tl.int64) * down_expert + at * down_column,
        0,
        inside,
        dim,
        grad_column,
        down_row,
        False,
        PRECISION,
        RAGGED_DEPTH,
        RAGGED_COLUMNS,
        DEPTH,
    )
    wide = 2 * width if GATED else width
    kept = row[:, None] * wide + at[None, :]
    stored = real[:, None] & inside[None, :]
    y, slope = activated(tl.load(pre + kept, mask=stored, other=0.0).to(tl.float32), ACTIVATION)
    hidden = y
    if GATED:
        value = tl.load(pre + width + kept, mask=stored, other=0.0).to(tl.float32)
        hidden = y * value
    if FOR_WEIGHT:
        parts = tl.where(stored, total * hidden, 0.0)
        found = tl.sum(parts, 1)
        if BIAS:  # noqa: SIM102 - Triton decides the one before it compiles, the other while it runs
            if column == 0:
                depth = tl.arange(0, DEPTH)
                term = bias + expert.to(tl.int64) * bias_expert + depth * bias_column
                left = back[:, None] + depth[None, :] * grad_column
                terms = tl.full((ROWS, DEPTH), 0.0, tl.float32)
                for start in range(0, dim, DEPTH):
                    within = depth < dim - start
                    a = read(left, within[None, :], RAGGED_DEPTH).to(tl.float32)
                    terms += a * read(term, within, RAGGED_DEPTH).to(tl.float32)[None, :]
                    left += DEPTH * grad_column
                    term += DEPTH * bias_column
                found += tl.sum(terms, 1)
        tl.store(of_weight + column.to(tl.int64) * rows + row, found, mask=real)
    if WEIGHTED:
        weight = tl.load(weight_of_row + row)[:, None]
        total = total * weight
        if FOR_DOWN:
            there = weighted + row[:, None] * width + at[None, :]
            tl.store(there, (hidden * weight).to(weighted.dtype.element_ty), mask=stored)
    elif FOR_DOWN:
        there = weighted + row[:, None] * width + at[None, :]
        tl.store(there, hidden.to(weighted.dtype.element_ty), mask=stored)
    of_gate = total * slope
    if GATED:
        of_gate = of_gate * value
        of_value = (total * y).to(of_pre.dtype.element_ty)
        tl.store(of_pre + width + kept, of_value, mask=stored)
    tl.store(of_pre + kept, of_gate.to(of_pre.dtype.element_ty), mask=stored)
