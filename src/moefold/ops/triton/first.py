"""First products of experts: gather, product, bias and activation in one kernel.

    pre[r] = up[e] @ x[token of r] + bias[e]           kept for the backward pass, if asked for
    hidden[r] = activation(pre[r])                     plain
    hidden[r] = activation(pre[r, :width]) * pre[r, width:]    gated

Shapes: `tokens dim` in, or `rows dim` already gathered; `rows wide` and `rows width` out, where
`wide` is twice `width` for gated experts. Spare rows are left unwritten.
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
from moefold.ops.triton.pieces import place, product, rows_of
from moefold.ops.triton.schedule import Schedule


def first(
    x: Float[Tensor, "inputs dim"],
    token_of_row: Int[Tensor, " rows"] | None,
    up: Float[Tensor, "experts wide dim"],
    bias: Float[Tensor, "experts wide"] | None,
    tiles: Schedule,
    blocks: Blocks,
    activation: str,
    hidden: Float[Tensor, "rows width"],
    pre: Float[Tensor, "rows wide"] | None,
) -> None:
    """Write `hidden`, and `pre` where it is given.

    Args:
        x: tokens, or rows if there is no `token_of_row`.
        token_of_row: where each row is gathered from.
        up: first matrices, any strides.
        bias: added to the product.
        tiles: made for `blocks.rows`.
        blocks: sizes of tiles.
        activation: one of `activation.activated`.
        hidden: written.
        pre: written, or None.
    """
    width = hidden.shape[1]
    gated = up.shape[1] == 2 * width
    sizes = of_halves(blocks) if gated else blocks
    columns = triton.cdiv(width, sizes.columns)
    count = tiles.expert_of_tile.shape[0]
    _first[(count * columns,)](
        x,
        x if token_of_row is None else token_of_row,
        up,
        up if bias is None else bias,
        hidden,
        hidden if pre is None else pre,
        *tiles,
        count,
        up.shape[0],
        x.shape[1],
        width,
        *x.stride(),
        *up.stride(),
        *((0, 0) if bias is None else bias.stride()),
        GATHER=token_of_row is not None,
        GATED=gated,
        BIAS=bias is not None,
        KEEP=pre is not None,
        ACTIVATION=activation,
        RAGGED_DEPTH=x.shape[1] % sizes.depth != 0,
        RAGGED_COLUMNS=width % sizes.columns != 0,
        **launch(sizes, x),
    )


@triton.jit
@no_type_check
def _first(
    x,
    token_of_row,
    up,
    bias,
    hidden,
    pre,
    expert_of_tile,
    row_bounds,
    tile_bounds,
    tiles,
    experts,
    dim,
    width,
    x_row,
    x_column,
    up_expert,
    up_row,
    up_column,
    bias_expert,
    bias_column,
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
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
    out = column * COLUMNS + tl.arange(0, COLUMNS)
    inside = out < width
    total, value = product(
        x + source * x_row,
        up + expert.to(tl.int64) * up_expert + out * up_row,
        width * up_row,
        inside,
        dim,
        x_column,
        up_column,
        GATED,
        PRECISION,
        RAGGED_DEPTH,
        RAGGED_COLUMNS,
        DEPTH,
    )
    if BIAS:
        term = bias + expert.to(tl.int64) * bias_expert + out * bias_column
        total += tl.load(term, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            term += width * bias_column
            value += tl.load(term, mask=inside, other=0.0).to(tl.float32)[None, :]
    stored = real[:, None] & inside[None, :]
    y, _ = activated(total, ACTIVATION)
    if KEEP:
        wide = 2 * width if GATED else width
        kept = pre + row[:, None] * wide + out[None, :]
        tl.store(kept, total.to(pre.dtype.element_ty), mask=stored)
        if GATED:
            tl.store(kept + width, value.to(pre.dtype.element_ty), mask=stored)
    if GATED:
        y = y * value
    there = hidden + row[:, None] * width + out[None, :]
    tl.store(there, y.to(hidden.dtype.element_ty), mask=stored)
