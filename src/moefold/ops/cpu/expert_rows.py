"""Experts and their rows as compiled code is given them, and whether their memory is as it says.

Shapes: see `experts`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import gt

import torch
from torch import Tensor

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What compiled code calls the numbers that it finds in memory."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertRows:
    """Experts and their rows; for the backward pass also where gradients go, if they are wanted.

    Attributes:
        counts: how many rows each expert has.
        kept_counts: how many in `pre` and `value`, where zeros follow its own.
        tokens: of the rows, int64; within bounds: nobody checks.
        weights: of the rows; None for 1.
        x: all tokens, of a dtype of `KINDS`; the numbers of a token follow each other.
        up: `[experts, width, dim]`, or twice the width if gated.
        down: `[experts, made, width]`.
        up_bias: `[experts, width]`, or twice the width.
        down_bias: `[experts, made]`.
        pre: `[kept rows, width]`, the gate's half of the first product: written forward, read
            backward; of a dtype of `KINDS`. None, forward alone: nobody needs it.
        value: likewise the other half, of the same dtype.
        gated: whether there are two halves.
        activation: of the first.
        grad: of the results, as `x`.
        of_weights: the gradient of the weights of the rows.
        of_up: of `up`.
        of_down: of `down`.
        of_up_bias: of `up_bias`.
        of_down_bias: of `down_bias`.
        paired: whether products are of pairs of bfloat16 numbers, which all that has a kind then
            consists of, see `pair_up`; but `up` and `down` may be float32, and are rounded as they
            are read.
    """

    counts: Sequence[int]
    kept_counts: Sequence[int]
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
    paired: bool = False


PAIRS_OF = torch.bfloat16, torch.float32
"""Dtypes of matrices that are multiplied in pairs; float32 is rounded as it is read."""

MOST_PAIRED = 8192
"""Numbers that a result is the sum of (MOST_DEPTH in C): so much of a column lies in cache."""


def pair_up(up: Tensor, down: Tensor) -> bool:
    """Whether the numbers of these matrices, and of rows of their widths, come in pairs."""
    sizes = up.shape[2], *down.shape[1:]
    strides = (max(stack.stride()[-2:]) for stack in (up, down))
    return max(sizes[:2]) <= MOST_PAIRED and not any(n % 2 for n in (*sizes, *strides))


def readable(given: ExpertRows) -> ExpertRows:
    """With tokens in a dtype of `KINDS`, or in pairs, the numbers of each one after another."""
    x = _readable(given.x, given.paired)
    grad = None if given.grad is None else _readable(given.grad, given.paired)
    as_it_is = x is given.x and grad is given.grad
    return given if as_it_is else replace(given, x=x, grad=grad)


def _readable(tokens: Tensor, paired: bool) -> Tensor:
    if paired:
        tokens = tokens.to(torch.bfloat16)
    elif tokens.dtype not in KINDS:
        tokens = tokens.to(torch.float32)
    in_order = tokens.stride(1) == 1 and not (paired and _is_odd(tokens))
    return tokens if in_order else tokens.contiguous()


def _is_odd(tokens: Tensor) -> bool:
    """Whether some token begins within a pair."""
    return tokens.shape[0] > 1 and tokens.stride(0) % 2 > 0


def check_memory(given: ExpertRows) -> None:
    """Compiled code sees neither shapes nor dtypes, and would read beyond the end.

    Raises:
        ValueError: sizes that do not belong together; memory that is not as `ExpertRows` says.
    """
    experts, made, width = given.down.shape
    rows, dim, first = sum(given.counts), given.up.shape[-1], (1 + given.gated) * width
    if len(given.counts) != experts or min(given.counts) < 0:
        raise ValueError(f"{experts} experts cannot have {list(given.counts)} rows")
    if len(given.kept_counts) != experts or any(map(gt, given.counts, given.kept_counts)):
        kept = list(given.kept_counts)
        raise ValueError(f"{list(given.counts)} rows do not fit in {kept} kept ones")
    kept = sum(given.kept_counts)
    if given.paired:
        _check_pairs(given)
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
        ("pre", given.pre, of_kept, kept, width),
        ("value", given.value, of_kept, kept, width),
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
        _check_one(name, tensor, dtype)


def _check_pairs(given: ExpertRows) -> None:
    of_rows = [t for t in (given.x, given.grad) if t is not None]
    low = [*of_rows, *(t for t in (given.pre, given.value) if t is not None)]
    even = pair_up(given.up, given.down) and not any(map(_is_odd, of_rows))
    is_low = all(t.dtype == torch.bfloat16 for t in low) and given.up.dtype in PAIRS_OF
    if not even or not is_low:
        every = (*low, given.up, given.down)
        raise ValueError(
            f"pairs are of bfloat16 numbers in an even number, up to {MOST_PAIRED}; these are "
            f"{', '.join(f'{t.dtype} {list(t.shape)} {list(t.stride())}' for t in every)}"
        )


def _kind(tensor: Tensor | None) -> torch.dtype:
    """Its dtype if that is one of `KINDS`, else the one that it should have had."""
    return tensor.dtype if tensor is not None and tensor.dtype in KINDS else torch.float32


_WITH_GAPS = ("x", "grad", "up", "down")


def _check_one(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    whole = name in _WITH_GAPS or tensor.is_contiguous()
    is_there = tensor.device.type == "cpu" and (tensor.data_ptr() or not tensor.numel())
    if tensor.dtype != dtype or not whole or not is_there:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}; compiled "
            f"code reads {dtype} in memory of the cpu, {name} {'as it lies' if whole else 'whole'}"
        )
