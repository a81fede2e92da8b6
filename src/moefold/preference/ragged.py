"""Groups of different size that lie one after the other.

Shapes: `items` of all groups; `groups`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SHOWN = 5
"""Faults that a message names; of the others it says how many there are."""


def select(items: Any, index: Int[Tensor, " taken"]) -> Any:
    """These of a tensor's rows, or of a list's texts."""
    if isinstance(items, Tensor):
        return items[index]
    return [items[i] for i in index.tolist()]


def rows_as_array(items: Tensor) -> np.ndarray:
    """A row of numbers for each item, in which equal values have equal bytes."""
    rows = items.detach().cpu().reshape(len(items), items[:1].numel())
    if rows.dtype == torch.bfloat16:  # which NumPy does not have; float32 holds all its values
        rows = rows.float()
    return np.ascontiguousarray(rows.numpy() + 0)  # minus zero becomes zero


def ranges(
    starts: Int[Tensor, " groups"], lengths: Int[Tensor, " groups"]
) -> Int[Tensor, " items"]:
    """Numbers from each start on, as many as the length says: 5 6 7, 0 1 of (5, 0), (3, 2)."""
    first = (starts - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
    return first + torch.arange(len(first), device=first.device)


def total(values: Float[Tensor, " items"], group: Int[Tensor, " items"], groups: int) -> Tensor:
    """The sum of each group."""
    return values.new_zeros(groups).index_add(0, group, values)


def highest(values: Float[Tensor, " items"], group: Int[Tensor, " items"], groups: int) -> Tensor:
    """The largest value of each group, -inf for an empty one; no gradient."""
    lowest = values.new_full((groups,), -torch.inf)
    return lowest.scatter_reduce(0, group, values.detach(), "amax")


def log_sum_exp(
    values: Float[Tensor, " items"], group: Int[Tensor, " items"], groups: int
) -> Float[Tensor, " groups"]:
    """log of the sum of exp of each group, which must have a finite value."""
    top = highest(values, group, groups)
    return top + total((values - top[group]).exp(), group, groups).log()


def fault_list(wrong: Bool[Tensor, " groups"], words: str, *values: Tensor) -> Sequence[str]:
    """What is wrong with the first of these groups, in words, and how many others there are.

    Args:
        wrong: which groups.
        words: with a place for the group's number and one for each value.
        values: of every group.
    """
    places = wrong.nonzero().squeeze(1).tolist()
    faults = [words.format(n, *(value[n].item() for value in values)) for n in places[:SHOWN]]
    if len(places) > SHOWN:
        faults.append(f"and so in {len(places) - SHOWN} more groups")
    return faults
