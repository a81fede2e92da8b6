"""The list of rows by torch's operations: the slow twins of `ops.rows`.

Shapes: see `ops.rows`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Rows(NamedTuple):
    """The list."""

    token_of_row: Int[Tensor, " rows"]
    weight_of_row: Float[Tensor, " rows"]
    rows_per_expert: Int[Tensor, " experts"]


def list_reference(
    chosen: Bool[Tensor, "tokens experts"], weights: Float[Tensor, "tokens experts"]
) -> Rows:
    """List the chosen pairs with their weights, where the number of rows may be read."""
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
