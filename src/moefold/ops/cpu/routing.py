"""The best experts of every token, and the list of rows sorted by expert, by compiled code.

Shapes: `*tokens experts` pairs, `rows` those that are chosen. The slow twins are `ops.select.top`
with `ops.weigh`, and `ops.rows_torch.list_reference`.
"""

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moefold.ops.cpu.compiled import library
from moefold.ops.cpu.eager import (
    has_a_mode,
    hides_its_memory,
    is_forward_mode,
    is_transformed,
)
from moefold.ops.cpu.team import run_compiled_together
from moefold.ops.rows_torch import Rows, list_reference
from moefold.ops.select import top
from moefold.ops.weigh import weigh, weigh_backward

MOST_EXPERTS = 1024
MOST_CHOSEN = 32
"""One after another is picked, in memory on the stack: with more of them a sort is faster."""

BLOCK = 256
"""Tokens that a thread takes at once."""

WORTH_IT = 1 << 15
"""Pairs from which on threads are used."""


def serves(
    *numbers: Tensor,
    marks: Sequence[Tensor] = (),
    indices: Sequence[Tensor] = (),
    as_operator: bool = False,
) -> bool:
    """Whether compiled code can read these tensors, and nobody wants to see what is done to them.

    Args:
        *numbers: it reads float32.
        marks: it reads bool.
        indices: it reads int64.
        as_operator: a mode may look on, or a compiler, because it will see operators. Not a
            program that is exported, which must run where moefold is not installed.
    """
    every = (*numbers, *marks, *indices)
    for tensors, dtype in ((numbers, torch.float32), (marks, torch.bool), (indices, torch.int64)):
        for tensor in tensors:
            if tensor.dtype != dtype or not tensor.is_cpu:
                return False
    if torch.compiler.is_compiling():  # a graph cannot hold the questions below
        return (
            as_operator
            and not torch.compiler.is_exporting()
            and not torch._C._are_functorch_transforms_active()
            and not is_forward_mode()
        )
    return (
        not is_transformed()
        and not any(hides_its_memory(tensor) for tensor in every)
        and (as_operator or not has_a_mode())
        and _functions() is not None
    )


