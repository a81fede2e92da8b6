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

An expert's hidden rows and its results stay in cache from the first product to the sum: nothing of
the size of all rows is made but `pre` and `value`. Compiled code does that for experts with up to a
thousand rows (`ops.cpu.experts`), and torch's operations for all others (`fused_torch`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moefold.experts.backends import fused_torch
from moefold.experts.backends.fused_blocks import room
from moefold.experts.backends.fused_workers import share_out, workers_for
from moefold.ops.cpu import experts
from moefold.ops.cpu.eager import (
    has_a_mode,
    hides_its_memory,
    is_forward_mode,
    is_transformed,
)
from moefold.ops.cpu.expert_rows import ExpertRows, readable
from moefold.ops.cpu.pages import in_huge_pages
from moefold.ops.grouped import padded, too_few_rows
from moefold.ops.precise import work_dtype


# torch.compile caches graphs on disk by the name of an operator, with the shapes it returned then:
# whoever changes how many rows are kept, or in which dtype, changes the name too.
@torch.library.custom_op("moefold::fused_experts", mutates_args=())
def mixture(
    x: Tensor,
    token_of_row: Tensor | None,
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
    """Return the result, and if `keep` what the backward pass needs: `pre`, `value`; in `dtype`.

    Args:
        x: the tokens.
        token_of_row: the token of every row; None if row r is token r.
        weight_of_row: what is added to a token is multiplied by it; None for 1.
        rows_per_expert: how many rows each expert has.
        up: first matrices.
        down: second matrices.
        up_bias: added after the first product.
        down_bias: added after the second product.
        gated: whether half of the first product gates the other half.
        activation: a name of `fused_hidden.WRITTEN`.
        dtype: of all that is returned. What is computed in is `work_dtype` of it; inputs are cast.
        keep: whether there will be a backward pass.

    Raises:
        ValueError: counts below 0 or beyond the rows; a token that is not there.
    """
    width, dim, rows = down.shape[2], down.shape[1], _rows(token_of_row, x)
    like, counts = x.new_empty(0, dtype=work_dtype(dtype)), _counts(rows_per_expert, rows)
    kept_rows = room(rows, up.shape[0], like) if keep else 0
    kept = (
        in_huge_pages(x.new_empty(kept_rows, width, dtype=dtype)),
        in_huge_pages(x.new_empty(kept_rows if gated else 0, width, dtype=dtype)),
    )
    if not sum(counts):
        return x.new_zeros(x.shape[0], dim, dtype=dtype), kept[0].zero_(), kept[1].zero_()
    # Sums over the experts of a token are rounded once, at their end.
    sum_dtype = torch.promote_types(dtype, torch.float32)
    given = ExpertRows(
        counts=counts,
        kept_counts=_kept_counts(counts, like),
        paired=like.dtype == torch.bfloat16,
        tokens=_tokens(token_of_row, counts, x.shape[0]),
        weights=_as_read(weight_of_row, sum_dtype),
        x=x,
        up=up,
        down=down,
        up_bias=_as_read(up_bias, sum_dtype),
        down_bias=_as_read(down_bias, sum_dtype),
        pre=kept[0] if keep else None,
        value=kept[1] if keep and gated else None,
        gated=gated,
        activation=activation,
    )
    plan = _plan(given, like, sum_dtype)
    sums = _sums(plan, token_of_row, x.new_zeros(x.shape[0], dim, dtype=sum_dtype))
    if plan.shares:
        experts.forward(readable(given), plan.shares, sums)
    if plan.leaves_some:
        fused_torch.forward(given, sums, like, compiled=plan.can_compile)
    if keep:
        used = sum(given.kept_counts)
        for part in kept:
            part[used:].zero_()
    return total(sums).to(dtype), *kept


def _counts(rows_per_expert: Tensor, rows: int) -> list[int]:
    counts = rows_per_expert.tolist()
    if min(counts) < 0:
        raise ValueError(f"rows_per_expert is {counts}; no expert can have fewer than 0 rows")
    if sum(counts) > rows:
        raise ValueError(too_few_rows(sum(counts), rows))
    return counts


def _rows(token_of_row: Tensor | None, x: Tensor) -> int:
    return x.shape[0] if token_of_row is None else token_of_row.shape[0]


def _tokens(token_of_row: Tensor | None, counts: Sequence[int], tokens: int) -> Tensor:
    """The token of every row as compiled code reads it, which sees neither memory nor ends.

    Raises:
        ValueError: a row names a token that is not there; the index is not on the CPU.
    """
    if token_of_row is None:
        return torch.arange(tokens, device="cpu")
    index = token_of_row.to(torch.int64).contiguous()
    if index.device.type != "cpu":
        raise ValueError(
            f"token_of_row is on {index.device}, but its tokens are on the cpu; move the routing"
        )
    wrong = experts.first_beyond(index, tokens) if sum(counts) else None
    if wrong is not None:
        raise ValueError(
            f"token_of_row names token {wrong}, but there are {tokens}; a routing belongs to the "
            f"tokens it was made for"
        )
    return index


def _kept_counts(counts: Sequence[int], like: Tensor) -> Sequence[int]:
    """Rows that are kept of each expert, whoever computes it; with those that torch pads it by."""
    return counts if padded(1, like) == 1 else [padded(n, like) for n in counts]


def _as_read(numbers: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if numbers is None else numbers.to(dtype).contiguous()


class _Plan(NamedTuple):
    """Who computes.

    Attributes:
        workers: how many threads, each of them alone.
        can_compile: whether compiled code may compute.
        shares: the experts that it does compute, by worker; empty if none.
        leaves_some: whether there are others.
    """

    workers: int
    can_compile: bool
    shares: list[list[int]]
    leaves_some: bool


def _plan(given: ExpertRows, like: Tensor, sum_dtype: torch.dtype) -> _Plan:
    workers, written = workers_for(sum(given.counts), given.up, given.down), given.of_weights
    can_compile = (
        workers > 0
        and sum_dtype == torch.float32
        and (written is None or written.dtype == torch.float32)
        and experts.can_compute(like, given.up, given.down)
    )
    counts, backward = given.counts, given.grad is not None
    workers = max(min(workers, len(counts) - counts.count(0)), 1)
    # Without rows there is nothing to do forward; zeros in the backward pass are some work, too.
    busy = [i for i, count in enumerate(counts) if count or backward]
    own = [i for i in busy if experts.suits(counts[i])] if can_compile else []
    parts = share_out([max(counts[i], 1) for i in own], workers)
    shares = [[own[i] for i in part] for part in parts] if own else []
    return _Plan(workers, can_compile, shares, len(own) < len(busy))


@torch.library.custom_op("moefold::fused_experts_backward", mutates_args=())
def mixture_backward(
    grad: Tensor,
    x: Tensor,
    token_of_row: Tensor | None,
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
    """Return the gradients of x, weights of rows, up, down and the biases; empty if not wanted.

    Raises:
        ValueError: as `mixture`.
    """
    like = pre.new_empty(0, dtype=work_dtype(pre.dtype))
    leaves = (x, weight_of_row, up, down, up_bias, down_bias)
    for_x, for_weight, for_up, for_down, for_up_bias, for_down_bias = wanted
    sum_dtype = torch.promote_types(x.dtype, torch.float32)
    first_sum = for_x and x.dtype == sum_dtype  # else it is rounded into other memory at the end
    of_x, of_weight, of_up, of_down, of_up_bias, of_down_bias = _gradients(
        leaves, [first_sum, *wanted[1:]]
    )
    counts = _counts(rows_per_expert, _rows(token_of_row, x))
    given = ExpertRows(
        counts=counts,
        kept_counts=_kept_counts(counts, like),
        paired=like.dtype == torch.bfloat16,
        tokens=_tokens(token_of_row, counts, x.shape[0]),
        weights=_as_read(weight_of_row, sum_dtype),
        x=x,
        up=up,
        down=down,
        up_bias=_as_read(up_bias, sum_dtype),
        down_bias=_as_read(down_bias, sum_dtype),
        pre=pre.contiguous(),  # whoever saved it may have given it another layout
        value=value.contiguous() if gated else None,
        gated=gated,
        activation=activation,
        grad=grad,
        of_weights=of_weight.zero_() if for_weight else None,
        of_up=of_up if for_up else None,
        of_down=of_down if for_down else None,
        of_up_bias=of_up_bias.to(sum_dtype) if for_up_bias else None,
        of_down_bias=of_down_bias.to(sum_dtype) if for_down_bias else None,
    )
    plan, size = _plan(given, like, sum_dtype), x.shape if for_x else (0,)
    first = of_x.zero_() if first_sum else x.new_zeros(size, dtype=sum_dtype)
    sums = _sums(plan, token_of_row, first)
    if plan.shares:
        compiled_sums = sums if for_x else [None] * plan.workers
        experts.backward(readable(given), plan.shares, compiled_sums)
    if plan.leaves_some:
        fused_torch.backward(given, sums, like, for_x=for_x, compiled=plan.can_compile)
    of_x = total(sums).to(x.dtype)
    for made, out in ((given.of_up_bias, of_up_bias), (given.of_down_bias, of_down_bias)):
        if made is not None and made is not out:
            out.copy_(made)  # rounded once, from the dtype that is computed in
    return of_x, of_weight, of_up, of_down, of_up_bias, of_down_bias


def _sums(plan: _Plan, token_of_row: Tensor | None, first: Tensor) -> list[Tensor]:
    """What each worker adds its rows to: where no two have a token in common, all to the same."""
    if token_of_row is None:
        return [first] * plan.workers
    return [first, *(torch.zeros_like(first) for _ in range(plan.workers - 1))]


def total(sums: Sequence[Tensor]) -> Tensor:
    """What all workers have, added in their order."""
    first, *others = sums
    for other in others:
        if other is not first:
            first.add_(other)
    return first


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
    like, width = x.new_empty(0, dtype=work_dtype(dtype)), down.shape[2]
    kept = room(_rows(token_of_row, x), up.shape[0], like) if keep else 0
    sizes = ((x.shape[0], down.shape[1]), (kept, width), (kept if gated else 0, width))
    out, pre, value = (x.new_empty(size, dtype=dtype) for size in sizes)
    return out, pre, value


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
    saved = ctx.saved_tensors  # once: checkpointing makes them anew, and refuses to do it twice
    if any(hides_its_memory(part) for part in (grad, *saved) if part is not None):
        run = mixture_backward
    grads = run(grad, *saved, ctx.gated, ctx.activation, wanted)
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


def mix(*given: Any) -> Tensor:
    """Run the operator (see `mixture` for what it is given), at what it costs here.

    torch's dispatcher of custom operators takes longer than all else around a few tokens. It is
    needed where something wants to see the operator: a compiler, a mode, a function transform, a
    subclass of tensors.

    Raises:
        NotImplementedError: within forward-mode differentiation, which would get zeros.
    """
    if is_forward_mode():
        raise NotImplementedError(
            "the fused backend has no forward-mode derivative; choose backend='reference' for it"
        )
    tensors = [part for part in given if isinstance(part, Tensor)]
    # The transforms first: a graph cannot hold the questions after them.
    if is_transformed() or has_a_mode() or any(hides_its_memory(part) for part in tensors):
        return mixture(*given)[0]
    keep = given[-1]
    return (_Mixture.apply if keep else mixture._init_fn)(*given)[0]
