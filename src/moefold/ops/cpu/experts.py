"""Experts on their rows by compiled code, forward and backward.

The slow twin is `experts.backends.fused_torch`; the formulas are in `experts.backends.fused_ops`.

Shapes: `tokens dim` in and `tokens made` out; experts of a hidden `width`; `rows` sorted by expert.
Computed is in float32. What is as large as the matrices or as all rows may be bfloat16 or float16
in memory: tokens, the matrices, with them their gradients, and what is kept for the backward pass;
all else is float32. Nothing but `x`, `grad`, `up` and `down` may have gaps.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from moefold.ops.cpu.compiled import library
from moefold.ops.cpu.team import all_threads, run_compiled_together

MOST_ROWS = 1024
"""With more rows, a library that arranges both factors of a product makes up for the copies and the
passes that it needs beside them (a processor with 512 KiB of level-2 cache)."""

ACTIVATIONS = {"relu": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}
"""What the compiled code calls them."""

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of numbers in memory, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertRows:
    """Experts and their rows; for the backward pass also where gradients go, if they are wanted.

    Attributes:
        counts: how many rows each expert has.
        tokens: of the rows, int64; within bounds: nobody checks.
        weights: of the rows; None for 1.
        x: all tokens, of a dtype of `KINDS`; the numbers of a token follow each other.
        up: `[experts, width, dim]`, or twice the width if gated.
        down: `[experts, made, width]`.
        up_bias: `[experts, width]`, or twice the width.
        down_bias: `[experts, made]`.
        pre: `[rows, width]`, the gate's half of the first product: written forward, read backward;
            of a dtype of `KINDS`. None, forward alone: nobody needs it.
        value: likewise the other half, of the same dtype.
        gated: whether there are two halves.
        activation: of the first.
        grad: of the results, as `x`.
        of_weights: the gradient of the weights of the rows.
        of_up: of `up`.
        of_down: of `down`.
        of_up_bias: of `up_bias`.
        of_down_bias: of `down_bias`.
    """

    counts: Sequence[int]
    tokens: Tensor
    weights: Tensor | None
    x: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    pre: Tensor | None
    value: Tensor | None
    gated: bool
    activation: str
    grad: Tensor | None = None
    of_weights: Tensor | None = None
    of_up: Tensor | None = None
    of_down: Tensor | None = None
    of_up_bias: Tensor | None = None
    of_down_bias: Tensor | None = None


def can_compute(like: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether compiled code can compute in this dtype with these matrices."""
    return (
        like.dtype == torch.float32
        and up.dtype == down.dtype
        and up.dtype in KINDS
        and like.device.type == up.device.type == down.device.type == "cpu"
        and _has_no_gaps(up)
        and _has_no_gaps(down)
        and _functions() is not None
    )


def _has_no_gaps(stack: Tensor) -> bool:
    """Whether the numbers of rows or those of columns follow each other."""
    return stack.numel() > 0 and 1 in stack.stride()[-2:]


def suits(rows: int) -> bool:
    """Whether compiled code is to compute an expert with so many rows."""
    return rows <= MOST_ROWS


def readable(given: ExpertRows) -> ExpertRows:
    """With tokens in a dtype of `KINDS`, the numbers of each one after another."""
    x, grad = _readable(given.x), None if given.grad is None else _readable(given.grad)
    as_it_is = x is given.x and grad is given.grad
    return given if as_it_is else replace(given, x=x, grad=grad)


def _readable(tokens: Tensor) -> Tensor:
    tokens = tokens if tokens.dtype in KINDS else tokens.to(torch.float32)
    return tokens if tokens.stride(1) == 1 else tokens.contiguous()


def first_beyond(index: Tensor, size: int) -> int | None:
    """The first number of an index, int64 without gaps, that is not below a size; or below 0.

    Args:
        index: of anything of that size.
        size: how many there are.
    """
    functions = _functions()
    if functions is None:
        wrong = index[(index < 0) | (index >= size)]
        return int(wrong[0]) if wrong.shape[0] else None
    place = functions.moefold_first_beyond(index.data_ptr(), index.shape[0], size)
    return None if place < 0 else int(index[place])


def forward(given: ExpertRows, shares: Sequence[Sequence[int]], sums: Sequence[Tensor]) -> None:
    """Add what experts make of their rows, each times its weight, to sums by token.

    Args:
        given: all experts.
        shares: which of them each thread is to compute.
        sums: `[tokens, made]` of each thread; the same for several if no token is in two shares.

    Raises:
        ValueError: sizes that do not belong together.
    """
    _run(given, shares, sums, backward=False)