def choose(
    contest: Tensor,
    scores: Tensor,
    k: int,
    *,
    real: Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Which experts each token takes, and with what weight: for tensors that this `serves`.

    Args:
        contest: the `k` highest are chosen, the lowest index first among equals; has no gradient.
        scores: what weights are made of, see `weigh`.
        k: experts of a token.
        real: tokens that choose; all if None.
        normalize: see `weigh`.
        scale: see `weigh`.

    Raises:
        ValueError: sizes that do not belong together, or are too large.
    """
    if contest.shape != scores.shape or scores.ndim < 2:
        raise ValueError(f"contest is {list(contest.shape)}, but scores are {list(scores.shape)}")
    experts = scores.shape[-1]
    if experts > MOST_EXPERTS:
        raise ValueError(f"there are {experts} experts; at most {MOST_EXPERTS} are allowed")
    most = min(experts, MOST_CHOSEN)
    if not 0 < k <= most:
        raise ValueError(f"k is {k}; of {experts} experts it must be from 1 to {most}")
    if real is not None and real.shape != scores.shape[:-1]:
        raise ValueError(f"real is {list(real.shape)}, but scores are {list(scores.shape)}")
    given = contest, scores, k, real, normalize, scale
    if torch.compiler.is_compiling():
        return _chosen(*given)
    wants_gradient = torch.is_grad_enabled() and scores.requires_grad
    return _Choose.apply(*given) if wants_gradient else _run(_chosen, *given)


def list_rows(chosen: Tensor, weights: Tensor) -> Rows:
    """The list of chosen pairs, for tensors that this `serves`.

    Raises:
        ValueError: sizes that do not belong together.
    """
    if chosen.shape != weights.shape or chosen.ndim < 2:
        raise ValueError(f"chosen is {list(chosen.shape)}, but weights {list(weights.shape)}")
    wants_gradient = torch.is_grad_enabled() and weights.requires_grad
    return Rows(*_List.apply(chosen, weights)) if wants_gradient else _listed(chosen, weights)


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        made = _run(_chosen, *given)
        _keep(ctx, given, made)
        return made

    @staticmethod
    def backward(ctx: Any, _: None, of_weights: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        if of_weights is None:
            return (None,) * 6
        scores, chosen = ctx.saved_tensors
        given = chosen, scores, of_weights, *ctx.settings
        # Whoever differentiates twice needs a graph of what follows.
        twice = torch.is_grad_enabled()
        if not twice and serves(scores, of_weights, marks=[chosen], as_operator=True):
            return None, _run(_of_scores, *given), None, None, None, None
        return None, weigh_backward(*given), None, None, None, None


class _List(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        token, weight, counts = _listed(chosen, weights)
        ctx.mark_non_differentiable(token, counts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(token, counts)
        ctx.shape = chosen.shape
        return token, weight, counts

    @staticmethod
    def backward(ctx: Any, _: None, of_row: Tensor | None, __: None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        if of_row is None:
            return None, None
        token, counts = ctx.saved_tensors
        if not torch.is_grad_enabled() and serves(of_row, indices=[token, counts]):
            return None, _of_pair(ctx.shape, token, counts, of_row)
        experts = counts.shape[0]
        place = token * experts + torch.arange(experts, device=token.device).repeat_interleave(
            counts
        )
        of_pair = of_row.new_zeros(math.prod(ctx.shape)).scatter(0, place, of_row)
        return None, of_pair.reshape(ctx.shape)


# Weights are rounded otherwise by torch's operations, and no result may depend on who looks on.
@torch.library.custom_op("moefold::choose", mutates_args=())
def _chosen(
    contest: Tensor, scores: Tensor, k: int, real: Tensor | None, normalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    if _functions() is None:  # a graph asked for it, which cannot know
        real = None if real is None else real[..., None].expand_as(contest)
        chosen = top(contest, k, contest.ndim - 1, real)
        return chosen.contiguous(), weigh(chosen, scores, normalize, scale).contiguous()
    contest, scores = contest.contiguous(), scores.contiguous()
    real = None if real is None else real.contiguous()
    chosen, weights = torch.empty_like(scores, dtype=torch.bool), torch.empty_like(scores)
    work = _Choice(
        tokens=math.prod(scores.shape[:-1]),
        block=BLOCK,
        experts=scores.shape[-1],
        k=k,
        normalize=normalize,
        scale=scale,
        contest=contest.data_ptr(),
        scores=scores.data_ptr(),
        real=None if real is None else real.data_ptr(),
        chosen=chosen.data_ptr(),
        weights=weights.data_ptr(),
    )
    run_compiled_together(_known().moefold_choose, ctypes.byref(work), _threads_for(scores))
    return chosen, weights


@torch.library.custom_op("moefold::choose_backward", mutates_args=())
def _of_scores(
    chosen: Tensor, scores: Tensor, of_weights: Tensor, normalize: bool, scale: float
) -> Tensor:
    if _functions() is None:
        return weigh_backward(chosen, scores, of_weights, normalize, scale).contiguous()
    chosen, scores, of_weights = (part.contiguous() for part in (chosen, scores, of_weights))
    of_scores = torch.empty_like(scores)
    work = _Choice(
        tokens=math.prod(scores.shape[:-1]),
        block=BLOCK,
        experts=scores.shape[-1],
        normalize=normalize,
        scale=scale,
        scores=scores.data_ptr(),
        chosen=chosen.data_ptr(),
        of_weights=of_weights.data_ptr(),
        of_scores=of_scores.data_ptr(),
    )
    run_compiled_together(_known().moefold_choose, ctypes.byref(work), _threads_for(scores))
    return of_scores


@_chosen.register_fake
def _(contest, scores, k, real, normalize, scale):
    return scores.new_empty(scores.shape, dtype=torch.bool), scores.new_empty(scores.shape)


@_of_scores.register_fake
def _(chosen, scores, of_weights, normalize, scale):
    return scores.new_empty(scores.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, scores, _, _, *ctx.settings = inputs
    chosen, _ = output
    ctx.mark_non_differentiable(chosen)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores, chosen)


def _differentiate(ctx: Any, _: None, of_weights: Tensor | None) -> tuple:
    scores, chosen = ctx.saved_tensors
    if of_weights is None:
        return (None,) * 6
    # Whoever differentiates twice needs a graph of what follows.
    of = weigh_backward if torch.is_grad_enabled() else _of_scores
    return None, of(chosen, scores, of_weights, *ctx.settings), None, None, None, None


_chosen.register_autograd(_differentiate, setup_context=_keep)


def _listed(chosen: Tensor, weights: Tensor) -> Rows:
    if has_a_mode():
        return list_reference(chosen.flatten(0, -2), weights.flatten(0, -2))
    chosen, weights = chosen.contiguous(), weights.contiguous()
    experts = chosen.shape[-1]
    tokens = math.prod(chosen.shape[:-1])
    # As the input, whatever the default device is.
    places = chosen.new_empty(-(-tokens // BLOCK), experts, dtype=torch.int64)
    counts = chosen.new_empty(experts, dtype=torch.int64)
    work = _Listing(
        tokens=tokens,
        block=BLOCK,
        experts=experts,
        chosen=chosen.data_ptr(),
        weights=weights.data_ptr(),
        places=places.data_ptr(),
    )
    functions, threads = _known(), _threads_for(chosen)
    run_compiled_together(functions.moefold_list, ctypes.byref(work), threads)
    rows = functions.moefold_places(ctypes.byref(work), counts.data_ptr())
    token, weight = chosen.new_empty(rows, dtype=torch.int64), weights.new_empty(rows)
    if rows:
        work.token_of_row, work.weight_of_row, work.next = token.data_ptr(), weight.data_ptr(), 0
        run_compiled_together(functions.moefold_list, ctypes.byref(work), threads)
    return Rows(token, weight, counts)


def _of_pair(shape: torch.Size, token: Tensor, counts: Tensor, of_row: Tensor) -> Tensor:
    token, counts, of_row = (part.contiguous() for part in (token, counts, of_row))
    of_pair = of_row.new_zeros(shape)
    _known().moefold_unlist(
        counts.shape[0], counts.data_ptr(), token.data_ptr(), of_row.data_ptr(), of_pair.data_ptr()
    )
    return of_pair


def _run(operator: Any, *given: Any) -> Any:
    """An operator, by way of torch's dispatcher if somebody looks on."""
    return operator(*given) if has_a_mode() else operator._init_fn(*given)


def _threads_for(pairs: Tensor) -> int:
    return torch.get_num_threads() if pairs.numel() >= WORTH_IT else 1


_POINTER = ctypes.c_void_p


class _Choice(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "block")),
        *((name, ctypes.c_int) for name in ("experts", "k", "normalize")),
        ("scale", ctypes.c_float),
        *((name, _POINTER) for name in ("contest", "scores", "real", "chosen", "weights")),
        *((name, _POINTER) for name in ("of_weights", "of_scores")),
        ("next", ctypes.c_int64),
    )


class _Listing(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "block")),
        ("experts", ctypes.c_int),
        *((name, _POINTER) for name in ("chosen", "weights", "places")),
        *((name, _POINTER) for name in ("token_of_row", "weight_of_row")),
        ("next", ctypes.c_int64),
    )


def _known() -> ctypes.CDLL:
    functions = _functions()
    assert functions is not None, "nobody asked whether compiled code serves"
    return functions


@cache
def _functions() -> ctypes.CDLL | None:
    found = library()
    if isinstance(found, str):
        return None
    for function in (found.moefold_choose, found.moefold_list):
        function.argtypes, function.restype = [_POINTER], None
    found.moefold_places.argtypes, found.moefold_places.restype = [_POINTER] * 2, ctypes.c_int64
    found.moefold_unlist.argtypes = [ctypes.c_int, *[_POINTER] * 4]
    found.moefold_unlist.restype = None
    return found
