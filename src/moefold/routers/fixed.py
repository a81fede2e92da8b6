"""Routers without parameters: hash and random, the baselines a learnt router has to beat.

Shapes: `batch tokens` in, `k` experts for each token.
"""

from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefold.ops.select import top
from moefold.routers.base import AbstractRouter, check_k, check_one_of
from moefold.routing import Grouping, Routing, SparseRouting


@final
class HashRouter(AbstractRouter):
    """A token's id, or its position, decides its experts once and for all.

    The hash is arithmetic (no table): the `k` experts of an id are `k` consecutive ones, from a
    start that a 32-bit mix of id and seed gives.

    Source: Roller et al., *Hash Layers For Large Sparse Models*, 2021 (random hash); by position,
    as some released code has it, is a setting.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 1,
        by: Literal["id", "position"] = "id",
        seed: int = 0,
    ) -> None:
        # A position is a count of the real tokens before.
        super().__init__(dim, num_experts, reach="past" if by == "position" else "token")
        check_k(k, num_experts)
        check_one_of("by", by, ("id", "position"))
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed is {seed!r}; it must be a whole number.")
        self.k = k
        self.by = by
        self.seed = seed

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        ids: Int[Tensor, "batch tokens"] | None = None,
    ) -> Routing:
        """Route the tokens by `ids` or by position; see `AbstractRouter.forward`.

        Raises:
            ValueError: the router hashes ids and none were given, or their shape is wrong.
        """
        self.check(x, mask)
        batch, tokens, _ = x.shape
        if self.by == "position":
            ids = torch.arange(tokens, device=x.device).expand(batch, tokens)
            if mask is not None:  # padding before a sequence is no part of it
                ids = (mask.cumsum(1) - 1).clamp_min(0)
        if ids is None:
            raise ValueError(
                f"{self.site}: the hash router needs token ids; pass ids=[batch, tokens], or build "
                "it with by='position'."
            )
        if ids.shape != x.shape[:2]:
            raise ValueError(
                f"{self.site}: ids have shape {tuple(ids.shape)}, but x has [batch, tokens] = "
                f"{tuple(x.shape[:2])}. Pass one id for each token."
            )
        if ids.is_floating_point():
            raise ValueError(
                f"{self.site}: ids have dtype {ids.dtype}; token ids are whole numbers."
            )
        self.check_finite(x, mask, "hidden states")
        first = _mix(ids, self.seed) % self.num_experts
        experts = torch.arange(self.num_experts, device=x.device)
        chosen = (experts - first.unsqueeze(-1)) % self.num_experts < self.k
        return _constant(chosen, mask, self.k, x)


@final
class RandomRouter(AbstractRouter):
    """Every token takes `k` random experts, drawn anew in each forward pass: the null baseline."""

    def __init__(self, dim: int, num_experts: int, *, k: int = 2) -> None:
        super().__init__(dim, num_experts, reach="token")
        check_k(k, num_experts)
        self.k = k

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        ids: Int[Tensor, "batch tokens"] | None = None,
    ) -> Routing:
        """Route the tokens at random; see `AbstractRouter.forward`."""
        self.check(x, mask)
        self.check_finite(x, mask, "hidden states")
        draws = torch.rand(*x.shape[:2], self.num_experts, device=x.device)
        return _constant(top(draws, self.k, -1), mask, self.k, x)


def _constant(chosen: Tensor, mask: Tensor | None, k: int, x: Tensor) -> SparseRouting:
    """Equal weights that sum to 1 over the experts of a token."""
    if mask is not None:
        chosen = chosen & mask.unsqueeze(-1)
    weights = torch.full(
        chosen.shape, 1.0 / k, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    most = x.shape[0] * x.shape[1] * k
    grouping = Grouping("sequence", x.shape[0], x.shape[1])
    return SparseRouting.from_choice(chosen, weights, most_rows=most, grouping=grouping, mask=mask)


def _mix(ids: Tensor, seed: int) -> Tensor:
    """Scatter 32-bit integers: neighbouring ids get unrelated starts (MurmurHash3's finaliser)."""
    h = (ids.long() + (seed * 0x9E3779B9 & 0xFFFFFFFF)) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)
