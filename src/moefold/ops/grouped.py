"""Grouped products: every expert multiplies its own rows.

Shapes: `rows inner` times `experts outer inner`, where the rows of expert 0 come first, then those
of expert 1, and so on; rows past `rows_per_expert.sum()` are spare and come back as zero.

These are custom operators, so that `torch.compile` takes them as they are: its own rule for grouped
products refuses float32 on the CPU, and a loop would depend on data. On the CPU the loop works on
views; indexing a stacked parameter inside an autograd graph would instead make a gradient of its
full size for each expert, which is what makes naive loops slow at many experts.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def grouped_mm(
    rows: Float[Tensor, "rows inner"],
    weights: Float[Tensor, "experts outer inner"],
    rows_per_expert: Int[Tensor, " experts"],
) -> Float[Tensor, "rows outer"]:
    """Multiply every row by its expert's matrix: `rows[r] @ weights[expert_of_row[r]].T`.

    Any floating dtype. Under autocast both factors are cast, as `torch.nn.functional.linear` does.
    """
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weights = rows.to(dtype), weights.to(dtype)
    return _mm(rows, weights.transpose(1, 2), rows_per_expert)


@torch.library.custom_op("moefold::grouped_mm", mutates_args=())
def _mm(rows: Tensor, weights: Tensor, rows_per_expert: Tensor) -> Tensor:
    """`rows [rows, inner]` times `weights [experts, inner, outer]`."""
    if rows.is_cuda and _cuda_can(rows, weights):
        ends = rows_per_expert.cumsum(0)
        out = torch.nn.functional.grouped_mm(rows, weights, offs=ends.int())
        spare = torch.arange(len(rows), device=rows.device) >= ends[-1]
        return out.masked_fill_(spare.unsqueeze(1), 0.0)
    out = rows.new_empty(rows.shape[0], weights.shape[2])
    begin = 0
    for expert, count in enumerate(rows_per_expert.tolist()):
        end = begin + count
        if count:
            torch.mm(rows[begin:end], weights[expert], out=out[begin:end])
        begin = end
    out[begin:].zero_()
    return out


@torch.library.custom_op("moefold::grouped_outer", mutates_args=())
def _outer(left: Tensor, right: Tensor, rows_per_expert: Tensor) -> Tensor:
    """`left [rows, a]` transposed times `right [rows, b]` of each expert: `[experts, a, b]`."""
    if left.is_cuda and _cuda_can(left.t(), right):
        ends = rows_per_expert.cumsum(0).int()
        return torch.nn.functional.grouped_mm(left.t(), right, offs=ends)
    out = left.new_empty(len(rows_per_expert), left.shape[1], right.shape[1])
    begin = 0
    for expert, count in enumerate(rows_per_expert.tolist()):
        end = begin + count
        if count:
            torch.mm(left[begin:end].t(), right[begin:end], out=out[expert])
        else:
            out[expert].zero_()
        begin = end
    return out


def _cuda_can(left: Tensor, right: Tensor) -> bool:
    """Whether PyTorch's grouped product takes these: bfloat16, and strides of 16 bytes."""
    strides = (*left.stride(), *right.stride())
    return left.dtype == torch.bfloat16 and all(s == 1 or s % 8 == 0 for s in strides)


@_mm.register_fake
def _(rows: Tensor, weights: Tensor, rows_per_expert: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


@_outer.register_fake
def _(left: Tensor, right: Tensor, rows_per_expert: Tensor) -> Tensor:
    return left.new_empty(rows_per_expert.shape[0], left.shape[1], right.shape[1])


def _save_mm(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _mm_backward(ctx: Any, grad: Tensor) -> tuple:
    rows, weights, rows_per_expert = ctx.saved_tensors
    grad = grad.contiguous()  # a sum's gradient is expanded, with strides of zero
    of_rows = of_weights = None
    if ctx.needs_input_grad[0]:
        of_rows = _mm(grad, weights.transpose(1, 2), rows_per_expert)
    if ctx.needs_input_grad[1]:
        # As [experts, outer, inner], the layout of the parameter, then seen as the argument was.
        of_weights = _outer(grad, rows, rows_per_expert).transpose(1, 2)
    return of_rows, of_weights, None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple:
    left, right, rows_per_expert = ctx.saved_tensors
    of_left = _mm(right, grad.transpose(1, 2), rows_per_expert)
    of_right = _mm(left, grad, rows_per_expert)
    return of_left, of_right, None


_mm.register_autograd(_mm_backward, setup_context=_save_mm)
_outer.register_autograd(_outer_backward, setup_context=_save_mm)
