"""Experts on a GPU by kernels of our own, from tokens to tokens, for any list of rows.

Forward: gather + product + activation, second product, weighted sum of each token's rows. Kept for
the backward pass are the tokens, the first products `pre`, and the routing: neither copies of the
tokens nor results of rows, so that nothing as large as `rows dim` outlives a pass. Backward makes
hidden rows again from `pre`, and the gradient of a row's weight from them (`ops.triton.hidden`).
Nothing waits for the device, every sum has one order, and there is no second derivative.

Shapes: see `base`. `inputs` are tokens, or rows where there is no `token_of_row`.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefold.experts.backends.base import AbstractMixer, ExpertWeights
from moefold.ops import kernels
from moefold.ops.grouped import as_linear_casts
from moefold.ops.triton.blocks import of_rows
from moefold.ops.triton.schedule import RowsOfTokens, rows_of_tokens, schedule
from moefold.routing import SparseRouting

ACTIVATIONS = (
    "gelu",
    "gelu_tanh",
    "identity",
    "quick_gelu",
    "relu",
    "relu2",
    "sigmoid",
    "silu",
    "tanh",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INSTALLED = importlib.util.find_spec("triton") is not None


@final
class TritonBackend(AbstractMixer):
    """Kernels in Triton, one per family; see `moefold.ops.triton`."""

    def reasons_against(self, rows: Tensor, weights: ExpertWeights) -> list[str]:
        """No Triton, another device or dtype, an activation without a kernel."""
        reasons = []
        if not _INSTALLED:
            reasons.append("triton is not installed (pip install triton, on Linux)")
        reasons.extend(_about_device(rows))
        if rows.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            reasons.append(f"it adds up in float32, for {known}, not for {rows.dtype}")
        if weights.activation not in ACTIVATIONS:
            reasons.append(
                f"it has kernels for {', '.join(ACTIVATIONS)}, not for {weights.activation}"
            )
        return reasons

    def compute(
        self,
        rows: Float[Tensor, "rows dim"],
        rows_per_expert: Int[Tensor, " experts"],
        weights: ExpertWeights,
    ) -> Float[Tensor, "rows dim"]:
        """Apply every expert to its rows."""
        return _run(rows, None, None, rows_per_expert, weights)

    def mix(
        self, x: Float[Tensor, "tokens dim"], routing: SparseRouting, weights: ExpertWeights
    ) -> Float[Tensor, "tokens dim"]:
        """Apply to every token its experts, and add up their results by weight."""
        weight = routing.weight_of_row.float()
        return _run(x, weight, routing.token_of_row, routing.rows_per_expert, weights)


def _about_device(rows: Tensor) -> list[str]:
    kind = rows.device.type
    if kind == "cpu":
        # Nobody but a test wants the interpreter, even where the variable that starts it is set.
        if kernels.everywhere and os.environ.get("TRITON_INTERPRET") == "1":
            return []
        return ["it is for cuda, and the rows are on cpu"]
    if kind != "cuda":
        return [f"it is for cuda, and the rows are on {kind}"]
    # of all that tells the capability, what torch.compile can read
    if rows.dtype == torch.bfloat16 and torch.cuda.get_device_properties(rows.device).major < 8:
        return ["its bfloat16 products need a device of compute capability 8.0 or more"]
    return []


def _run(
    x: Tensor,
    weight_of_row: Tensor | None,
    token_of_row: Tensor | None,
    rows_per_expert: Tensor,
    weights: ExpertWeights,
) -> Tensor:
    given = (x, weights.up, weights.down, weights.up_bias, weights.down_bias)
    cast = [None if t is None else as_linear_casts(t)[0] for t in given]
    leaves = (*cast, weight_of_row)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    out, *_ = _mix(
        cast[0],
        weight_of_row,
        token_of_row,
        rows_per_expert,
        *cast[1:],
        weights.gated,
        weights.activation,
        keep,
    )
    return out


# torch.compile caches graphs on disk by the name of an operator, with the shapes it returned then:
# whoever changes what is returned changes the name too.
@torch.library.custom_op("moefold::triton_experts", mutates_args=())
def _mix(
    x: Tensor,
    weight_of_row: Tensor | None,
    token_of_row: Tensor | None,
    rows_per_expert: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gated: bool,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result, and for the backward pass `pre` (if `keep`) and the rows of tokens."""
    from moefold.ops.triton.combine import combine
    from moefold.ops.triton.first import first
    from moefold.ops.triton.pieces import on_device_of
    from moefold.ops.triton.second import second

    out, pre, order, bounds = _mix_shape(
        x, weight_of_row, token_of_row, rows_per_expert, up, down, None, None, gated, "", keep
    )
    count = x.shape[0] if token_of_row is None else token_of_row.shape[0]
    token_of_row, weight_of_row = _dense(token_of_row), _dense(weight_of_row)
    with on_device_of(x):
        blocks = of_rows(x, count, up.shape[0])
        tiles = schedule(rows_per_expert, count, blocks.rows)
        hidden = x.new_empty(count, down.shape[2])
        kept = pre if keep else None
        first(x, token_of_row, up, up_bias, tiles, blocks, activation, hidden, kept)
        if token_of_row is None:
            second(hidden, down, down_bias, tiles, blocks, out, clear_spare=True)
            return out, pre, order, bounds
        rows = x.new_empty(count, down.shape[1])
        second(hidden, down, down_bias, tiles, blocks, rows, clear_spare=False)
        del hidden
        of_tokens = rows_of_tokens(token_of_row, rows_per_expert, x.shape[0])
        combine(rows, weight_of_row, of_tokens, out)
    return out, pre, of_tokens.order, of_tokens.bounds


