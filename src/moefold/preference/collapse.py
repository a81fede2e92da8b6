"""Candidates of a group that are the same thing.

Two plays that lead to one position are one alternative: left in, the chosen one would be compared
with itself.
"""

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from moefold.preference.groups import Groups
from moefold.preference.ragged import rows_as_array


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Collapsed:
    """What was taken away.

    Attributes:
        duplicates: candidates equal to another one of their group.
        forced: groups that had one candidate left, and are gone.
    """

    duplicates: int
    forced: int


def collapsed(groups: Groups) -> tuple[Groups, Collapsed]:
    """The groups with one of every set of equal candidates: the chosen, or the best, or the first.

    Equal are texts that are the same, and features of the same value.

    Returns:
        The groups, without those that had one candidate left, and what was taken away.
    """
    content = torch.as_tensor(_numbered(groups.candidates))
    group = groups.group_of_candidate.cpu()
    worse = ~groups.best.cpu() if groups.is_labelled else torch.zeros(len(group), dtype=torch.bool)
    key = group * len(content) + content
    order = np.lexsort((worse.numpy(), key.numpy()))
    first = np.unique(key.numpy()[order], return_index=True)[1]
    kept = torch.zeros(len(key), dtype=torch.bool)
    kept[torch.as_tensor(order[first])] = True
    found = groups.with_candidates(kept.to(groups.lengths.device))
    many = found.lengths > 1
    told = Collapsed(duplicates=int((~kept).sum()), forced=int((~many).sum()))
    return found.take(many.nonzero().squeeze(1)), told


def _numbered(candidates: Tensor | list[str]) -> np.ndarray:
    """A number for each candidate, the same for equal ones."""
    if isinstance(candidates, list):
        place: dict[str, int] = {}
        return np.array([place.setdefault(text, len(place)) for text in candidates], np.int64)
    values = rows_as_array(candidates)
    if not values.size:  # none, or none with a feature by which they could differ
        return np.zeros(len(values), np.int64)
    bytes_of = values.view([("", f"V{values.itemsize * values.shape[1]}")])
    return np.unique(bytes_of.ravel(), return_inverse=True)[1].astype(np.int64)
