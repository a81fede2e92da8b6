"""From chosen pairs to the list of rows, sorted by expert and then by token.

Shapes: `tokens experts` pairs; a block is some tokens that follow each other. `rows` is the length
of the list, which may be more than there are chosen pairs: the rest is spare.

    count   how many pairs of each block and expert are chosen:  [experts, blocks]
    scan    the running sum of these, read in that order, is where each one's rows begin
    place   a pair lies as far behind that as there are earlier tokens of its block and expert

Each row is written by one program, once, so the list is the same every time, and nothing is read by
the host. Backward reads the gradient of a row where the pair's row lies: nothing is added up.

The slow twin is the other branch of `SparseRouting.from_choice`.
"""

# ruff: noqa: N803 - constants are written large in kernels
# pyright: reportPrivateImportUsage=false, reportIndexIssue=false, reportOptionalMemberAccess=false
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefold.ops.triton.pieces import on_device_of

_HELD = 2048  # pairs of one program


@triton.jit
@no_type_check
def _tile(
    chosen, tokens, experts, blocks, columns,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """The pairs of a program, where they lie, and where the counts of their experts lie."""
    block = tl.program_id(0) // columns
    token = block.to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = (tl.program_id(0) % columns) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    inside = (token < tokens)[:, None] & (expert < experts)[None, :]
    place = token[:, None] * experts + expert[None, :]
    taken = tl.load(chosen + place, mask=inside, other=0) != 0
    return token, expert, inside, place, taken, expert.to(tl.int64) * blocks + block


@triton.jit
@no_type_check
def _count(
    chosen, counts, tokens, experts, blocks, columns,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    _, expert, _, _, taken, where = _tile(
        chosen, tokens, experts, blocks, columns, BLOCK_TOKENS, BLOCK_EXPERTS
    )
    tl.store(counts + where, tl.sum(taken.to(tl.int32), 0), mask=expert < experts)


@triton.jit
@no_type_check
def _rows_of(taken, ends, counts, where, expert, experts):
    """The row of every taken pair of a tile."""
    known = expert < experts
    end = tl.load(ends + where, mask=known, other=0)
    start = end - tl.load(counts + where, mask=known, other=0)
    return start[None, :] + tl.cumsum(taken.to(tl.int32), 0) - 1


@triton.jit
@no_type_check
def _place(
    chosen, weights, counts, ends, token_of_row, weight_of_row,
    rows, tokens, experts, blocks, columns,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    token, expert, _, place, taken, where = _tile(
        chosen, tokens, experts, blocks, columns, BLOCK_TOKENS, BLOCK_EXPERTS
    )
    row = _rows_of(taken, ends, counts, where, expert, experts)
    taken = taken & (row < rows)
    tl.store(token_of_row + row, token[:, None] + tl.zeros_like(row), mask=taken)
    tl.store(weight_of_row + row, tl.load(weights + place, mask=taken, other=0.0), mask=taken)


@triton.jit
@no_type_check
def _gather(
    chosen, counts, ends, grad_of_row, grad, rows, tokens, experts, blocks, columns,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    _, expert, inside, place, taken, where = _tile(
        chosen, tokens, experts, blocks, columns, BLOCK_TOKENS, BLOCK_EXPERTS
    )
    row = _rows_of(taken, ends, counts, where, expert, experts)
    found = tl.load(grad_of_row + row, mask=taken & (row < rows), other=0.0)
    tl.store(grad + place, found, mask=inside)


def _cut(tokens: int, experts: int) -> tuple[tuple[int], int, int, dict[str, int]]:
    """Grid, number of blocks of tokens and of blocks of experts, and the sizes of a block."""
    of_experts = 1 << min(max(experts - 1, 0).bit_length(), 7)  # at most 128
    of_tokens = min(_HELD // of_experts, 256)
    blocks, columns = -(-tokens // of_tokens), -(-experts // of_experts)
    sizes = {"BLOCK_TOKENS": of_tokens, "BLOCK_EXPERTS": of_experts}
    return (blocks * columns,), blocks, columns, sizes


@torch.library.custom_op("moefold::list_rows", mutates_args=())
def list_rows(
    chosen: Tensor, weights: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The list of rows of chosen pairs.

    Args:
        chosen: `[tokens, experts]`, which pairs have a row.
        weights: `[tokens, experts]`; only those of chosen pairs are read.
        rows: length of the list; pairs that do not fit into it are left out.

    Returns:
        Token of every row (0 for spare rows), weight of every row (0), rows of every expert; and
        two tensors that backward reads.
    """
    tokens, experts = chosen.shape
    chosen, weights = chosen.contiguous(), weights.contiguous()
    token_of_row = torch.zeros(rows, dtype=torch.int64, device=chosen.device)
    weight_of_row = torch.zeros(rows, dtype=weights.dtype, device=chosen.device)
    grid, blocks, columns, sizes = _cut(tokens, experts)
    counts = torch.empty(experts, blocks, dtype=torch.int32, device=chosen.device)
    if chosen.numel():
        with on_device_of(chosen):
            _count[grid](chosen, counts, tokens, experts, blocks, columns, **sizes)
    ends = counts.flatten().cumsum(0)
    if chosen.numel() and rows:
        with on_device_of(chosen):
            _place[grid](
                chosen, weights, counts, ends, token_of_row, weight_of_row,
                rows, tokens, experts, blocks, columns, **sizes,
            )  # fmt: skip
    return token_of_row, weight_of_row, counts.sum(1), counts, ends


@list_rows.register_fake
def _(chosen, weights, rows):
    tokens, experts = chosen.shape
    _, blocks, _, _ = _cut(tokens, experts)
    return (
        weights.new_empty(rows, dtype=torch.int64),
        weights.new_empty(rows),
        weights.new_empty(experts, dtype=torch.int64),
        weights.new_empty(experts, blocks, dtype=torch.int32),
        weights.new_empty(experts * blocks, dtype=torch.int64),
    )


@torch.library.custom_op("moefold::list_rows_backward", mutates_args=())
def list_rows_backward(chosen: Tensor, counts: Tensor, ends: Tensor, grad_of_row: Tensor) -> Tensor:
    """Gradient of the weights: that of a pair's row, zero for pairs without one."""
    tokens, experts = chosen.shape
    chosen, grad_of_row = chosen.contiguous(), grad_of_row.contiguous()
    grad = torch.empty(tokens, experts, dtype=grad_of_row.dtype, device=chosen.device)
    if chosen.numel():
        grid, blocks, columns, sizes = _cut(tokens, experts)
        with on_device_of(chosen):
            _gather[grid](
                chosen, counts, ends, grad_of_row, grad,
                len(grad_of_row), tokens, experts, blocks, columns, **sizes,
            )  # fmt: skip
    return grad


@list_rows_backward.register_fake
def _(chosen, counts, ends, grad_of_row):
    return grad_of_row.new_empty(chosen.shape)


def _keep(ctx, inputs, output):
    token_of_row, _, rows_per_expert, counts, ends = output
    ctx.mark_non_differentiable(token_of_row, rows_per_expert, counts, ends)
    ctx.save_for_backward(inputs[0], counts, ends)


def _differentiate(ctx, _tokens, grad_of_row, *_):
    return None, list_rows_backward(*ctx.saved_tensors, grad_of_row), None


list_rows.register_autograd(_differentiate, setup_context=_keep)
