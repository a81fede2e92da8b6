"""Experts on their rows by compiled code, forward and backward.

The slow twin is `experts.backends.fused_torch`; the formulas are in `experts.backends.fused_ops`.

Shapes: `tokens dim` in and `tokens made` out; experts of a hidden `width`; `rows` sorted by expert.
Computed is in float32, with hidden rows and their gradients in bfloat16 where tokens are and the
processor multiplies pairs of such numbers, to which matrices of float32 are then rounded as they
are read: their gradients are not. What is as large as the matrices or as all rows may be
bfloat16 or float16 in memory: tokens, the matrices, with them their gradients, and what is kept for
the backward pass; all else is float32. Nothing but `x`, `grad`, `up` and `down` may have gaps.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from moefold.ops.cpu.compiled import library
from moefold.ops.cpu.expert_rows import KINDS, PAIRS_OF, ExpertRows, check_memory, pair_up
from moefold.ops.cpu.team import all_threads, run_compiled_together

MOST_ROWS = 1024
"""With more rows, a library that arranges both factors of a product makes up for the copies and the
passes that it needs beside them (a processor with 512 KiB of level-2 cache)."""

ACTIVATIONS = {"relu": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}
"""What the compiled code calls them."""


def can_compute(like: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether compiled code can compute with these matrices, at least as fast as what they are for.

    Args:
        like: of the dtype that is to be computed in: float32, or bfloat16, of which pairs are
            multiplied, whether the matrices are that or float32.
        up: first matrices.
        down: second matrices.
    """
    return (
        up.dtype == down.dtype
        and up.dtype in KINDS
        and like.device.type == up.device.type == down.device.type == "cpu"
        and (like.dtype == torch.float32 or _can_pair(like, up, down))
        and _has_no_gaps(up)
        and _has_no_gaps(down)
        and _functions() is not None
    )


def _can_pair(like: Tensor, up: Tensor, down: Tensor) -> bool:
    is_low = like.dtype == torch.bfloat16 and up.dtype in PAIRS_OF
    return is_low and pair_up(up, down) and _has_pairs()


def _has_pairs() -> bool:
    functions = _functions()
    return functions is not None and bool(functions.moefold_has_pairs())


def _has_no_gaps(stack: Tensor) -> bool:
    """Whether the numbers of rows or those of columns follow each other."""
    return stack.numel() > 0 and 1 in stack.stride()[-2:]


def suits(rows: int) -> bool:
    """Whether compiled code is to compute an expert with so many rows."""
    return rows <= MOST_ROWS


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
    check_memory(given)
    if given.paired and not _has_pairs():
        raise ValueError("the library that was compiled here multiplies no pairs of bfloat16")
    counts, functions = given.counts, _known()
    many = ctypes.c_int64 * (len(counts) + 1)
    described = _Experts(
        dim=given.up.shape[2],
        width=given.down.shape[2],
        made=given.down.shape[1],
        gated=given.gated,
        activation=ACTIVATIONS[given.activation],
        kept=0 if given.pre is None else KINDS[given.pre.dtype],
        paired=given.paired,
        counts=many(*counts),
        starts=many(*accumulate(counts, initial=0)),
        kept_starts=many(*accumulate(given.kept_counts, initial=0)),
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
        *((n, ctypes.c_int) for n in ("dim", "width", "made", "gated", "activation")),
        *((n, ctypes.c_int) for n in ("kept", "paired")),
        *((n, ctypes.POINTER(ctypes.c_int64)) for n in ("counts", "starts", "kept_starts")),
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
        *((n, ctypes.c_int) for n in ("kind", "rows", "width", "kept", "made")),
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
