"""Low precision in memory, float32 in arithmetic.

Shapes: `rows depth` times `depth columns` gives `rows columns`, with any dimensions before them.

A tensor of bfloat16 or float16 that is cast and then multiplied would be kept for the backward pass
as it was cast, twice as large. Here it is kept as it came, and cast again.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moefold.ops.cpu.eager import is_transformed
from moefold.ops.grouped import LOW_PRECISION

_EPSILON = 1e-6


def in_full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast: rounding scores to half precision changes which experts are chosen."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _emulated() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():
        return torch.bfloat16, torch.float16
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return tuple(dtype for dtype, is_supported in supported.items() if not is_supported)


_EMULATED = _emulated()  # asked once, as a graph could not ask it


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products of this one are computed in on the CPU.

    A processor without instructions for bfloat16 or float16 multiplies such matrices tens of times
    slower than float32 ones; there they are cast, multiplied in float32 and rounded at the end.
    """
    return torch.float32 if dtype in _EMULATED else dtype


def product(
    left: Float[Tensor, "*batch rows depth"],
    right: Float[Tensor, "*batch depth columns"],
    dtype: torch.dtype,
) -> Float[Tensor, "*batch rows columns"]:
    """Multiply in float32 and round once; differentiable any number of times.

    Args:
        left: of any dtype; one better than float32 is what is computed in.
        right: likewise.
        dtype: of the result.
    """
    given = left, right, dtype
    return _Product.apply(*given) if _keeps(left, right) else _product(*given)


def over_length(
    x: Float[Tensor, "tokens dim"], directions: Float[Tensor, "dim columns"]
) -> Float[Tensor, "tokens columns"]:
    """`x @ directions / sqrt(sum x^2 + 1e-6)` in float32 or better, by token; smooth at zero.

    Differentiable any number of times. The form of the code that the authors of Soft MoE released;
    the length divides what the product made, so that no tokens of length 1 are kept.
    """
    given = x, directions
    return _OverLength.apply(*given) if _keeps(*given) else _over_length(*given)


def inverse_length(x: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*ones"]:
    """`1 / sqrt(sum x^2 + 1e-6)`, in the dtype of x."""
    return torch.rsqrt(x.square().sum(dim, keepdim=True) + _EPSILON)


def _keeps(*factors: Tensor) -> bool:
    """Whether a backward pass would keep what was cast.

    Of what is transformed, casts are left to whoever transforms it.
    """
    return (
        torch.is_grad_enabled()
        and any(t.requires_grad for t in factors)
        and any(t.dtype in LOW_PRECISION for t in factors)
        and not is_transformed()
    )


def _wide(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    wide = _wide(left, right)
    with in_full_precision(left.device):
        return (left.to(wide) @ right.to(wide)).to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        for_left, for_right, _ = ctx.needs_input_grad
        ctx.save_for_backward(left if for_right else None, right if for_left else None)
        ctx.dtypes = left.dtype, right.dtype
        return _product(left, right, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        left, right = ctx.saved_tensors
        of_left, of_right = ctx.dtypes
        return (
            None if right is None else product(grad, right.mT, of_left),
            None if left is None else product(left.mT, grad, of_right),
            None,
        )


def _over_length(x: Tensor, directions: Tensor) -> Tensor:
    with in_full_precision(x.device):
        x = x.to(_wide(x, directions))
        return (x @ directions.to(x.dtype)) * inverse_length(x, -1)


class _OverLength(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, directions: Tensor) -> Tensor:
        made = _over_length(x, directions)
        ctx.save_for_backward(x, directions, made)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, directions, made = ctx.saved_tensors
        for_x, for_directions = ctx.needs_input_grad
        with in_full_precision(x.device):
            tokens = x.to(made.dtype)
            inverse = inverse_length(tokens, -1)
            grad = grad * inverse
            of_x = of_directions = None
            if for_x:
                along = (grad * made).sum(-1, keepdim=True) * inverse
                # Both parts cancel along the token: they are rounded together.
                across = grad @ directions.to(made.dtype).mT
                of_x = torch.addcmul(across, along, tokens, value=-1).to(x.dtype)
            if for_directions:
                of_directions = (tokens.mT @ grad).to(directions.dtype)
            return of_x, of_directions
