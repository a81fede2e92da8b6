"""Rows to tokens: every token sums its own rows, in one order, without atomic operations.

    out[t] = sum over the rows r of token t of weight[r] * rows[r]

The same kernel adds up the gradients of a token's copies (without weights).

Shapes: `rows dim` in, `tokens dim` out; a token without a row is zero.
"""

# ruff: noqa: N803 - constants are written large in kernels
# pyright: reportCallIssue=false

from typing import no_type_check

import triton
from jaxtyping import Float
from torch import Tensor
from triton import language as tl

from moefold.ops.triton.schedule import RowsOfTokens

# Numbers of a token that one program sums; it holds them in registers, 8 for each of 128 threads.
COLUMNS = 1024


def combine(
    rows: Float[Tensor, "rows dim"],
    weight_of_row: Float[Tensor, " rows"] | None,
    rows_of_tokens: RowsOfTokens,
    out: Float[Tensor, "tokens dim"],
) -> None:
    """Write `out`, summed in float32.

    Args:
        rows: contiguous.
        weight_of_row: 1 for every row if None; contiguous.
        rows_of_tokens: which rows each token has.
        out: written, contiguous.
    """
    tokens, dim = out.shape
    columns = min(COLUMNS, triton.next_power_of_2(dim))
    _combine[(tokens, triton.cdiv(dim, columns))](
        rows,
        rows if weight_of_row is None else weight_of_row,
        *rows_of_tokens,
        out,
        dim,
        WEIGHTED=weight_of_row is not None,
        COLUMNS=columns,
        num_warps=4,
    )


@triton.jit
@no_type_check
def _combine(
    rows,
    weight_of_row,
    order,
    bounds,
    out,
    dim,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < dim
    total = tl.full((COLUMNS,), 0.0, tl.float32)
    for place in range(tl.load(bounds + token), tl.load(bounds + token + 1)):
        row = tl.load(order + place).to(tl.int64)
        values = tl.load(rows + row * dim + at, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            values = values * tl.load(weight_of_row + row)
        total += values
    there = out + token.to(tl.int64) * dim + at
    tl.store(there, total.to(out.dtype.element_ty), mask=inside)
