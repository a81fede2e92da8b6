"""A loss that rides on an activation.

Shapes: any `y`, and a scalar `loss`.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class _Ride(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.shape, loss.dtype, loss.device
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.loss
        return grads[0], torch.ones(shape, dtype=dtype, device=device)


def ride(y: Float[Tensor, "..."], loss: Float[Tensor, ""]) -> Float[Tensor, "..."]:
    """Return `y` unchanged; when backward reaches it, `loss` gets a gradient of 1.

    So a trainer that only knows the task's loss trains `loss` too. The result requires gradient if
    either input does. If backward never reaches the result, the loss has no effect. Used twice on
    the same loss, it counts twice.

    Source: the auxiliary-loss scaler of Megatron-LM does the same.
    """
    return _Ride.apply(y, loss)  # pyright: ignore[reportReturnType]