def backward(
    given: ExpertRows, shares: Sequence[Sequence[int]], sums: Sequence[Tensor | None]
) -> None:
    """Write the gradients that there is memory for; zeros for experts without rows.

    Args:
        given: all experts.
        shares: which of them each thread is to compute.
        sums: `[tokens, dim]` of each thread, as forward, for gradients of tokens; or None.

    Raises:
        ValueError: sizes that do not belong together.
    """
    _run(given, shares, sums, backward=True)


def activate(activation: str, pre: Tensor, value: Tensor | None, hidden: Tensor) -> None:
    """Write `act(pre) * value`, or `act(pre)`, of rows `[rows, width]`."""
    _known().moefold_activate(_hidden(activation, pre, value, hidden))


def differentiate(
    activation: str,
    pre: Tensor,
    value: Tensor | None,
    hidden: Tensor,
    *,
    weights: Tensor | None,
    of_hidden: Tensor | None,
    of_first: Tensor | None,
    of_weights: Tensor | None,
) -> None:
    """Write what the backward pass needs of rows `[rows, width]`.

    Args:
        activation: of `pre`.
        pre: the gate's half of the first product.
        value: the other half, if gated.
        hidden: where hidden rows are written, each times its weight.
        weights: `[rows]`, None for 1.
        of_hidden: the gradient at hidden rows of weight 1; None if nothing below is wanted.
        of_first: where that of the first product goes, its halves side by side; `of_hidden` itself
            if it is not gated.
        of_weights: `[rows]`, where that of the weights goes.
    """
    given, width = _hidden(activation, pre, value, hidden), pre.shape[1]
    given.weights, given.of_weights = _start(weights), _start(of_weights)
    given.of_hidden, given.of_pre, given.grad_stride = _start(of_hidden), _start(of_first), width
    if of_first is not None:
        given.of_stride = of_first.stride(0)
        given.of_value = None if value is None else of_first[:, width:].data_ptr()
    _known().moefold_differentiate(given)


def _hidden(activation: str, pre: Tensor, value: Tensor | None, hidden: Tensor) -> "_Hidden":
    rows, width = pre.shape
    return _Hidden(
        kind=ACTIVATIONS[activation],
        rows=rows,
        width=width,
        pre=pre.data_ptr(),
        value=_start(value),
        kept=KINDS[pre.dtype],
        stride=width,
        hidden=hidden.data_ptr(),
    )


def _run(
    given: ExpertRows,
    shares: Sequence[Sequence[int]],
    sums: Sequence[Tensor | None],
    *,
    backward: bool,
) -> None:
    _check(given)
    counts, functions = given.counts, _known()
    many = ctypes.c_int64 * len(counts)
    described = _Experts(
        dim=given.up.shape[2],
        width=given.down.shape[2],
        made=given.down.shape[1],
        gated=given.gated,
        activation=ACTIVATIONS[given.activation],
        kept=0 if given.pre is None else KINDS[given.pre.dtype],
        counts=many(*counts),
        starts=many(*accumulate(counts[:-1], initial=0)),
        x=_tokens(given.x),
        grad=_tokens(given.grad),
        up=_Stack(given.up.data_ptr(), *given.up.stride(), KINDS[given.up.dtype]),
        down=_Stack(given.down.data_ptr(), *given.down.stride(), KINDS[given.down.dtype]),
    )
    for name in _TENSORS:
        tensor = getattr(given, name)
        if tensor is not None:
            setattr(described, name, tensor.data_ptr())
    parts, rooms = (_Share * len(shares))(), []
    for part, own, sum_ in zip(parts, shares, sums, strict=True):
        most = max([counts[i] for i in own], default=0)
        size = functions.moefold_room_for(ctypes.byref(described), most, backward)
        room = torch.empty(size, dtype=torch.float32, device="cpu")
        part.experts, part.count = (ctypes.c_int * len(own))(*own), len(own)
        part.sums, part.room = _start(sum_), room.data_ptr()
        rooms.append(room)
    work = _Work(ctypes.pointer(described), parts, len(shares), backward)
    run_compiled_together(functions.moefold_work, ctypes.byref(work), all_threads(len(shares)))


