"""Experts on the CPU, both products of one expert before the next expert begins.

A block of rows, its hidden rows and its result then stay in cache between the products, nothing of
the size of all hidden rows is made by the activation, and the backward pass makes the gradient of
both halves of a gated expert in one buffer. We write that pass by hand, so it exists for the
activations of `_WRITTEN` only, and it has no second derivative.

Shapes: see `base`. Per expert, with x its rows, `act` the activation and * between numbers:

    pre    = x @ up.T         (the gate's half, if gated)        kept for the backward pass
    value  = x @ up[width:].T (if gated)                         kept for the backward pass
    hidden = act(pre) * value (`act(pre)` if plain)              made again from the two
    out    = hidden @ down.T

With d = grad @ down, the gradient of `hidden`: grad_value = d * act(pre), grad_pre = act'(pre) * (d
* value), and the parameters' gradients are grad.T @ hidden and [grad_pre, grad_value].T @ x.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefold.experts.backends.base import AbstractBackend, ExpertWeights
from moefold.ops.grouped import as_linear_casts, blocks, overhang, padded, stretched

_aten = torch.ops.aten

# name: (act(x, out), its derivative at x times grad, into out). Without autograd: these run inside
# of an operator.
_WRITTEN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
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


@final
class FusedBackend(AbstractBackend):
    """One expert at a time, from its rows to its result."""

    def reasons_against(self, rows: Tensor, weights: ExpertWeights) -> list[str]:
        """Other devices than the CPU, and activations whose derivative is not written here."""
        reasons = []
        if rows.device.type != "cpu":
            reasons.append(f"it is for the cpu, and the rows are on {rows.device.type}")
        if weights.activation not in _WRITTEN:
            reasons.append(
                f"it knows the derivative of {', '.join(_WRITTEN)}, not of {weights.activation}"
            )
        return reasons

    def compute(
        self,
        rows: Float[Tensor, "rows dim"],
        rows_per_expert: Int[Tensor, " experts"],
        weights: ExpertWeights,
    ) -> Float[Tensor, "rows dim"]:
        """Apply every expert to its rows."""
        given = (weights.up, weights.down, weights.up_bias, weights.down_bias)
        cast = [None if t is None else as_linear_casts(t)[0] for t in (rows, *given)]
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in cast)
        out, _, _ = _mlp(
            cast[0], rows_per_expert, *cast[1:], weights.gated, weights.activation, keep
        )
        return out


def _placed(rows_per_expert: Tensor, rows: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Yield (expert, its rows, its place among the padded blocks) of every expert with a row."""
    first = 0
    for expert, start, stop in blocks(rows_per_expert, rows.shape[0]):
        last = first + padded(stop - start, rows)
        yield expert, slice(start, stop), slice(first, last)
        first = last


def _room(rows: Tensor, experts: int) -> int:
    """Return the most rows that all padded blocks can have together: see `padded`."""
    count = rows.shape[0]
    return count if padded(1, rows) == 1 else count + count // 32 + 16 * experts


def _linear(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, matrix.t(), out=out)
    # One operation, so that a low-precision sum is rounded once, as in functional.linear.
    return torch.addmm(bias, x, matrix.t(), out=out)


