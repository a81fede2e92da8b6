"""How many rows an expert may take in a group.

Shapes: a number for one group, `[groups]` for several.

One convention, and the two published ones as settings. With `n` real tokens in the group, `k`
experts asked for by each token (1 where experts choose; an average need not be whole) and `E`
experts:

    "moefold"     ceil(factor * n * k / E)
    "vmoe"        the same, rounded up to a multiple of 4        [google-research/vmoe]
    "flaxformer"  max(round(factor * n / E), 4), without k       [google/flaxformer]

So a factor of 1 with k = 2 gives twice the room in vmoe that it gives in flaxformer. Padding is not
counted: a batch padded further has the capacity it had. Never more than `n`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from moefold.routers.base import check_one_of, check_positive

Convention = Literal["moefold", "vmoe", "flaxformer"]
CONVENTIONS = ("moefold", "vmoe", "flaxformer")
_SLACK = 1e-9  # 1.1 * 10 is 11.000000000000002 in floating point; it must not round up to 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Rows of one expert in one group: a fixed number, or a factor of the fair share.

    Attributes:
        rows: fixed number of rows, or None.
        factor: 1.0 is just enough for a perfect balance, or None.
        convention: how a factor becomes a number, see the module.
    """

    rows: int | None = None
    factor: float | None = None
    convention: Convention = "moefold"

    def __post_init__(self) -> None:
        check_one_of("convention", self.convention, CONVENTIONS)
        if self.rows is not None and self.factor is not None:
            raise ValueError(
                f"capacity is {self.rows} and capacity_factor is {self.factor}; give one of them."
            )
        if self.rows is not None:
            check_positive("capacity", self.rows)
        if self.factor is not None:
            check_positive("capacity_factor", self.factor, integer=False)

    @property
    def is_unlimited(self) -> bool:
        """Whether every token finds room."""
        return self.rows is None and self.factor is None

    def of(self, tokens: int, k: float, experts: int) -> int:
        """Rows of one expert in a group of so many real tokens."""
        if self.rows is not None:
            return min(self.rows, tokens)
        if self.factor is None:
            return tokens
        fair = self.factor * tokens * k / experts
        if self.convention == "flaxformer":
            return min(max(round(self.factor * tokens / experts), 4), tokens)
        # The ceiling, for less the slack no share of a few million is a whole number, in the one
        # form that a saved program of torch.export can hold.
        rows = math.trunc(fair - _SLACK) + 1
        if self.convention == "vmoe":
            rows = -(-rows // 4) * 4
        return min(rows, tokens)

    def of_groups(
        self, tokens: Int[Tensor, "*groups"], k: float, experts: int
    ) -> Int[Tensor, "*groups"]:
        """The same for every group, from its number of real tokens, without leaving the device."""
        if self.rows is not None:
            return tokens.clamp_max(self.rows)
        if self.factor is None:
            return tokens
        if self.convention == "flaxformer":
            rows = torch.round(tokens.double() * self.factor / experts).clamp_min(4)
        else:
            rows = torch.ceil(tokens.double() * (self.factor * k) / experts - _SLACK)
            if self.convention == "vmoe":
                rows = torch.ceil(rows / 4) * 4
        return torch.minimum(rows.long(), tokens)
