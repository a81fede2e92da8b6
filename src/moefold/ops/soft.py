"""Soft mixtures from their logits: both softmaxes, and the products that they weigh.

Shapes: `groups members dim` tokens, `groups members experts slots` logits, and `rows` in the order
of a routing: `[experts, groups, slots]` flattened. `real` marks the real tokens; others have no
share in any row, whatever they hold, and come back as zero.

`TorchMaps` or `KernelMaps` is what a `SoftRouting` made from logits is given: the routing then
keeps the logits only, and its two tensors of weights exist while somebody uses them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moefold.ops.grouped import linear_dtype
from moefold.ops.precise import product, work_dtype

Logits = Float[Tensor, "groups members experts slots"]
Real = Bool[Tensor, "groups members"] | None


def dispatch_weight(logits: Logits, real: Real = None) -> Logits:
    """For each slot a softmax over the real tokens; zero for padding and in an empty group."""
    if real is None:
        return logits.softmax(1)
    shown = real[:, :, None, None]
    return logits.masked_fill(~shown, torch.finfo(logits.dtype).min).softmax(1) * shown


def combine_weight(logits: Logits, real: Real = None) -> Logits:
    """For each token a softmax over all slots; zero for padding."""
    weight = logits.flatten(2).softmax(-1).reshape(logits.shape)
    return weight if real is None else weight * real[:, :, None, None]


def to_rows(
    weight: Logits, x: Float[Tensor, "groups members dim"], real: Real = None
) -> Float[Tensor, "rows dim"]:
    """Tokens to rows: every row is a weighted mean of the tokens of its group."""
    if real is not None:
        # A padding token may hold anything; zero times infinity would not be zero.
        x = torch.where(real.unsqueeze(-1), x, torch.zeros_like(x))
    rows = _mixed(weight.flatten(2).transpose(1, 2), x)
    return rows.unflatten(1, weight.shape[2:]).transpose(0, 1).flatten(0, 2)


def to_tokens(
    weight: Logits, rows: Float[Tensor, "rows dim"]
) -> Float[Tensor, "groups members dim"]:
    """Rows to tokens: every token is a weighted mean of all rows of its group."""
    groups, _, experts, slots = weight.shape
    by_group = rows.reshape(experts, groups, slots, rows.shape[1]).transpose(0, 1)
    return _mixed(weight.flatten(2), by_group.flatten(1, 2))


def _mixed(weight: Tensor, given: Tensor) -> Tensor:
    """Weighted sums, in the dtype that a linear layer would have here."""
    dtype = linear_dtype(given)
    if given.device.type == "cpu" and work_dtype(dtype) != dtype:
        return product(weight, given, dtype)
    return weight.to(given.dtype) @ given


def dispatch_reference(
    logits: Logits, x: Float[Tensor, "groups members dim"], real: Real = None
) -> Float[Tensor, "rows dim"]:
    """Tokens to rows, with all weights at once."""
    return to_rows(dispatch_weight(logits, real), x, real)


def combine_reference(
    logits: Logits, rows: Float[Tensor, "rows dim"], real: Real = None
) -> Float[Tensor, "groups members dim"]:
    """Rows to tokens, with all weights at once."""
    return to_tokens(combine_weight(logits, real), rows)


@dataclass(frozen=True, slots=True)
class TorchMaps:
    """The maps of a soft routing from its logits, by torch's operations.

    Each map makes its own weights. Those of the second are then made after the experts ran, and the
    backward pass is done with them before it comes to the experts.
    """

    def dispatch(
        self, logits: Logits, x: Float[Tensor, "groups members dim"], real: Real
    ) -> Float[Tensor, "rows dim"]:
        """Tokens to rows."""
        return dispatch_reference(logits, x, real)

    def combine(
        self, logits: Logits, rows: Float[Tensor, "rows dim"], real: Real
    ) -> Float[Tensor, "groups members dim"]:
        """Rows to tokens."""
        return combine_reference(logits, rows, real)


@dataclass(frozen=True, slots=True)
class KernelMaps:
    """The same by kernels, which read the logits and write no weights."""

    def dispatch(
        self, logits: Logits, x: Float[Tensor, "groups members dim"], real: Real
    ) -> Float[Tensor, "rows dim"]:
        """Tokens to rows."""
        from moefold.ops.triton.soft import soft_mix

        return soft_mix(logits, x.to(linear_dtype(x)).flatten(0, 1), real, True)[0]

    def combine(
        self, logits: Logits, rows: Float[Tensor, "rows dim"], real: Real
    ) -> Float[Tensor, "groups members dim"]:
        """Rows to tokens."""
        from moefold.ops.triton.soft import soft_mix

        mixed = soft_mix(logits, rows.to(linear_dtype(rows)), real, False)[0]
        return mixed.reshape(*logits.shape[:2], rows.shape[1])
