"""Matrix products with a few dozen rows by compiled code; slow twins: `torch.mm` and `torch.bmm`.

Shapes: `[rows, depth] @ [depth, columns]`, or stacks of both, `[experts, rows, depth] @ [experts,
depth, columns]`. All of it float32, but for the right factor of `product`, which may be bfloat16 or
float16. Where the processor multiplies pairs of bfloat16 numbers, both factors may be bfloat16, and
what is written, too; a float32 right factor of bfloat16 rows is rounded as it is read. With an
index, a factor is `[tokens, depth]` and its rows are those that the index, `[rows]` or
`[experts * rows]`, names. None of the sizes is 0; in pairs the depth and the strides of `product`
are even.

Experts multiply within compiled code (`experts.c`); this is the entrance for tests and benchmarks.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from moefold.ops.cpu.compiled import library
from moefold.ops.cpu.expert_rows import KINDS, PAIRS_OF

MOST_ROUNDED = 1024
"""Rows whose sum is written in bfloat16."""


def make_room() -> Tensor | None:
    """Memory for one thread's `product` and `sums`; None where there is no compiled code."""
    functions = _functions()
    if functions is None:
        return None
    return torch.empty(functions.moefold_room(), dtype=torch.float32, device="cpu")


def product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    room: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    add: bool = False,
    left_index: Tensor | None = None,
    out_index: Tensor | None = None,
) -> None:
    """Write `(left @ right + bias) * scale` to `out`, or add it.

    Args:
        left: rows, or tokens if there is an index; the numbers of a row follow each other.
        right: matrices, the numbers of whose rows or columns follow each other.
        out: where the result goes, as `left`.
        room: see `make_room`.
        bias: `[columns]` or `[experts, columns]`, the numbers of an expert following each other.
        scale: a number for each row of all experts.
        add: to what is there.
        left_index: of the rows in `left`; int64, without gaps, and within bounds: nobody checks.
        out_index: of the rows in `out`, likewise; one that comes twice is only right if `add`.
    """
    low = _is_low(left)
    assert not low or right.dtype in PAIRS_OF, "a row of pairs is multiplied by a matrix of pairs"
    assert low or not _is_low(out), "only what pairs make is rounded"
    experts, turned = right.shape[0] if right.ndim == 3 else 1, right.stride(-2) == 1
    functions = _functions()
    assert functions is not None, "without it there is no room either"
    functions.moefold_products(
        experts,
        left.shape[-2] if left_index is None else left_index.shape[0] // experts,
        right.shape[-1],
        right.shape[-2],
        low,
        *_in_fours(left, left_index),
        right.data_ptr(),
        right.stride(0),
        right.stride(-1 if turned else -2),
        turned,
        KINDS[right.dtype],
        *_place(out, out_index),
        None if bias is None else bias.data_ptr(),
        0 if bias is None or bias.ndim == 1 else bias.stride(0),
        None if scale is None else scale.data_ptr(),
        add,
        _is_low(out),
        room.data_ptr(),
    )


def sums(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    room: Tensor,
    *,
    left_index: Tensor | None = None,
    right_index: Tensor | None = None,
) -> None:
    """Write `left.mT @ right`, sums over rows, to `out`; see `product`."""
    functions = _functions()
    assert functions is not None, "without it there is no room either"
    experts = out.shape[0] if out.ndim == 3 else 1
    rows = left.shape[-2] if left_index is None else left_index.shape[0] // experts
    low = _is_low(left)
    assert low == _is_low(right), "pairs are multiplied by pairs"
    assert not _is_low(out) or (low and rows <= MOST_ROUNDED), "only what one part makes is rounded"
    functions.moefold_sums(
        experts,
        out.shape[-2],
        out.shape[-1],
        rows,
        low,
        _is_low(out),
        *_place(left, left_index),
        *_place(right, right_index),
        *_place(out, None)[:3],
        room.data_ptr(),
    )


def _is_low(matrix: Tensor) -> bool:
    return matrix.dtype == torch.bfloat16


def _in_fours(matrix: Tensor, index: Tensor | None) -> tuple[int, int, int, int | None]:
    """As `_place`, with strides in units of four bytes."""
    start, between, stride, of_index = _place(matrix, index)
    size = 2 if _is_low(matrix) else 1
    return start, between // size, stride // size, of_index


def _place(matrix: Tensor, index: Tensor | None) -> tuple[int, int, int, int | None]:
    """Start, stride between experts, stride between rows, and index."""
    if index is not None:
        return matrix.data_ptr(), 0, matrix.stride(0), index.data_ptr()
    between = matrix.stride(0) if matrix.ndim == 3 else 0
    return matrix.data_ptr(), between, matrix.stride(-2), None


@cache
def _functions() -> ctypes.CDLL | None:
    found = library()
    if isinstance(found, str):
        return None
    i, n, p = ctypes.c_int, ctypes.c_long, ctypes.c_void_p
    matrix = (p, n, n)
    product, sums = found.moefold_products, found.moefold_sums
    product.argtypes = [i, i, i, i, i, *matrix, p, *matrix, i, i, *matrix, p, p, n, p, i, i, p]
    sums.argtypes = [i, i, i, i, i, i, *matrix, p, *matrix, p, *matrix, p]
    product.restype = sums.restype = None
    found.moefold_room.restype = n
    return found
