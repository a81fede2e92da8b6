"""The operators of the fused backend: tokens or rows through their experts, block by block.

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

A block of rows (see `fused_blocks`), its hidden rows and its result stay in cache from the first
product to the sum: nothing of the size of all rows is made but `pre` and `value`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moefold.experts.backends.fused_blocks import Blocks, room
from moefold.experts.backends.fused_parts import Part, make_parts, total
from moefold.experts.backends.fused_products import Linears, Picked, Sums, in_dtype_of
from moefold.experts.backends.fused_workers import run_on, workers_for
from moefold.ops.cpu import products
from moefold.ops.cpu.pages import in_huge_pages

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

    A processor without instructions for bfloat16 or float16 multiplies such matrices tens of times
    slower than float32 ones; there a block is cast, computed in float32 and rounded at its end.
    """
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return torch.float32
    return dtype


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
    activate, width, dim = WRITTEN[activation][0], down.shape[2], down.shape[1]
    rows, like = token_of_row.shape[0], x.new_empty(0, dtype=work_dtype(dtype))
    blocks, workers = _blocks(rows_per_expert, rows, up, down, like)
    kept_rows = room(rows, up.shape[0], like) if keep else 0
    kept = like.new_empty(kept_rows, width), like.new_empty(kept_rows if gated else 0, width)
    if not len(blocks):
        nothing = x.new_zeros(x.shape[0], dim, dtype=dtype)
        return nothing, kept[0].zero_(), kept[1].zero_()
    firsts, seconds = (blocks.padded(part) if part.shape[0] else None for part in kept)
    # Sums over the experts of a token are rounded once, at their end.
    sum_dtype = torch.promote_types(dtype, torch.float32)
    tokens = _tokens(blocks, token_of_row, x.shape[0])
    weights = None
    if weight_of_row is not None:
        weights = blocks.own(weight_of_row.to(sum_dtype).contiguous())
    turned = up.transpose(1, 2)
    to_pre, to_value = (
        Linears(blocks, turned[..., half], None if up_bias is None else up_bias[:, half])
        for half in (slice(width), slice(width, None))
    )
    to_out = Linears(blocks, down.transpose(1, 2), down_bias)

    def through(part: Part) -> None:
        scratch = part.scratch
        for i in part.share:
            block = blocks[i]
            found = Picked(block, x, tokens[i], scratch, "x")
            pre = scratch("pre", block.size) if firsts is None else firsts[i]
            to_pre(block, found, pre, scratch)
            hidden = activate(pre, out=scratch("hidden", block.size))
            if gated:
                value = scratch("value", block.size) if seconds is None else seconds[i]
                to_value(block, found, value, scratch)
                hidden.mul_(value)
            weight = None if weights is None else weights[i]
            to_out.add_to(part.sums, tokens[i], block, hidden, weight, scratch)

    widths = {"x": x.shape[1], "hidden": width, "out": dim}
    if not keep:
        widths |= {"pre": width, "value": width} if gated else {"pre": width}
    parts = make_parts(blocks, workers, x.new_zeros(x.shape[0], dim, dtype=sum_dtype), widths, like)
    run_on(parts, through)
    for part in kept:
        part[blocks.size :].zero_()
    return total(parts).to(dtype), *kept


def _tokens(blocks: Blocks, token_of_row: Tensor, tokens: int) -> Sequence[Tensor]:
    """The token of every row, by block, as compiled code reads it: that cannot see a wrong one.

    Raises:
        ValueError: a row names a token that is not there.
    """
    index = token_of_row.to(torch.int64).contiguous()
    if len(blocks):
        first, last = (int(end) for end in index.aminmax())
        if first < 0 or last >= tokens:
            wrong = first if first < 0 else last
            raise ValueError(
                f"token_of_row names token {wrong}, but there are {tokens}; a routing belongs to "
                f"the tokens it was made for"
            )
    return blocks.own(index)


