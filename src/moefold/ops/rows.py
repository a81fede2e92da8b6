"""From chosen pairs to the list of rows, sorted by expert and then by token.

Shapes: `tokens experts` pairs; `rows` is the length of the list. Where the number of chosen pairs
may be read it is that number; else as long as it could ever be, and what comes after the rows of
all experts is *spare*, with token 0 and weight 0.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefold.ops import kernels
from moefold.ops.cpu import routing as compiled


class Rows(NamedTuple):
    """The list."""

    token_of_row: Int[Tensor, " rows"]
    weight_of_row: Float[Tensor, " rows"]
    rows_per_expert: Int[Tensor, " experts"]


def list_rows(
    chosen: Bool[Tensor, "tokens experts"],
    weights: Float[Tensor, "tokens experts"],
    most_rows: int,
) -> Rows:
    """List the chosen pairs with their weights.

    Args:
        chosen: which pairs have a row.
        weights: of all pairs; only those of chosen ones are read.
        most_rows: the most pairs there can ever be.
    """
    if kernels.serve(weights):
        from moefold.ops.triton.rows import list_rows as kernel

        return Rows(*kernel(chosen, weights, most_rows)[:3])
    if compiled.serves(weights, marks=[chosen]):
        return Rows(*compiled.list_rows(chosen, weights))
    if torch.compiler.is_compiling() or chosen.device.type in ("cuda", "meta"):
        return list_unread(chosen, weights, most_rows)
    return list_reference(chosen, weights)


def list_reference(
    chosen: Bool[Tensor, "tokens experts"], weights: Float[Tensor, "tokens experts"]
) -> Rows:
    """What `list_rows` returns where the number of rows may be read, by operations of torch."""
    by_expert, experts = chosen.t(), chosen.shape[1]
    expert, token = by_expert.nonzero(as_tuple=True)
    weight = weights.reshape(-1).gather(0, token * experts + expert)
    return Rows(token, weight, by_expert.sum(1))


def list_unread(
    chosen: Bool[Tensor, "tokens experts"],
    weights: Float[Tensor, "tokens experts"],
    most_rows: int,
) -> Rows:
    """The same where it may not: in a graph, or on a device that nobody shall wait for."""
    by_expert, experts = chosen.t(), chosen.shape[1]
    pairs = torch.nonzero_static(by_expert, size=most_rows, fill_value=-1)
    real = pairs[:, 0] >= 0
    expert, token = pairs.clamp_min(0).unbind(1)
    weight = weights.reshape(-1).gather(0, token * experts + expert)
    return Rows(token, torch.where(real, weight, torch.zeros_like(weight)), by_expert.sum(1))
