"""Soft mixtures with the softmax inside of the product: no distribution is ever written.

Shapes: `groups members dim` tokens and `experts groups slots dim` rows, flattened as a routing has
them; `groups members experts slots` logits. What is mixed are `sources`, what comes out `targets`:
tokens and slots in dispatch, slots and tokens in combine. A target is the mean of the sources of
its group, by a softmax of its logits over them.

Forward is one pass over the sources that keeps the largest logit so far and the sum of exponentials
below it, and scales what was added before whenever a larger one comes (Milakov and Gimelshein,
*Online normalizer calculation for softmax*, 2018; Dao et al., *FlashAttention*, 2022, algorithm 1).
It hands on the logarithm of the sum, from which backward computes the weights again:

    P = exp(logit - log sum),  dX = P dY,  dlogit = P (X dY^T - sum(Y dY))

The slow twins are `moefold.ops.soft.dispatch_reference` and `combine_reference`.
"""

# ruff: noqa: N803 - constants are written large in kernels
# pyright: reportPrivateImportUsage=false, reportIndexIssue=false, reportOptionalMemberAccess=false
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefold.ops.triton.blocks import precision_of
from moefold.ops.triton.pieces import dot, on_device_of


@triton.jit
@no_type_check
def _row(index, group, groups, per_group, IN_SLOTS: tl.constexpr):
    """Where the vector of a member, or of a slot of all experts' slots, lies."""
    if IN_SLOTS:
        row = ((index // per_group).to(tl.int64) * groups + group) * per_group + index % per_group
    else:
        row = group * per_group + index
    return row


@triton.jit
@no_type_check
def _place(source, target, group, members, slots, TO_ROWS: tl.constexpr):
    """Where the logits of a tile lie: `[targets, sources]`."""
    if TO_ROWS:
        place = source[None, :].to(tl.int64) * slots + target[:, None]
    else:
        place = target[:, None].to(tl.int64) * slots + source[None, :]
    return group * members * slots + place


@triton.jit
@no_type_check
def _ends(members, slots, per_expert, TO_ROWS: tl.constexpr):
    """How many sources and targets a group has, and how many of each lie together."""
    if TO_ROWS:
        found = members, slots, members, per_expert
    else:
        found = slots, members, per_expert, members
    return found


@triton.jit
@no_type_check
def _work(program, parts, pieces):
    """The group of a program, and its part and piece. Neighbours differ in the piece alone."""
    return (program // pieces // parts).to(tl.int64), program // pieces % parts, program % pieces


@triton.jit
@no_type_check
def _taking_part(
    index, size, real, group, members, ARE_TOKENS: tl.constexpr, HAS_REAL: tl.constexpr
):
    """Which of these there are and, if they are tokens, which of those are real ones."""
    taking = index < size
    if HAS_REAL and ARE_TOKENS:
        taking = taking & (tl.load(real + group * members + index, mask=taking, other=0) != 0)
    return taking


@triton.jit
@no_type_check
def _mix(
    logits, values, real, out, normalizers, groups, members, slots, per_expert, dim,
    TO_ROWS: tl.constexpr, HAS_REAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SOURCES: tl.constexpr, BLOCK_TARGETS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    sources, targets, of_source, of_target = _ends(members, slots, per_expert, TO_ROWS)
    parts, pieces = tl.cdiv(targets, BLOCK_TARGETS), tl.cdiv(dim, BLOCK_DIM)
    # Neighbours share the logits, which then come from the cache.
    group, part, piece = _work(tl.program_id(0), parts, pieces)
    target = part * BLOCK_TARGETS + tl.arange(0, BLOCK_TARGETS)
    column = piece * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    wanted = _taking_part(target, targets, real, group, members, not TO_ROWS, HAS_REAL)
    highest = tl.full([BLOCK_TARGETS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_TARGETS], tl.float32)
    mixed = tl.zeros([BLOCK_TARGETS, BLOCK_DIM], tl.float32)
    for start in range(0, sources, BLOCK_SOURCES):
        source = start + tl.arange(0, BLOCK_SOURCES)
        given = _taking_part(source, sources, real, group, members, TO_ROWS, HAS_REAL)
        inside = wanted[:, None] & given[None, :]
        place = _place(source, target, group, members, slots, TO_ROWS)
        x = tl.load(logits + place, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing yet: no inf - inf
        rescale = tl.exp(highest - base)
        grown = tl.exp(x - base[:, None])
        row = _row(source, group, groups, of_source, not TO_ROWS)
        value = tl.load(
            values + row[:, None] * dim + column[None, :],
            mask=given[:, None] & (column < dim)[None, :],
            other=0.0,
        )
        mixed = dot(grown.to(value.dtype), value, mixed * rescale[:, None], PRECISION)
        total = total * rescale + tl.sum(grown, 1)
        highest = higher
    some = total > 0
    mixed = mixed / tl.where(some, total, 1.0)[:, None]
    row = _row(target, group, groups, of_target, TO_ROWS)
    shown = (target < targets)[:, None] & (column < dim)[None, :]
    tl.store(out + row[:, None] * dim + column[None, :], mixed, mask=shown)
    # Infinity for a target without sources: backward then finds all its weights to be zero.
    normalizer = tl.where(some, highest + tl.log(tl.where(some, total, 1.0)), float("inf"))
    if piece == 0:
        tl.store(normalizers + row, normalizer, mask=target < targets)


@triton.jit
@no_type_check
def _sum_products(
    out, grad, normalizers, result, rows, dim, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """`sum(out * grad)` of every target in float32; padding counts nothing, whatever comes back."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    wanted = tl.load(normalizers + row, mask=row < rows, other=float("inf")) < float("inf")
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, dim, BLOCK_DIM):
        column = start + tl.arange(0, BLOCK_DIM)
        place = row[:, None] * dim + column[None, :]
        inside = wanted[:, None] & (column < dim)[None, :]
        one = tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(one * other, 1)
    tl.store(result + row, total, mask=row < rows)


@triton.jit
@no_type_check
def _grad_values(
    logits, real, normalizers, grad, result, groups, members, slots, per_expert, dim,
    TO_ROWS: tl.constexpr, HAS_REAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SOURCES: tl.constexpr, BLOCK_TARGETS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    sources, targets, of_source, of_target = _ends(members, slots, per_expert, TO_ROWS)
    parts, pieces = tl.cdiv(sources, BLOCK_SOURCES), tl.cdiv(dim, BLOCK_DIM)
    group, part, piece = _work(tl.program_id(0), parts, pieces)
    source = part * BLOCK_SOURCES + tl.arange(0, BLOCK_SOURCES)
    column = piece * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    given = _taking_part(source, sources, real, group, members, TO_ROWS, HAS_REAL)
    summed = tl.zeros([BLOCK_SOURCES, BLOCK_DIM], tl.float32)
    for start in range(0, targets, BLOCK_TARGETS):
        target = start + tl.arange(0, BLOCK_TARGETS)
        row = _row(target, group, groups, of_target, TO_ROWS)
        normalizer = tl.load(normalizers + row, mask=target < targets, other=float("inf"))
        wanted = normalizer < float("inf")
        inside = wanted[:, None] & given[None, :]
        place = _place(source, target, group, members, slots, TO_ROWS)
        x = tl.load(logits + place, mask=inside, other=float("-inf")).to(tl.float32)
        share = tl.exp(x - normalizer[:, None])
        back = tl.load(
            grad + row[:, None] * dim + column[None, :],
            mask=wanted[:, None] & (column < dim)[None, :],
            other=0.0,
        )
        summed = dot(tl.trans(share).to(back.dtype), back, summed, PRECISION)
    row = _row(source, group, groups, of_source, not TO_ROWS)
    shown = (source < sources)[:, None] & (column < dim)[None, :]
    tl.store(result + row[:, None] * dim + column[None, :], summed, mask=shown)


@triton.jit
@no_type_check
def _grad_logits(
    logits, values, real, normalizers, products, grad, result,
    groups, members, slots, per_expert, dim,
    TO_ROWS: tl.constexpr, HAS_REAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SOURCES: tl.constexpr, BLOCK_TARGETS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    sources, targets, of_source, of_target = _ends(members, slots, per_expert, TO_ROWS)
    parts, pieces = tl.cdiv(targets, BLOCK_TARGETS), tl.cdiv(sources, BLOCK_SOURCES)
    group, part, piece = _work(tl.program_id(0), parts, pieces)
    source = piece * BLOCK_SOURCES + tl.arange(0, BLOCK_SOURCES)
    target = part * BLOCK_TARGETS + tl.arange(0, BLOCK_TARGETS)
    given = _taking_part(source, sources, real, group, members, TO_ROWS, HAS_REAL)
    source_row = _row(source, group, groups, of_source, not TO_ROWS)
    target_row = _row(target, group, groups, of_target, TO_ROWS)
    normalizer = tl.load(normalizers + target_row, mask=target < targets, other=float("inf"))
    wanted = normalizer < float("inf")
    of_share = tl.zeros([BLOCK_TARGETS, BLOCK_SOURCES], tl.float32)
    for start in range(0, dim, BLOCK_DIM):
        column = start + tl.arange(0, BLOCK_DIM)
        back = tl.load(
            grad + target_row[:, None] * dim + column[None, :],
            mask=wanted[:, None] & (column < dim)[None, :],
            other=0.0,
        )
        value = tl.load(
            values + source_row[:, None] * dim + column[None, :],
            mask=given[:, None] & (column < dim)[None, :],
            other=0.0,
        )
        of_share = dot(back, tl.trans(value), of_share, PRECISION)
    inside = wanted[:, None] & given[None, :]
    place = _place(source, target, group, members, slots, TO_ROWS)
    x = tl.load(logits + place, mask=inside, other=float("-inf")).to(tl.float32)
    share = tl.exp(x - normalizer[:, None])
    product = tl.load(products + target_row, mask=wanted, other=0.0)
    change = tl.where(inside, share * (of_share - product[:, None]), 0.0)
    shown = (target < targets)[:, None] & (source < sources)[None, :]
    tl.store(result + place, change, mask=shown)


def _blocks(sources: int, targets: int, dim: int, values: Tensor, *, sums: bool) -> dict[str, int]:
    """A tile: at least what a product of the hardware takes, at most what a processor holds.

    Args:
        sources: how many there are.
        targets: how many there are.
        dim: width of the vectors.
        values: the vectors; wider numbers leave room for fewer.
        sums: whether the tile that is added to is one of vectors; else one of logits.
    """

    def of(size: int, most: int) -> int:
        return min(max(triton.next_power_of_2(max(size, 1)), 16), most)

    half = values.element_size() < 4
    # Exact products of float32 go through registers, not through the units for matrices.
    exact = not half and precision_of(values) != "tf32"
    widest = (64 if exact else 256 if half else 128) if sums else 32 if exact else 64
    return {
        "BLOCK_SOURCES": of(sources, 32 if exact else 64),
        "BLOCK_TARGETS": of(targets, 32 if exact else 64),
        "BLOCK_DIM": of(dim, widest),
        "num_warps": 8 if sums and dim > 64 and not exact else 4,
        "num_stages": 2 if sums or not half else 3,
    }


def _sizes(logits: Tensor, to_rows: bool) -> tuple[int, int, int, int, int]:
    groups, members, experts, per_expert = logits.shape
    slots = experts * per_expert
    sources, targets = (members, slots) if to_rows else (slots, members)
    return groups, members, per_expert, sources, targets


@torch.library.custom_op("moefold::soft_mix", mutates_args=())
def soft_mix(
    logits: Tensor, values: Tensor, real: Tensor | None, to_rows: bool
) -> tuple[Tensor, Tensor]:
    """Mix sources into targets.

    Args:
        logits: `[groups, members, experts, slots]`.
        values: the sources: `[groups * members, dim]` tokens, or `[experts * groups * slots, dim]`
            rows.
        real: `[groups, members]`, which tokens take part; all if None.
        to_rows: mix tokens into rows; else rows into tokens.

    Returns:
        The targets, and for each the logarithm of its sum of exponentials (infinity where it has no
        sources, or is no real token).
    """
    groups, members, per_expert, sources, targets = _sizes(logits, to_rows)
    logits, values = logits.contiguous(), values.contiguous()
    real = None if real is None else real.contiguous()
    dim, slots = values.shape[1], logits[0, 0].numel() if logits.numel() else 0
    out = values.new_empty(groups * targets, dim)
    normalizers = torch.empty(groups * targets, dtype=torch.float32, device=values.device)
    if sources == 0 or dim == 0:
        return out.zero_(), normalizers.fill_(torch.inf)
    if out.numel():
        blocks = _blocks(sources, targets, dim, values, sums=True)
        parts = triton.cdiv(targets, blocks["BLOCK_TARGETS"])
        grid = (groups * parts * triton.cdiv(dim, blocks["BLOCK_DIM"]),)
        with on_device_of(values):
            _mix[grid](
                logits, values, real, out, normalizers, groups, members, slots, per_expert, dim,
                TO_ROWS=to_rows, HAS_REAL=real is not None, PRECISION=precision_of(values),
                **blocks,
            )  # fmt: skip
    return out, normalizers


@soft_mix.register_fake
def _(logits, values, real, to_rows):
    groups, _, _, _, targets = _sizes(logits, to_rows)
    out = values.new_empty(groups * targets, values.shape[1])
    return out, logits.new_empty(groups * targets, dtype=torch.float32)


@torch.library.custom_op("moefold::soft_mix_backward", mutates_args=())
def soft_mix_backward(
    logits: Tensor,
    values: Tensor,
    real: Tensor | None,
    out: Tensor,
    normalizers: Tensor,
    grad: Tensor,
    to_rows: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and values."""
    groups, members, per_expert, sources, targets = _sizes(logits, to_rows)
    logits, values, grad = logits.contiguous(), values.contiguous(), grad.contiguous()
    real = None if real is None else real.contiguous()
    grad_logits, grad_values = torch.empty_like(logits), torch.empty_like(values)
    if grad.numel() == 0 or logits.numel() == 0:
        return grad_logits.zero_(), grad_values.zero_()
    dim, slots = values.shape[1], logits[0, 0].numel()
    sizes = groups, members, slots, per_expert, dim
    settings = {"TO_ROWS": to_rows, "HAS_REAL": real is not None, "PRECISION": precision_of(values)}
    products = torch.empty_like(normalizers)
    with on_device_of(values):
        _sum_products[(triton.cdiv(len(out), 16),)](
            out, grad, normalizers, products, len(out), dim, BLOCK_ROWS=16, BLOCK_DIM=128
        )
        blocks = _blocks(sources, targets, dim, values, sums=True)
        parts = triton.cdiv(sources, blocks["BLOCK_SOURCES"])
        _grad_values[(groups * parts * triton.cdiv(dim, blocks["BLOCK_DIM"]),)](
            logits, real, normalizers, grad, grad_values, *sizes, **settings, **blocks,
        )  # fmt: skip
        blocks = _blocks(sources, targets, dim, values, sums=False)
        parts = triton.cdiv(sources, blocks["BLOCK_SOURCES"])
        _grad_logits[(groups * parts * triton.cdiv(targets, blocks["BLOCK_TARGETS"]),)](
            logits, values, real, normalizers, products, grad, grad_logits,
            *sizes, **settings, **blocks,
        )  # fmt: skip
    return grad_logits, grad_values


@soft_mix_backward.register_fake
def _(logits, values, real, out, normalizers, grad, to_rows):
    return torch.empty_like(logits), torch.empty_like(values)


def _keep(ctx, inputs, output):
    logits, values, real, ctx.to_rows = inputs
    out, normalizers = output
    ctx.mark_non_differentiable(normalizers)
    ctx.save_for_backward(logits, values, real, out, normalizers)


def _differentiate(ctx, grad, _):
    of_both = soft_mix_backward(*ctx.saved_tensors, grad, ctx.to_rows)
    return *of_both, None, None


soft_mix.register_autograd(_differentiate, setup_context=_keep)
