"""Soft mixtures from their logits: both softmaxes, and the products that they weigh.

Shapes: `groups members dim` tokens, `groups members experts slots` logits, and `rows` in the order
of a routing: `[experts, groups, slots]` flattened. `real` marks the real tokens; others have no
share in any row, whatever they hold, and come back as zero.

`SoftMaps` is what a `SoftRouting` made from logits is given: the routing then keeps the logits
only, and its two tensors of weights exist while somebody looks at them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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


def dispatch_reference(
    logits: Logits, x: Float[Tensor, "groups members dim"], real: Real = None
) -> Float[Tensor, "rows dim"]:
    """Tokens to rows, with all weights at once."""
    if real is not None:
        x = torch.where(real.unsqueeze(-1), x, torch.zeros_like(x))
    weight = dispatch_weight(logits, real).to(x.dtype)
    return torch.einsum("gmes,gmd->egsd", weight, x).flatten(0, 2)


def combine_reference(
    logits: Logits, rows: Float[Tensor, "rows dim"], real: Real = None
) -> Float[Tensor, "groups members dim"]:
    """Rows to tokens, with all weights at once."""
    groups, _, experts, slots = logits.shape
    rows = rows.reshape(experts, groups, slots, rows.shape[1])
    return torch.einsum("gmes,egsd->gmd", combine_weight(logits, real).to(rows.dtype), rows)


@dataclass(frozen=True, slots=True)
class SoftMaps:
    """The maps of a soft routing by kernels, which read the logits and write no weights."""

    def dispatch_weight(self, logits: Logits, real: Real) -> Logits:
        """See the function of this name."""
        return dispatch_weight(logits, real)

    def combine_weight(self, logits: Logits, real: Real) -> Logits:
        """See the function of this name."""
        return combine_weight(logits, real)

    def dispatch(
        self, logits: Logits, x: Float[Tensor, "groups members dim"], real: Real
    ) -> Float[Tensor, "rows dim"]:
        """Tokens to rows."""
        from moefold.ops.triton.soft import soft_mix

        return soft_mix(logits, _as_autocast(x).flatten(0, 1), real, True)[0]

    def combine(
        self, logits: Logits, rows: Float[Tensor, "rows dim"], real: Real
    ) -> Float[Tensor, "groups members dim"]:
        """Rows to tokens."""
        from moefold.ops.triton.soft import soft_mix

        mixed = soft_mix(logits, _as_autocast(rows), real, False)[0]
        return mixed.reshape(*logits.shape[:2], rows.shape[1])


def _as_autocast(x: Tensor) -> Tensor:
    """In the dtype that a matrix product would have here."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if on else x