def _dense(of_row: Tensor | None) -> Tensor | None:
    """The same numbers side by side: a routing may hold a column of a list of pairs."""
    return None if of_row is None else of_row.contiguous()


@_mix.register_fake
def _mix_shape(
    x, weight_of_row, token_of_row, rows_per_expert, up, down, up_bias, down_bias, gated, act, keep
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gathered = token_of_row is not None
    rows = token_of_row.shape[0] if gathered else x.shape[0]
    return (
        x.new_empty(x.shape[0], down.shape[1]),
        x.new_empty(rows if keep else 0, up.shape[1]),
        x.new_empty(rows if gathered else 0, dtype=torch.int32),
        x.new_empty(x.shape[0] + 1 if gathered else 0, dtype=torch.int32),
    )


@torch.library.custom_op("moefold::triton_experts_backward", mutates_args=())
def _mix_backward(
    grad: Tensor,
    x: Tensor,
    weight_of_row: Tensor | None,
    token_of_row: Tensor | None,
    rows_per_expert: Tensor,
    up: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    pre: Tensor,
    order: Tensor,
    bounds: Tensor,
    activation: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weights of rows, up, down and the biases; empty if not wanted."""
    from moefold.ops.triton.combine import combine
    from moefold.ops.triton.hidden import columns_of, hidden_backward
    from moefold.ops.triton.pieces import on_device_of
    from moefold.ops.triton.second import second
    from moefold.ops.triton.weights import outer, sums

    grads = _gradients(x, weight_of_row, up, down, wanted)
    of_x, of_weight, of_up, of_down, of_up_bias, of_down_bias = grads
    for_x, for_weight, for_up, for_down, for_up_bias, for_down_bias = wanted
    gathered, rows, width = token_of_row is not None, pre.shape[0], down.shape[2]
    token_of_row, weight_of_row = _dense(token_of_row), _dense(weight_of_row)
    with on_device_of(x):
        blocks = of_rows(x, rows, up.shape[0])
        tiles = schedule(rows_per_expert, rows, blocks.rows)
        if for_down_bias:
            sums(grad, token_of_row, weight_of_row, tiles.row_bounds, of_down_bias)
        if not any(wanted[:5]):
            return grads
        # Filled with zeros because that is what the weights of spare rows get.
        parts = pre.new_zeros(columns_of(blocks, width), rows, dtype=torch.float32)
        of_pre, weighted = torch.empty_like(pre), pre.new_empty(rows, width)
        hidden_backward(
            grad,
            token_of_row,
            weight_of_row,
            down,
            down_bias,
            pre,
            tiles,
            blocks,
            activation,
            of_pre,
            weighted if for_down else None,
            parts if for_weight else None,
        )
        if for_weight:
            torch.sum(parts, 0, out=of_weight)
        if for_down:
            outer(grad, weighted, token_of_row, tiles.row_bounds, of_down, gather_left=gathered)
        del weighted
        if for_up:
            outer(of_pre, x, token_of_row, tiles.row_bounds, of_up, gather_right=gathered)
        if for_up_bias:
            sums(of_pre, None, None, tiles.row_bounds, of_up_bias)
        if for_x:
            back = x.new_empty(rows, x.shape[1]) if gathered else of_x
            second(of_pre, up.mT, None, tiles, blocks, back, clear_spare=not gathered)
            if gathered:
                combine(back, None, RowsOfTokens(order, bounds), of_x)
    return grads


def _gradients(
    x: Tensor, weight_of_row: Tensor | None, up: Tensor, down: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = (0,) if weight_of_row is None else weight_of_row.shape
    shapes = (x.shape, rows, up.shape, down.shape, up.shape[:2], down.shape[:2])
    dtypes = (x.dtype, torch.float32, *[x.dtype] * 4)
    given = zip(shapes, dtypes, wanted, strict=True)
    made = (x.new_empty(s if w else (0,), dtype=d) for s, d, w in given)
    return tuple(made)  # pyright: ignore[reportReturnType]


@_mix_backward.register_fake
def _mix_backward_shape(
    grad, x, weight, token, counts, up, down, down_bias, pre, order, bounds, activation, wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, weight, up, down, wanted)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, token, counts, up, down, _, down_bias, _, ctx.activation, _ = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # else zeros of the size of pre would be made
    ctx.save_for_backward(x, weight, token, counts, up, down, down_bias, *kept)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple:
    if grad is None:
        return (None,) * 11
    x, weight, _, _, up, down, up_bias, down_bias = ctx.needs_input_grad[:8]
    wanted = [x, weight, up, down, up_bias, down_bias]
    grads = _mix_backward(grad, *ctx.saved_tensors, ctx.activation, wanted)
    found = [t if w else None for t, w in zip(grads, wanted, strict=True)]
    return *found[:2], None, None, *found[2:], None, None, None


_mix.register_autograd(_differentiate, setup_context=_keep)
