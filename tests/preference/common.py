"""Random groups of ragged sizes, and a slow look at each of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moefold.preference import ConsistentComparator, Groups
from moefold.preference.scorers import MLPScorer


def random_groups(
    count: int = 7, features: int = 5, *, seed: int = 0, most: int = 6, **parts: Any
) -> Any:
    """Groups of two candidates and more in float64, with a choice."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, most + 1, (count,), generator=draw)
    candidates = torch.randn(int(lengths.sum()), features, generator=draw, dtype=torch.float64)
    chosen = (torch.rand(count, generator=draw) * lengths).long()
    return Groups(candidates=candidates, lengths=lengths, chosen=chosen, **parts)


def comparator(features: int = 5, *, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return ConsistentComparator(MLPScorer(features, **settings)).double()


def one_by_one(groups: Groups, *of_candidates: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """What belongs to each group of tensors over all candidates."""
    lengths = groups.lengths.tolist()
    yield from zip(*(values.split(lengths) for values in of_candidates), strict=True)
