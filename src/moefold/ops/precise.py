"""Low precision in memory, float32 in arithmetic.

Shapes: `rows depth` times `depth columns` gives `rows columns`, with any dimensions before them.

A tensor of bfloat16 or float16 that is cast and then multiplied would be kept for the backward pass
as it was cast, twice as large. Here it is kept as it came, and cast again.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from moefold.ops.cpu.eager import is_transformed

_EPSILON = 1e-6


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
    if _keeps_as_they_are(left, right):
        return _Product.apply(left, right, dtype)
    return _product(left, right, dtype)


def inverse_length(x: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*ones"]:
    """`1 / sqrt(sum x^2 + 1e-6)` in float32 or better; smooth at zero.

    The form of the code that the authors of Soft MoE released.
    """
    if _keeps_as_they_are(x):
        return _InverseLength.apply(x, dim)
    return _inverse_length(x, dim)


def _keeps_as_they_are(*tensors: Tensor) -> bool:
    """Whether a backward pass is to come that would keep what was cast.

    Of what is transformed, casts are left to whoever transforms it.
    """
    return (
        torch.is_grad_enabled()
        and any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors)
        and not is_transformed()
        and forward_ad._current_level < 0
    )


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    kind = left.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return (left.to(wide) @ right.to(wide)).to(dtype)
    with torch.autocast(kind, enabled=False):
        return (left.to(wide) @ right.to(wide)).to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(left, right)
        return _product(left, right, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        left, right = ctx.saved_tensors
        for_left, for_right, _ = ctx.needs_input_grad
        return (
            product(grad, right.mT, left.dtype) if for_left else None,
            product(left.mT, grad, right.dtype) if for_right else None,
            None,
        )


def _inverse_length(x: Tensor, dim: int) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(wide.square().sum(dim, keepdim=True) + _EPSILON)


class _InverseLength(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        inverse = _inverse_length(x, dim)
        ctx.save_for_backward(x, inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, inverse = ctx.saved_tensors
        return (grad * inverse**3).neg().mul(x).to(x.dtype), None