def _check(given: ExpertRows) -> None:
    """Compiled code sees neither shapes nor dtypes, and would read beyond the end.

    Raises:
        ValueError: sizes that do not belong together; memory that is not as `ExpertRows` says.
    """
    experts, made, width = given.down.shape
    rows, dim, first = sum(given.counts), given.up.shape[-1], (1 + given.gated) * width
    if len(given.counts) != experts or min(given.counts) < 0:
        raise ValueError(f"{experts} experts cannot have {list(given.counts)} rows")
    # Of what belongs together the first says which of the kinds it is.
    of_x, of_up = _kind(given.x), _kind(given.up)
    of_grad, of_kept = _kind(given.grad), _kind(given.pre)
    float32 = torch.float32
    for name, tensor, dtype, size, *rest in (
        ("x", given.x, of_x, 0, dim),
        ("grad", given.grad, of_grad, given.x.shape[0], made),
        ("tokens", given.tokens, torch.int64, rows),
        ("weights", given.weights, float32, rows),
        ("of_weights", given.of_weights, float32, rows),
        ("pre", given.pre, of_kept, rows, width),
        ("value", given.value, of_kept, rows, width),
        ("up", given.up, of_up, experts, first, dim),
        ("of_up", given.of_up, of_up, experts, first, dim),
        ("down", given.down, of_up, experts, made, width),
        ("of_down", given.of_down, of_up, experts, made, width),
        ("up_bias", given.up_bias, float32, experts, first),
        ("of_up_bias", given.of_up_bias, float32, experts, first),
        ("down_bias", given.down_bias, float32, experts, made),
        ("of_down_bias", given.of_down_bias, float32, experts, made),
    ):
        if tensor is None:
            continue
        if tensor.shape[0] < size or list(tensor.shape[1:]) != rest:
            raise ValueError(
                f"{name} is {list(tensor.shape)}, which does not belong to {rows} rows and experts "
                f"of {dim} to {width} to {made}"
            )
        _check_memory(name, tensor, dtype)


def _kind(tensor: Tensor | None) -> torch.dtype:
    """Its dtype if that is one of `KINDS`, else the one that it should have had."""
    return tensor.dtype if tensor is not None and tensor.dtype in KINDS else torch.float32


_WITH_GAPS = ("x", "grad", "up", "down")


def _check_memory(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    whole = name in _WITH_GAPS or tensor.is_contiguous()
    is_there = tensor.device.type == "cpu" and (tensor.data_ptr() or not tensor.numel())
    if tensor.dtype != dtype or not whole or not is_there:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}; compiled "
            f"code reads {dtype} in memory of the cpu, {name} {'as it lies' if whole else 'whole'}"
        )


def _start(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _tokens(tensor: Tensor | None) -> "_Tokens":
    if tensor is None:
        return _Tokens()
    return _Tokens(tensor.data_ptr(), tensor.stride(0), KINDS[tensor.dtype])


class _Tokens(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("stride", ctypes.c_long), ("kind", ctypes.c_int))


class _Stack(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_void_p),
        ("next", ctypes.c_long),
        ("row", ctypes.c_long),
        ("column", ctypes.c_long),
        ("kind", ctypes.c_int),
    )


_TENSORS = (
    *("tokens", "weights", "up_bias", "down_bias", "pre", "value", "of_weights"),
    *("of_up", "of_down", "of_up_bias", "of_down_bias"),
)


class _Experts(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int) for n in ("dim", "width", "made", "gated", "activation", "kept")),
        *((n, ctypes.POINTER(ctypes.c_int64)) for n in ("counts", "starts")),
        *((n, ctypes.c_void_p) for n in _TENSORS),
        *((n, _Tokens) for n in ("x", "grad")),
        *((n, _Stack) for n in ("up", "down")),
    )


class _Share(ctypes.Structure):
    _fields_ = (
        ("experts", ctypes.POINTER(ctypes.c_int)),
        ("count", ctypes.c_int),
        ("sums", ctypes.c_void_p),
        ("room", ctypes.c_void_p),
    )


class _Work(ctypes.Structure):
    _fields_ = (
        ("given", ctypes.POINTER(_Experts)),
        ("shares", ctypes.POINTER(_Share)),
        *((n, ctypes.c_int) for n in ("count", "backward", "next")),
    )


class _Hidden(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int) for n in ("kind", "rows", "width", "kept")),
        *((n, ctypes.c_void_p) for n in ("pre", "value")),
        ("stride", ctypes.c_long),
        *((n, ctypes.c_void_p) for n in ("hidden", "weights", "of_hidden", "of_pre", "of_value")),
        ("of_weights", ctypes.c_void_p),
        *((n, ctypes.c_long) for n in ("grad_stride", "of_stride")),
    )


def _known() -> ctypes.CDLL:
    functions = _functions()
    assert functions is not None, "nobody asked whether compiled code can compute this"
    return functions


@cache
def _functions() -> ctypes.CDLL | None:
    found = library()
    if isinstance(found, str):
        return None
    found.moefold_work.argtypes, found.moefold_work.restype = [ctypes.c_void_p], None
    found.moefold_room_for.argtypes = [ctypes.POINTER(_Experts), ctypes.c_int, ctypes.c_int]
    found.moefold_room_for.restype = ctypes.c_long
    found.moefold_first_beyond.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    found.moefold_first_beyond.restype = ctypes.c_int64
    for function in (found.moefold_activate, found.moefold_differentiate):
        function.argtypes, function.restype = [ctypes.POINTER(_Hidden)], None
    return found