# torch.compile caches graphs on disk by the name of an operator, with the shapes it returned then:
# whoever changes how many rows are kept changes the name too.
@torch.library.custom_op("moefold::fused_experts", mutates_args=())
def _mlp(
    rows: Tensor,
    rows_per_expert: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gated: bool,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, and if `keep` what the backward pass needs: `pre` and `value`."""
    activate, width = _WRITTEN[activation][0], down.shape[2]
    out = rows.new_empty(rows.shape[0] + overhang(rows), down.shape[1])
    room = _room(rows, up.shape[0]) if keep else 0
    kept = rows.new_empty(room, width), rows.new_empty(room if gated else 0, width)
    own, place = slice(0, 0), slice(0, 0)
    for expert, own, place in _placed(rows_per_expert, rows):
        size = place.stop - place.start
        x = stretched(rows[own], size)
        halves = []
        for half, buffer in enumerate(kept[: 1 + gated]):
            product = buffer[place] if keep else rows.new_empty(size, width)
            part = slice(half * width, (half + 1) * width)
            bias = None if up_bias is None else up_bias[expert, part]
            halves.append(_linear(x, up[expert, part], bias, product))
        hidden = activate(halves[0], out=torch.empty_like(halves[0]))
        if gated:
            hidden.mul_(halves[1])
        result = out[own.start : own.start + size]  # what is too much, the next expert writes
        _linear(hidden, down[expert], None if down_bias is None else down_bias[expert], result)
    out[own.stop :].zero_()
    for part in kept:
        part[place.stop :].zero_()
    return out[: rows.shape[0]], *kept


@torch.library.custom_op("moefold::fused_experts_backward", mutates_args=())
def _mlp_backward(
    grad: Tensor,
    rows: Tensor,
    rows_per_expert: Tensor,
    up: Tensor,
    down: Tensor,
    pre: Tensor,
    value: Tensor,
    gated: bool,
    activation: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of rows, up, down and the two biases; empty where not wanted."""
    (activate, derivative), width = _WRITTEN[activation], down.shape[2]
    grads = _gradients(rows, up, down, wanted, overhang(rows))
    grad_rows, grad_up, grad_down, grad_up_bias, grad_down_bias = grads
    for_rows, for_up, for_down, for_up_bias, for_down_bias = wanted
    before, own = 0, slice(0, 0)
    for expert, own, place in _placed(rows_per_expert, rows):
        for t in grads[1:]:
            t[before:expert].zero_()
        before = expert + 1
        size = place.stop - place.start
        x, g = stretched(rows[own], size), stretched(grad[own], size)
        if for_down_bias:
            torch.sum(g, 0, out=grad_down_bias[expert])
        activated = activate(pre[place], out=torch.empty_like(pre[place]))
        if for_down:
            hidden = torch.mul(activated, value[place]) if gated else activated
            torch.mm(g.t(), hidden, out=grad_down[expert])
        if not (for_rows or for_up or for_up_bias):
            continue
        of_hidden = torch.empty_like(activated)
        torch.mm(g, down[expert], out=of_hidden)
        of_first = rows.new_empty(size, up.shape[1])
        if gated:
            torch.mul(of_hidden, activated, out=of_first[:, width:])
            of_hidden.mul_(value[place])
        derivative(of_hidden, pre[place], out=of_first[:, :width])
        if for_up_bias:
            torch.sum(of_first, 0, out=grad_up_bias[expert])
        if for_up:
            torch.mm(of_first.t(), x, out=grad_up[expert])
        if for_rows:
            torch.mm(of_first, up[expert], out=grad_rows[own.start : own.start + size])
    for t in grads[1:]:
        t[before:].zero_()
    grad_rows[own.stop :].zero_()
    return grad_rows[: rows.shape[0]], *grads[1:]


def _gradients(
    rows: Tensor, up: Tensor, down: Tensor, wanted: Sequence[bool], more_rows: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = (
        (rows.shape[0] + more_rows, rows.shape[1]),
        up.shape,
        down.shape,
        up.shape[:2],
        down.shape[:2],
    )
    made = (rows.new_empty(s if w else (0,)) for s, w in zip(shapes, wanted, strict=True))
    return tuple(made)  # pyright: ignore[reportReturnType]


@_mlp.register_fake
def _mlp_shape(
    rows, rows_per_expert, up, down, up_bias, down_bias, gated, activation, keep
) -> tuple[Tensor, Tensor, Tensor]:
    room, width = _room(rows, up.shape[0]) if keep else 0, down.shape[2]
    out = rows.new_empty(rows.shape[0], down.shape[1])
    return out, rows.new_empty(room, width), rows.new_empty(room if gated else 0, width)


@_mlp_backward.register_fake
def _mlp_backward_shape(
    grad, rows, rows_per_expert, up, down, pre, value, gated, activation, wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(rows, up, down, wanted)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    rows, counts, up, down, _, _, ctx.gated, ctx.activation, _ = inputs
    _, pre, value = output
    ctx.mark_non_differentiable(pre, value)
    ctx.set_materialize_grads(False)  # else zeros of the size of pre and value would be made
    ctx.save_for_backward(rows, counts, up, down, pre, value)


def _differentiate(ctx: Any, grad: Tensor | None, of_pre: None, of_value: None) -> tuple:
    if grad is None:
        return (None,) * 9
    rows, _, up, down, up_bias, down_bias = ctx.needs_input_grad[:6]
    wanted = [rows, up, down, up_bias, down_bias]
    grads = _mlp_backward(grad, *ctx.saved_tensors, ctx.gated, ctx.activation, wanted)
    found = [t if w else None for t, w in zip(grads, wanted, strict=True)]
    return found[0], None, *found[1:], None, None, None


_mlp.register_autograd(_differentiate, setup_context=_keep)