def _blocks(
    rows_per_expert: Tensor, rows: int, up: Tensor, down: Tensor, like: Tensor
) -> tuple[Blocks, int]:
    """The blocks, and among how many threads to share them."""
    workers = workers_for(rows, up, down)
    # Compiled code runs in one thread, and is no match for torch's where that has several.
    alone = workers > 1 or torch.get_num_threads() == 1
    compiled = rows > 0 and alone and products.can_multiply(like, up, down)
    blocks = Blocks(
        rows_per_expert, rows, max(up.shape[1:]), like, workers=workers, compiled=compiled
    )
    return blocks, workers


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
    for_x, for_weight, *_ = wanted
    blocks, workers = _blocks(rows_per_expert, token_of_row.shape[0], up, down, pre)
    blocks.zero_idle(*(t for t, w in zip(made[2:], wanted[2:], strict=True) if w))
    of_weight.zero_()
    tokens, firsts = _tokens(blocks, token_of_row, x.shape[0]), blocks.padded(pre)
    seconds = blocks.padded(value) if gated else firsts
    weights = None if weight_of_row is None else _columns(blocks, weight_of_row, pre)
    back_down, back_up = Linears(blocks, down), Linears(blocks, up)
    along_bias = None if down_bias is None else Linears(blocks, down_bias.unsqueeze(2))
    of_weights = blocks.own(of_weight) if for_weight else tokens
    sum_up, sum_down = (Sums(blocks, t) if t.numel() else None for t in (of_up, of_down))
    sum_up_bias, sum_down_bias = (
        Sums(blocks, t.unsqueeze(1)) if t.numel() else None for t in (of_up_bias, of_down_bias)
    )
    goes_on = for_x or sum_up is not None or sum_up_bias is not None  # through the activation

    def back(part: Part) -> None:
        scratch = part.scratch
        for i in part.share:
            block, weight = blocks[i], None if weights is None else weights[i]
            size = block.size
            g = Picked(block, grad, tokens[i], scratch, "grad")
            hidden = activated = activate(firsts[i], out=scratch("activated", size))
            if gated:
                hidden = torch.mul(activated, seconds[i], out=scratch("hidden", size))
            of_hidden = scratch("of_hidden", size)
            if for_weight or goes_on:
                back_down(block, g, of_hidden, scratch)
            if for_weight:
                both = torch.mul(of_hidden, hidden, out=scratch("products", size))
                both = both if size == block.count else both[: block.count]
                torch.sum(both, 1, dtype=of_weight.dtype, out=of_weights[i])
                if along_bias is not None:
                    of_bias = scratch("of_bias", size)
                    along_bias(block, g, of_bias, scratch)
                    of_weights[i].add_(of_bias[: block.count, 0])
            if sum_down_bias:
                ones = hidden.new_ones(size, 1)
                sum_down_bias(block, ones if weight is None else weight, g, scratch)
            if sum_down:
                # Nothing reads `hidden` after this.
                hidden = hidden if weight is None else hidden.mul_(weight)
                sum_down(block, g, hidden, scratch)
            if not goes_on:
                continue
            if weight is not None:
                of_hidden.mul_(weight)
            of_first = scratch("of_first", size) if gated else of_hidden
            if gated:
                torch.mul(of_hidden, activated, out=of_first[:, width:])
                of_hidden.mul_(seconds[i])
            derivative(of_hidden, firsts[i], out=of_first[:, :width])
            if sum_up_bias:
                sum_up_bias(block, of_first.new_ones(size, 1), of_first, scratch)
            if sum_up:
                found = Picked(block, x, tokens[i], scratch, "x")
                sum_up(block, of_first, found, scratch)
            if for_x:
                back_up.add_to(part.sums, tokens[i], block, of_first, None, scratch)

    widths = {"grad": grad.shape[1], "activated": width, "of_hidden": width}
    if gated:
        widths |= {"hidden": width, "of_first": up.shape[1]}
    if for_weight:
        widths |= {"products": width, "of_bias": 1}
    if sum_up:
        widths["x"] = x.shape[1]
    if for_x:
        widths["out"] = x.shape[1]
    sums = of_x.to(torch.promote_types(x.dtype, torch.float32)).zero_()
    parts = make_parts(blocks, workers, sums, widths, pre)
    run_on(parts, back)
    return total(parts).to(x.dtype), of_weight, of_up, of_down, of_up_bias, of_down_bias


def _columns(blocks: Blocks, weight_of_row: Tensor, like: Tensor) -> Sequence[Tensor]:
    """The weights of every block's rows as a column, zero for the rows that pad it."""
    columns = blocks.own(in_dtype_of(weight_of_row, like)[:, None])
    if not blocks.is_padded:
        return columns
    return [
        torch.nn.functional.pad(column, (0, 0, 0, block.size - block.count))
        for column, block in zip(columns, blocks, strict=False)
    ]


def _gradients(given: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """Room for the gradients of what is given, empty for what is not wanted."""
    like = given[0]
    assert like is not None
    return tuple(
        in_huge_pages(torch.empty(t.shape, dtype=t.dtype, device=t.device))
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


def _differentiate(ctx: Any, grad: Tensor | None, *of_kept: None) -> tuple:
    return _gradients_of(ctx, grad, mixture_backward)


def _gradients_of(ctx: Any, grad: Tensor | None, run: Callable[..., Any]) -> tuple:
    if grad is None:
        return (None,) * 12
    x, _, weight, _, up, down, up_bias, down_bias = ctx.needs_input_grad[:8]
    wanted = [x, weight, up, down, up_bias, down_bias]
    run = mixture_backward if _is_lazy(grad) else run
    grads = run(grad, *ctx.saved_tensors, ctx.gated, ctx.activation, wanted)
    found = [t if w else None for t, w in zip(grads, wanted, strict=True)]
    return found[0], None, found[1], None, *found[2:], None, None, None, None


mixture.register_autograd(_differentiate, setup_context=_keep)


class _Mixture(torch.autograd.Function):
    """The operator and its gradient, called as functions."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        made = mixture._init_fn(*given)
        _keep(ctx, given, made)  # as setup_context, torch would inspect signatures in every pass
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradients_of(ctx, grads[0], mixture_backward._init_fn)


def _is_lazy(tensor: Tensor) -> bool:
    """Whether its memory does not hold its numbers; the dispatcher writes them out."""
    return tensor.is_neg() or tensor._is_zerotensor()  # pyright: ignore[reportAttributeAccessIssue]


def mix(*given: Any) -> Tensor:
    """Run the operator (see `mixture` for what it is given), at what it costs here.

    torch's dispatcher of custom operators takes longer than all else around a few tokens. It is
    needed where something wants to see the operator: a compiler, a mode, a function transform, a
    subclass of tensors.
    """
    tensors = [part for part in given if isinstance(part, Tensor)]
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or any(type(part) not in (Tensor, nn.Parameter) or _is_lazy(part) for part in tensors)
    )
    if watched:
        return mixture(*given)[0]
    keep = given[-1]
    return (_Mixture.apply if keep else mixture._init_fn)(*given)[0]
