"""Experts by torch's operations, block by block: what compiled code does not do, and its slow twin.

Shapes: `tokens dim` in, sums of the results by token; blocks of `rows`, see `fused_blocks`. The
formulas are in `fused_ops`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moefold.experts.backends.fused_blocks import Blocks
from moefold.experts.backends.fused_hidden import Half, Hidden
from moefold.experts.backends.fused_parts import Part, make_parts
from moefold.experts.backends.fused_products import Linears, Sums, gathered, in_dtype_of
from moefold.experts.backends.fused_workers import run_on
from moefold.ops.cpu.expert_rows import ExpertRows


def forward(given: ExpertRows, sums: Sequence[Tensor], like: Tensor, *, compiled: bool) -> None:
    """Add what experts make of their rows, each times its weight, to sums by token.

    Args:
        given: all experts, in any dtype; matrices with any gaps.
        sums: of each worker; the same for several if none of their rows have a token in common.
        like: of the dtype that is computed in.
        compiled: whether compiled code does what suits it: those experts are left out.
    """
    blocks, tokens, x = _blocks(given, like, len(sums), compiled=compiled), given.tokens, given.x
    width, dim, gated = given.down.shape[2], given.down.shape[1], given.gated
    tokens = blocks.own(tokens)
    weights = None if given.weights is None else blocks.own(given.weights)
    firsts = Half("pre", blocks, given.pre, like)
    seconds = Half("value", blocks, given.value, like)
    turned = given.up.transpose(1, 2)
    to_pre, to_value = (
        Linears(
            blocks, turned[..., half], None if given.up_bias is None else given.up_bias[:, half]
        )
        for half in (slice(width), slice(width, None))
    )
    to_out = Linears(blocks, given.down.transpose(1, 2), given.down_bias)
    hidden_rows = Hidden(given.activation, compiled=compiled and like.dtype == torch.float32)

    def through(part: Part) -> None:
        scratch = part.scratch
        for i in part.share:
            block = blocks[i]
            found = gathered(block, x, tokens[i], scratch("x", block.size))
            pre, value = firsts.memory(i, scratch), None
            to_pre(block, found, pre)
            firsts.keep(i, pre)
            if gated:
                value = seconds.memory(i, scratch)
                to_value(block, found, value)
                seconds.keep(i, value)
            hidden = scratch("hidden", block.size)
            hidden_rows(pre, value, hidden)
            weight = None if weights is None else weights[i]
            to_out.add_to(part.sums, tokens[i], block, hidden, weight, scratch)

    widths = {"x": x.shape[1], "hidden": width, "out": dim}
    widths |= firsts.widths(width) | (seconds.widths(width) if gated else {})
    run_on(make_parts(blocks, sums, widths, like), through)


def backward(
    given: ExpertRows, sums: Sequence[Tensor], like: Tensor, *, for_x: bool, compiled: bool
) -> None:
    """Write the gradients that there is memory for, zeros for experts without rows.

    Args:
        given: all experts, as they were forward.
        sums: by token, of each worker; gradients of tokens are added.
        like: of the dtype that is computed in.
        for_x: whether these are wanted.
        compiled: whether compiled code does what suits it, experts without rows too.
    """
    grad, x, gated, width = given.grad, given.x, given.gated, given.down.shape[2]
    assert grad is not None
    blocks = _blocks(given, like, len(sums), compiled=compiled)
    of_parameters = (given.of_up, given.of_down, given.of_up_bias, given.of_down_bias)
    if not compiled:
        blocks.zero_idle(*(t for t in of_parameters if t is not None))
    tokens = blocks.own(given.tokens)
    firsts = Half("pre", blocks, given.pre, like)
    seconds = Half("value", blocks, given.value, like)
    weights = None if given.weights is None else _columns(blocks, in_dtype_of(given.weights, like))
    of_weights = None if given.of_weights is None else blocks.own(given.of_weights)
    back_down, back_up = Linears(blocks, given.down), Linears(blocks, given.up)
    along_bias = None if given.down_bias is None else Linears(blocks, given.down_bias.unsqueeze(2))
    sum_up, sum_down = (None if t is None else Sums(blocks, t) for t in of_parameters[:2])
    sum_up_bias, sum_down_bias = (
        None if t is None else Sums(blocks, t.unsqueeze(1)) for t in of_parameters[2:]
    )
    goes_on = for_x or sum_up is not None or sum_up_bias is not None  # through the activation
    hidden_rows = Hidden(given.activation, compiled=compiled and like.dtype == torch.float32)

    def back(part: Part) -> None:
        scratch = part.scratch
        for i in part.share:
            block, weight = blocks[i], None if weights is None else weights[i]
            size = block.size
            g = gathered(block, grad, tokens[i], scratch("grad", size))
            hidden, of_hidden = scratch("hidden", size), scratch("of_hidden", size)
            of_first = scratch("of_first", size) if gated else of_hidden
            if of_weights is not None or goes_on:
                back_down(block, g, of_hidden)
            hidden_rows.differentiate(
                firsts.read(i, scratch),
                seconds.read(i, scratch) if gated else None,
                hidden,
                scratch,
                weight=weight,
                of_hidden=of_hidden if of_weights is not None or goes_on else None,
                of_first=of_first if goes_on else None,
                of_weight=None if of_weights is None else of_weights[i],
            )
            if of_weights is not None and along_bias is not None:
                of_bias = scratch("of_bias", size)
                along_bias(block, g, of_bias)
                of_weights[i].add_(of_bias[: block.count, 0])
            if sum_down_bias:
                sum_down_bias(block, hidden.new_ones(size, 1) if weight is None else weight, g)
            if sum_down:
                sum_down(block, g, hidden)
            if sum_up_bias:
                sum_up_bias(block, of_first.new_ones(size, 1), of_first)
            if sum_up:
                sum_up(block, of_first, gathered(block, x, tokens[i], scratch("x", size)))
            if for_x:
                back_up.add_to(part.sums, tokens[i], block, of_first, None, scratch)

    widths = {"grad": grad.shape[1], "hidden": width, "of_hidden": width}
    widths |= hidden_rows.widths(width, gated=gated, for_weight=of_weights is not None)
    widths |= firsts.widths(width) | (seconds.widths(width) if gated else {})
    if gated:
        widths["of_first"] = given.up.shape[1]
    if of_weights is not None:
        widths["of_bias"] = 1
    if sum_up:
        widths["x"] = x.shape[1]
    if for_x:
        widths["out"] = x.shape[1]
    run_on(make_parts(blocks, sums, widths, like), back)


def _blocks(given: ExpertRows, like: Tensor, workers: int, *, compiled: bool) -> Blocks:
    rows, widest = given.tokens.shape[0], max(given.up.shape[1:])
    return Blocks(given.counts, rows, widest, like, workers=workers, compiled=compiled)


def _columns(blocks: Blocks, weights: Tensor) -> Sequence[Tensor]:
    """The weights of every block's rows as a column, zero for the rows that pad it."""
    columns = blocks.own(weights[:, None])
    if not blocks.is_padded:
        return columns
    return [
        torch.nn.functional.pad(column, (0, 0, 0, block.size - block.count))
        for column, block in zip(columns, blocks, strict=False)
    ]
