"""A loss that rides on the graph: added to no loss, yet trained.

A layer inside somebody else's model cannot add to that model's loss, and a loss left in a global
for the trainer to collect is left out by every trainer that does not know about it. So the loss
rides on the layer's output instead: the output is unchanged, and when a gradient comes back through
it the loss receives a gradient of one, as if it had been added to whatever was differentiated.
The idea is used by Megatron-LM (`MoEAuxLossAutoScaler`) and DeepSeek-V2 (`AddAuxiliaryLoss`).

Shapes: `y [*shape]`, what a layer returns; `loss [*any]`, usually a scalar.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moefold.ops.cpu.eager import is_transformed


def ride(y: Float[Tensor, "*shape"], loss: Float[Tensor, "*any"]) -> Float[Tensor, "*shape"]:
    """Return `y`, sharing its memory, such that its backward pass also differentiates `loss`.

    Whatever scalar is differentiated through the result, and however it depends on it, `loss`
    receives exactly one, once per backward pass. In particular the loss knows nothing of a factor
    on that scalar (gradient accumulation that divides by its steps, a gradient scaler): put the
    same factor on `loss`.

    If `y` needs no gradient but `loss` does, the result needs one, so that a graph through it
    reaches the loss. If no gradient flows back through the result (it was detached, or is used by
    nothing that is differentiated), the loss is not trained. Under `torch.no_grad()` the result is
    `y` and nothing else happens. A loss that rides twice counts twice.
    """
    # Where a function has a `setup_context`, torch inspects signatures in every pass.
    rides = _RideTransformed if is_transformed() else _Ride
    return rides.apply(y, loss)  # pyright: ignore[reportReturnType]


class _Ride(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return _again(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)


class _RideTransformed(torch.autograd.Function):
    """The same for function transforms, which ask for a `setup_context`."""

    @staticmethod
    def forward(y: Tensor, loss: Tensor) -> Tensor:
        return _again(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    backward = _Ride.backward


def _again(y: Tensor) -> Tensor:
    # Not view_as: a view made here could not be changed in place by the layers that follow.
    return y.detach()
