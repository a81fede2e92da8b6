"""The operators of the fused backend: tokens or rows through their experts, one expert at a time.

Shapes: `tokens dim` or `rows dim` in, see `base`. Per expert, with x its rows, w their weights,
`act` the activation and * between numbers:

    pre    = x @ up.T         (the gate's half, if gated)        kept for the backward pass
    value  = x @ up[width:].T (if gated)                         kept for the backward pass
    hidden = act(pre) * value (`act(pre)` if plain)              made again from the two
    out    = w * (hidden @ down.T), added to the tokens of the rows

With g the gradient at the tokens of the rows and d = g @ down, the gradients are

    w      the sum of d * hidden over the width, so that the second product need not be kept
    value  w * d * act(pre)
    pre    act'(pre) * (w * d * value)

and those of the parameters g.T @ (w * hidden) and [grad_pre, grad_value].T @ x.

A block of rows, its hidden rows and its result stay in cache from the first product to the sum:
nothing of the size of all rows is made but `pre` and `value`.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from moefold.ops.grouped import padded, too_few_rows

_aten = torch.ops.aten

# name: (act(x, out), its derivative at x times grad, into out). Without autograd: these run inside
# of an operator.
WRITTEN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "gelu": (
        lambda x, out: _aten.gelu.out(x, out=out),
        lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, grad_input=out),
    ),
    "gelu_tanh": (
        lambda x, out: _aten.gelu.out(x, approximate="tanh", out=out),
        lambda grad, x, out: _aten.gelu_backward.grad_input(
            grad, x, approximate="tanh", grad_input=out
        ),
    ),
    "relu": (
        lambda x, out: _aten.relu.out(x, out=out),
        lambda grad, x, out: _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
    ),
    "silu": (
        lambda x, out: _aten.silu.out(x, out=out),
        lambda grad, x, out: _aten.silu_backward.grad_input(grad, x, grad_input=out),
    ),
}
"""Activations whose derivative is written here."""


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products of this one are computed in.

    A processor without bfloat16 or float16 units multiplies such matrices up to fifty times slower
    than float32 ones; there a block is cast, computed in float32 and rounded once, at its end.
    """
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return torch.float32
    return dtype


@final
class Blocks:
    """Where the rows of every expert lie, and views of tensors by expert.

    An operation from Python takes some microseconds, which adds up over dozens of experts: views
    are made all at once, and of experts with rows only where these are few.

    Attributes:
        counts: rows of every expert, as long as the last that has one.
        sizes: the same with the rows that pad a block, see `ops.grouped.padded`.
        busy: the experts that have a row.
    """

    def __init__(self, rows_per_expert: Tensor, rows: int, like: Tensor) -> None:
        self.counts = rows_per_expert.tolist()
        if sum(self.counts) > rows:
            raise ValueError(too_few_rows(sum(self.counts), rows))
        self.sizes = [padded(count, like) if count else 0 for count in self.counts]
        self.busy = [expert for expert, count in enumerate(self.counts) if count]
        self.rows = rows

    @property
    def largest(self) -> int:
        """Rows of the largest block."""
        return max(self.sizes, default=0)

    def own(self, of_row: Tensor) -> Sequence[Tensor]:
        """Something of every row, by expert; the spare rows come last."""
        return of_row.split([*self.counts, self.rows - sum(self.counts)])

    def padded(self, of_padded: Tensor) -> Sequence[Tensor]:
        """Something of every row of the padded blocks, by expert; what is not needed comes last."""
        return of_padded.split([*self.sizes, of_padded.shape[0] - sum(self.sizes)])

    def of_expert(self, stack: Tensor) -> Mapping[int, Tensor] | Sequence[Tensor]:
        """Something of every expert."""
        if 2 * len(self.busy) < stack.shape[0]:
            return {expert: stack[expert] for expert in self.busy}
        return stack.unbind(0)

    def zero_idle(self, *stacks: Tensor) -> None:
        """Write zeros for the experts without rows."""
        ends = [-1, *self.busy, len(self.counts)]
        for before, after in pairwise(ends):
            if after - before > 1:
                for stack in stacks:
                    stack[before + 1 : after].zero_()


