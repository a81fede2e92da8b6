"""A soft routing: every row mixes tokens, every token mixes rows.

Shapes: `groups members` are the tokens as they mix, `slots` the rows of one expert in one group.
Rows are sorted by expert: `[experts, groups, slots]` flattened.

Puigcerver et al., *From Sparse to Soft Mixtures of Experts*, 2024, section 2.1: with dispatch
weights D and combine weights C, the rows are `D^T X` and the result is `C Y`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefold.routing.grouping import Grouping


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SoftRouting:
    """How much of every token is in every row, and of every row in every token.

    Attributes:
        dispatch_weight: for each slot a distribution over the real tokens of its group (all zero in
            a group without real tokens).
        combine_weight: for each real token a distribution over all slots; zero for padding.
        grouping: which tokens mix, and the shape of the input.
        mask: True for real tokens, None if all are.
        logits: what both distributions were made of.
    """

    dispatch_weight: Float[Tensor, "groups members experts slots"]
    combine_weight: Float[Tensor, "groups members experts slots"]
    grouping: Grouping
    mask: Bool[Tensor, "batch tokens"] | None = None
    logits: Float[Tensor, "groups members experts slots"] | None = None

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.dispatch_weight.shape[2]

    @property
    def num_tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.grouping.batch * self.grouping.tokens

    @property
    def rows_per_expert(self) -> Int[Tensor, " experts"]:
        """Number of rows of every expert: slots times groups, the same for all."""
        groups, _, experts, slots = self.dispatch_weight.shape
        return torch.full((experts,), groups * slots, device=self.dispatch_weight.device)

    @property
    def expert_of_row(self) -> Int[Tensor, " rows"]:
        """Expert of every row."""
        groups, _, experts, slots = self.dispatch_weight.shape
        expert = torch.arange(experts, device=self.dispatch_weight.device)
        return expert.repeat_interleave(groups * slots)

    def dispatch(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "rows dim"]:
        """Tokens to rows: every row is a weighted mean of the tokens of its group."""
        if self.mask is not None:
            # A padding token may hold anything; zero times infinity would not be zero.
            x = torch.where(self.mask.unsqueeze(-1), x, torch.zeros_like(x))
        rows = torch.einsum(
            "gmes,gmd->egsd", self.dispatch_weight.to(x.dtype), self.grouping.split(x)
        )
        return rows.reshape(-1, x.shape[-1])

    def settled(self, rows: Float[Tensor, "rows dim"]) -> "SoftRouting":
        """Itself: no result of an expert changes it, see `SparseRouting.settled`."""
        return self

    def combine(self, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Rows to tokens: every real token is a weighted mean of all rows of its group."""
        groups, _, experts, slots = self.combine_weight.shape
        by_group = rows.reshape(experts, groups, slots, rows.shape[1])
        mixed = torch.einsum("gmes,egsd->gmd", self.combine_weight.to(rows.dtype), by_group)
        return self.grouping.merge(mixed)

    def as_matrices(
        self,
    ) -> tuple[Float[Tensor, "rows flat_tokens"], Float[Tensor, "flat_tokens rows"]]:
        """The two maps as matrices: `dispatch` is `D @ x` and `combine` is `C @ rows`.

        `x` is flattened to `[batch * tokens, dim]`. This is the definition; it is slow.
        """
        return self._matrix(self.dispatch_weight), self._matrix(self.combine_weight).t()

    def _matrix(self, weight: Tensor) -> Tensor:
        groups, members, experts, slots = weight.shape
        flat = torch.arange(self.num_tokens, device=weight.device)
        flat = self.grouping.split(flat.reshape(self.grouping.batch, self.grouping.tokens))
        matrix = weight.new_zeros(experts, groups, slots, self.num_tokens)
        where = flat[None, :, None, :].expand(experts, groups, slots, members)
        return matrix.scatter(3, where, weight.permute(2, 0, 3, 1)).flatten(0, 2)
