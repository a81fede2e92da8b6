"""Selection in rows that fit one program: the best experts of a token, a group's few tokens.

Shapes: `rows size` scores; `counts` says how many to take of each row, one number for several rows
that follow each other. Logits of the fused router are `tokens experts`.

A float32 becomes an unsigned integer of the same order. The integer of the last one taken is found
bit by bit from the highest: a bit stays set if at least `count` reach the number with it. So every
count costs 32 sums over the row, and ties are settled by a running sum, the lowest index first.
The slow twins are `moefold.ops.select.top` and `moefold.ops.route.route_reference`.
"""

# ruff: noqa: N803 - constants are written large in kernels
# pyright: reportPrivateImportUsage=false, reportIndexIssue=false, reportOptionalMemberAccess=false
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefold.ops.triton.pieces import on_device_of

SHORT = 4096
"""The longest row that one program holds."""

_HELD = 4096  # scores of one program: 32 for each thread of four warps

# Kernels are marked as not to be type checked: a run-time checker's wrapper is no kernel.


@triton.jit
@no_type_check
def order_key(x: tl.tensor) -> tl.tensor:
    """The bits of a float32 as an unsigned integer that orders as the numbers do; -0 is 0."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


@triton.jit
@no_type_check
def top_of_tile(key: tl.tensor, count: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """Mark the `count` largest of every row of a tile of keys."""
    last = tl.zeros([ROWS], tl.uint32)
    bit = tl.full([ROWS], 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = last | bit
        reached = tl.sum((key >= candidate[:, None]).to(tl.int32), 1)
        last = tl.where(reached >= count, candidate, last)
        bit = bit >> 1
    above = key > last[:, None]
    tied = (key == last[:, None]).to(tl.int32)
    room = count - tl.sum(above.to(tl.int32), 1)
    return above | ((tied > 0) & (tl.cumsum(tied, 1) <= room[:, None]))


@triton.jit
@no_type_check
def _mark_short(
    scores, valid, counts, marked, rows, size, count, rows_per_count,
    HAS_VALID: tl.constexpr, HAS_COUNTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_SIZE)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    place = row[:, None] * size + column[None, :]
    x = tl.load(scores + place, mask=inside, other=float("-inf")).to(tl.float32)
    taking_part = inside
    if HAS_VALID:
        taking_part = tl.load(valid + place, mask=inside, other=0) != 0
        x = tl.where(taking_part, x, float("-inf"))
    take = tl.zeros([BLOCK_ROWS], tl.int32) + count
    if HAS_COUNTS:
        take = tl.load(counts + row // rows_per_count, mask=row < rows, other=0).to(tl.int32)
    # Columns past the end are -inf of a higher index than all others: they win no tie.
    best = top_of_tile(order_key(x), take, BLOCK_ROWS)
    tl.store(marked + place, best & taking_part, mask=inside)


@triton.jit
@no_type_check
def _scores(x, inside, softmax, sigmoid):
    """Softmax and sigmoid of a tile of logits, and the sum of both with their coefficients."""
    x = tl.where(inside, x, float("-inf"))
    highest = tl.max(x, 1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    grown = tl.exp(x - highest[:, None])
    total = tl.sum(grown, 1)
    shares = grown / tl.where(total > 0, total, 1.0)[:, None]
    # Of the two forms of the sigmoid the one whose exponential cannot overflow.
    small = tl.exp(-tl.abs(tl.where(inside, x, 0.0)))
    alone = tl.where(x >= 0, 1.0, small) / (1.0 + small)
    return shares, alone, softmax * shares + sigmoid * alone


@triton.jit
@no_type_check
def _route(
    logits, bias, valid, scores, chosen, weights, tokens, experts, k, softmax, sigmoid, scale,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_SIZE)
    inside = (row < tokens)[:, None] & (column < experts)[None, :]
    place = row[:, None] * experts + column[None, :]
    x = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
    _, _, score = _scores(x, inside, softmax, sigmoid)
    contest = score
    if HAS_BIAS:
        contest += tl.load(bias + column, mask=column < experts, other=0.0)[None, :]
    contest = tl.where(inside, contest, float("-inf"))
    taking_part = inside
    if HAS_VALID:
        real = tl.load(valid + row, mask=row < tokens, other=0) != 0
        taking_part = inside & real[:, None]
    best = top_of_tile(order_key(contest), tl.zeros([BLOCK_ROWS], tl.int32) + k, BLOCK_ROWS)
    best = best & taking_part
    weight = tl.where(best, score, 0.0)
    if NORMALIZE:
        total = tl.sum(weight, 1)
        weight = weight / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(scores + place, score, mask=inside)
    tl.store(chosen + place, best, mask=inside)
    tl.store(weights + place, weight * scale, mask=inside)


@triton.jit
@no_type_check
def _route_backward(
    logits, chosen, grad_scores, grad_weights, grad, tokens, experts, softmax, sigmoid, scale,
    NORMALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_SIZE)
    inside = (row < tokens)[:, None] & (column < experts)[None, :]
    place = row[:, None] * experts + column[None, :]
    x = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
    shares, alone, score = _scores(x, inside, softmax, sigmoid)
    best = tl.load(chosen + place, mask=inside, other=0) != 0
    of_weight = tl.load(grad_weights + place, mask=best, other=0.0) * scale
    if NORMALIZE:
        # weight = score / total: its derivative by a score is (1 - weight of that one) / total.
        total = tl.sum(tl.where(best, score, 0.0), 1)
        divisor = tl.where(total > 0, total, 1.0)[:, None]
        drawn = tl.sum(of_weight * tl.where(best, score, 0.0), 1)[:, None] / divisor
        drawn = tl.where((total > 0)[:, None], drawn, 0.0)
        of_weight = tl.where(best, (of_weight - drawn) / divisor, 0.0)
    of_score = of_weight + tl.load(grad_scores + place, mask=inside, other=0.0)
    mean = tl.sum(tl.where(inside, of_score * shares, 0.0), 1)[:, None]
    result = softmax * shares * (of_score - mean) + sigmoid * of_score * alone * (1.0 - alone)
    tl.store(grad + place, result, mask=inside)


def _tile(rows: int, size: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and block of a kernel that holds whole rows."""
    block_size = triton.next_power_of_2(max(size, 1))
    block_rows = max(min(_HELD // block_size, 64), 1)
    block_rows = min(block_rows, triton.next_power_of_2(max(rows, 1)))
    return (triton.cdiv(rows, block_rows),), {"BLOCK_ROWS": block_rows, "BLOCK_SIZE": block_size}


@torch.library.custom_op("moefold::mark_short", mutates_args=())
def mark_short(
    scores: Tensor, valid: Tensor | None, counts: Tensor | None, count: int, rows_per_count: int
) -> Tensor:
    """Mark the largest of every row of at most `SHORT` scores; see `marked_top`."""
    rows, size = scores.shape
    marked = torch.empty_like(scores, dtype=torch.bool)
    if scores.numel():
        grid, blocks = _tile(rows, size)
        with on_device_of(scores):
            _mark_short[grid](
                scores, valid, counts, marked, rows, size, count, rows_per_count,
                HAS_VALID=valid is not None, HAS_COUNTS=counts is not None, **blocks,
            )  # fmt: skip
    return marked


@mark_short.register_fake
def _(scores, valid, counts, count, rows_per_count):
    return torch.empty_like(scores, dtype=torch.bool)


@torch.library.custom_op("moefold::route", mutates_args=())
def route(
    logits: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    k: int,
    softmax: float,
    sigmoid: float,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, choice and weights; see `moefold.ops.route.route`."""
    tokens, experts = logits.shape
    scores = torch.empty_like(logits, dtype=torch.float32)
    chosen, weights = torch.empty_like(logits, dtype=torch.bool), torch.empty_like(scores)
    if logits.numel():
        grid, blocks = _tile(tokens, experts)
        with on_device_of(logits):
            _route[grid](
                logits, bias, valid, scores, chosen, weights, tokens, experts,
                k, softmax, sigmoid, scale, HAS_BIAS=bias is not None,
                HAS_VALID=valid is not None, NORMALIZE=normalize, **blocks,
            )  # fmt: skip
    return scores, chosen, weights


@route.register_fake
def _(logits, bias, valid, k, softmax, sigmoid, normalize, scale):
    scores = torch.empty_like(logits, dtype=torch.float32)
    return scores, torch.empty_like(logits, dtype=torch.bool), torch.empty_like(scores)


@torch.library.custom_op("moefold::route_backward", mutates_args=())
def route_backward(
    logits: Tensor,
    chosen: Tensor,
    grad_scores: Tensor,
    grad_weights: Tensor,
    softmax: float,
    sigmoid: float,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Gradient of the logits."""
    tokens, experts = logits.shape
    grad = torch.empty_like(logits)
    if logits.numel():
        grid, blocks = _tile(tokens, experts)
        with on_device_of(logits):
            _route_backward[grid](
                logits, chosen, grad_scores, grad_weights, grad, tokens, experts,
                softmax, sigmoid, scale, NORMALIZE=normalize, **blocks,
            )  # fmt: skip
    return grad


@route_backward.register_fake
def _(logits, chosen, grad_scores, grad_weights, softmax, sigmoid, normalize, scale):
    return torch.empty_like(logits)


def _keep(ctx, inputs, output):
    logits, _, _, _, *ctx.settings = inputs
    _, chosen, _ = output
    ctx.mark_non_differentiable(chosen)
    ctx.save_for_backward(logits, chosen)


def _differentiate(ctx, grad_scores, _, grad_weights):
    logits, chosen = ctx.saved_tensors
    grads = (
        torch.zeros_like(logits, dtype=torch.float32) if grad is None else grad.contiguous()
        for grad in (grad_scores, grad_weights)
    )
    return route_backward(logits, chosen, *grads, *ctx.settings), *(None for _ in range(7))


route.register_autograd(_differentiate, setup_context=_keep)