def room(rows: int, experts: int, like: Tensor) -> int:
    """Return the most rows that all padded blocks can have together: see `padded`."""
    return rows if padded(1, like) == 1 else rows + rows // 32 + 16 * experts


@final
class Scratch:
    """Memory for one block at a time by name, made at its first use for the largest block."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self._rows, self._like = rows, like
        self._views: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, rows: int, width: int) -> Tensor:
        """`[rows, width]`, with whatever was there."""
        found = self._views.get((name, rows))
        if found is None:
            whole = self._views.get((name, self._rows))
            if whole is None:
                whole = self._like.new_empty(self._rows, width)
                self._views[name, self._rows] = whole
            self._views[name, rows] = found = whole.narrow(0, 0, rows)
        return found

    def gathered(self, name: str, source: Tensor, tokens: Tensor, size: int) -> Tensor:
        """The tokens of a block's rows, with zeros for the rows that pad it."""
        block = self(name, size, source.shape[1])
        count = tokens.shape[0]
        part = block if count == size else block[:count]
        if source.dtype == block.dtype:
            torch.index_select(source, 0, tokens, out=part)
        else:
            part.copy_(source.index_select(0, tokens))
        if count < size:
            block[count:].zero_()
        return block


# torch.compile caches graphs on disk by the name of an operator, with the shapes it returned then:
# whoever changes how many rows are kept changes the name too.
@torch.library.custom_op("moefold::fused_mixture", mutates_args=())
def mixture(
    x: Tensor,
    token_of_row: Tensor,
    weight_of_row: Tensor | None,
    rows_per_expert: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gated: bool,
    activation: str,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result in `dtype`, and if `keep` what the backward pass needs: `pre`, `value`.

    Args:
        x: the tokens.
        token_of_row: the token of every row.
        weight_of_row: what is added to a token is multiplied by it; None for 1.
        rows_per_expert: how many rows each expert has.
        up: first matrices.
        down: second matrices.
        up_bias: added after the first product.
        down_bias: added after the second product.
        gated: whether half of the first product gates the other half.
        activation: a name of `WRITTEN`.
        dtype: of the result; every input is cast block by block to what it is computed in.
        keep: whether there will be a backward pass.
    """
    activate, width = WRITTEN[activation][0], down.shape[2]
    like = x.new_empty(0, dtype=work_dtype(dtype))
    count = token_of_row.shape[0]
    blocks = Blocks(rows_per_expert, count, like)
    scratch = Scratch(blocks.largest, like)
    kept_rows = room(count, up.shape[0], like) if keep else 0
    kept = like.new_empty(kept_rows, width), like.new_empty(kept_rows if gated else 0, width)
    pre, value = (blocks.padded(part) if part.shape[0] else None for part in kept)
    # Sums over the experts of a token are rounded once, at their end.
    out = x.new_zeros(x.shape[0], down.shape[1], dtype=torch.promote_types(dtype, torch.float32))
    tokens = blocks.own(token_of_row)
    weights = None if weight_of_row is None else blocks.own(weight_of_row.to(out.dtype)[:, None])
    turned = up.transpose(1, 2)
    to_pre = blocks.of_expert(turned[:, :, :width])
    to_value = blocks.of_expert(turned[:, :, width:])
    to_out = blocks.of_expert(down.transpose(1, 2))
    for e in blocks.busy:
        size = blocks.sizes[e]
        rows = scratch.gathered("x", x, tokens[e], size)
        first = scratch("pre", size, width) if pre is None else pre[e]
        _linear(rows, to_pre[e], None if up_bias is None else up_bias[e, :width], first)
        hidden = activate(first, out=scratch("hidden", size, width))
        if gated:
            second = scratch("value", size, width) if value is None else value[e]
            _linear(rows, to_value[e], None if up_bias is None else up_bias[e, width:], second)
            hidden.mul_(second)
        result = scratch("out", size, down.shape[1])
        _linear(hidden, to_out[e], None if down_bias is None else down_bias[e], result)
        result = result if size == blocks.counts[e] else result[: blocks.counts[e]]
        _add_at(out, tokens[e], result, None if weights is None else weights[e])
    for part in kept:
        part[sum(blocks.sizes) :].zero_()
    return out.to(dtype), *kept


def _linear(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    matrix = _cast(matrix, x)
    if bias is None:
        return torch.mm(x, matrix, out=out)
    # One operation, so that a low-precision sum is rounded once, as in functional.linear.
    return torch.addmm(_cast(bias, x), x, matrix, out=out)


def _add_at(out: Tensor, tokens: Tensor, rows: Tensor, weights: Tensor | None) -> None:
    """Add rows, each times its weight, to their tokens; the rows may be overwritten."""
    if rows.dtype != out.dtype:
        rows = rows.to(out.dtype) if weights is None else rows * weights
    elif weights is not None:
        rows.mul_(weights)
    out.index_add_(0, tokens, rows)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write `left @ right`, whatever dtype it is wanted in."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


@torch.library.custom_op("moefold::fused_mixture_backward", mutates_args=())
def mixture_backward(
    grad: Tensor,
    x: Tensor,
    token_of_row: Tensor,
    weight_of_row: Tensor | None,
    rows_per_expert: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre: Tensor,
    value: Tensor,
    gated: bool,
    activation: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weights of rows, up, down and the biases; empty if not wanted."""
    (activate, derivative), width = WRITTEN[activation], down.shape[2]
    given = (x, weight_of_row, up, down, up_bias, down_bias)
    of_x, of_weight, of_up, of_down, of_up_bias, of_down_bias = made = _gradients(given, wanted)
    for_x, for_weight, for_up, for_down, for_up_bias, for_down_bias = wanted
    blocks = Blocks(rows_per_expert, token_of_row.shape[0], pre)
    blocks.zero_idle(*(t for t, w in zip(made[2:], wanted[2:], strict=True) if w))
    scratch = Scratch(blocks.largest, pre)
    of_x = of_x.to(torch.promote_types(x.dtype, torch.float32)).zero_()
    of_weight.zero_()
    tokens, firsts = blocks.own(token_of_row), blocks.padded(pre)
    seconds = blocks.padded(value) if gated else firsts
    weights = None if weight_of_row is None else _columns(blocks, weight_of_row, pre)
    ups, downs = blocks.of_expert(up), blocks.of_expert(down)
    of_weights = blocks.own(of_weight) if for_weight else tokens
    of_ups = blocks.of_expert(of_up) if for_up else ups
    of_downs = blocks.of_expert(of_down) if for_down else downs
    for e in blocks.busy:
        size, weight = blocks.sizes[e], None if weights is None else weights[e]
        g = scratch.gathered("grad", grad, tokens[e], size)
        hidden = activated = activate(firsts[e], out=scratch("activated", size, width))
        if gated:
            hidden = torch.mul(activated, seconds[e], out=scratch("hidden", size, width))
        of_hidden = scratch("of_hidden", size, width)
        torch.mm(g, _cast(downs[e], g), out=of_hidden)
        if for_weight:
            products = torch.mul(of_hidden, hidden, out=scratch("products", size, width))
            products = products if size == blocks.counts[e] else products[: blocks.counts[e]]
            torch.sum(products, 1, dtype=of_weight.dtype, out=of_weights[e])
            if down_bias is not None:
                of_weights[e].add_((g @ _cast(down_bias[e], g))[: blocks.counts[e]])
        if for_down_bias:
            column = g.new_ones(size, 1) if weight is None else weight
            _product(column.t(), g, of_down_bias[e].unsqueeze(0))
        if weight is not None:
            of_hidden.mul_(weight)
        of_first = scratch("of_first", size, up.shape[1])
        if gated:
            torch.mul(of_hidden, activated, out=of_first[:, width:])
            of_hidden.mul_(seconds[e])
        if for_down:
            # Nothing reads `hidden` after this.
            _product(g.t(), hidden if weight is None else hidden.mul_(weight), of_downs[e])
        if not (for_x or for_up or for_up_bias):
            continue
        derivative(of_hidden, firsts[e], out=of_first[:, :width] if gated else of_first)
        if for_up_bias:
            _product(g.new_ones(1, size), of_first, of_up_bias[e].unsqueeze(0))
        if for_up:
            _product(of_first.t(), scratch.gathered("x", x, tokens[e], size), of_ups[e])
        if for_x:
            of_rows = torch.mm(of_first, _cast(ups[e], g), out=scratch("out", size, x.shape[1]))
            of_rows = of_rows if size == blocks.counts[e] else of_rows[: blocks.counts[e]]
            _add_at(of_x, tokens[e], of_rows, None)
    return of_x.to(x.dtype), of_weight, of_up, of_down, of_up_bias, of_down_bias


def _cast(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def _columns(blocks: Blocks, weight_of_row: Tensor, like: Tensor) -> Sequence[Tensor]:
    """The weights of every expert's rows as a column, zero for the rows that pad its block."""
    columns = blocks.own(_cast(weight_of_row, like)[:, None])
    if sum(blocks.sizes) == sum(blocks.counts):
        return columns
    return [
        torch.nn.functional.pad(column, (0, 0, 0, size - column.shape[0]))
        for column, size in zip(columns, blocks.sizes, strict=False)
    ]


def _gradients(given: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """Room for the gradients of what is given, empty for what is not wanted."""
    like = given[0]
    assert like is not None
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device)
        if w and t is not None
        else like.new_empty(0)
        for t, w in zip(given, wanted, strict=True)
    )


@mixture.register_fake
def _mixture_shape(
    x, token_of_row, weight_of_row, rows_per_expert, up, down, up_bias, down_bias, gated,
    activation, dtype, keep,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    like = x.new_empty(0, dtype=work_dtype(dtype))
    kept, width = room(token_of_row.shape[0], up.shape[0], like) if keep else 0, down.shape[2]
    out = x.new_empty(x.shape[0], down.shape[1], dtype=dtype)
    return out, like.new_empty(kept, width), like.new_empty(kept if gated else 0, width)


@mixture_backward.register_fake
def _mixture_backward_shape(
    grad, x, token_of_row, weight_of_row, rows_per_expert, up, down, up_bias, down_bias, pre, value,
    gated, activation, wanted,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _gradients((x, weight_of_row, up, down, up_bias, down_bias), wanted)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.gated, ctx.activation, _, _ = inputs
    _, pre, value = output
    ctx.mark_non_differentiable(pre, value)
    ctx.set_materialize_grads(False)  # else zeros of the size of pre and value would be made
    ctx.save_for_backward(*tensors, pre, value)


def _differentiate(ctx: Any, grad: Tensor | None, of_pre: None, of_value: None) -> tuple:
    if grad is None:
        return (None,) * 12
    x, _, weight, _, up, down, up_bias, down_bias = ctx.needs_input_grad[:8]
    wanted = [x, weight, up, down, up_bias, down_bias]
    grads = mixture_backward(grad, *ctx.saved_tensors, ctx.gated, ctx.activation, wanted)
    found = [t if w else None for t, w in zip(grads, wanted, strict=True)]
    return found[0], None, found[1], None, *found[2:], None, None, None, None


mixture.register_autograd(_differentiate, setup_context=_keep)
