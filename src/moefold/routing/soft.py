"""A soft routing: every row mixes tokens, every token mixes rows.

Shapes: `groups members` are the tokens as they mix, `slots` the rows of one expert in one group.
Rows are sorted by expert: `[experts, groups, slots]` flattened.

Puigcerver et al., *From Sparse to Soft Mixtures of Experts*, 2024, section 2.1: with dispatch
weights D and combine weights C, the rows are `D^T X` and the result is `C Y`.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefold.ops.soft import combine_weight, dispatch_weight, to_rows, to_tokens
from moefold.routing.grouping import Grouping

Weights = Float[Tensor, "groups members experts slots"]
Real = Bool[Tensor, "groups members"] | None


@runtime_checkable
class Maps(Protocol):
    """Maps that are made of logits, so that a routing need not keep the weights."""

    def dispatch(
        self, logits: Weights, x: Float[Tensor, "groups members dim"], real: Real
    ) -> Float[Tensor, "rows dim"]:
        """Tokens to rows."""
        ...

    def combine(
        self, logits: Weights, rows: Float[Tensor, "rows dim"], real: Real
    ) -> Float[Tensor, "groups members dim"]:
        """Rows to tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, init=False)
class SoftRouting:
    """How much of every token is in every row, and of every row in every token.

    It is given its weights, or logits and maps that are made of them. Then `dispatch_weight` and
    `combine_weight` are made anew each time somebody asks: each needs as much memory as the logits.

    Attributes:
        grouping: which tokens mix, and the shape of the input.
        mask: True for real tokens, None if all are.
        logits: what both distributions were made of.
        maps: go from tokens to rows and back by the logits; None where the weights were given.
        given: dispatch and combine weights, None where logits make them.
    """

    grouping: Grouping
    mask: Bool[Tensor, "batch tokens"] | None
    logits: Weights | None
    maps: Maps | None
    given: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        *,
        grouping: Grouping,
        dispatch_weight: Weights | None = None,
        combine_weight: Weights | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        logits: Weights | None = None,
        maps: Maps | None = None,
    ) -> None:
        """Take the weights, or what makes them.

        Args:
            grouping: see the attribute.
            dispatch_weight: see the property.
            combine_weight: see the property.
            mask: see the attribute.
            logits: see the attribute.
            maps: see the attribute.

        Raises:
            ValueError: there are neither weights nor logits and maps.
        """
        given = None
        if dispatch_weight is not None and combine_weight is not None and maps is None:
            given = dispatch_weight, combine_weight
        elif dispatch_weight is not None or combine_weight is not None:
            raise ValueError(
                "a soft routing takes dispatch_weight together with combine_weight and without "
                "maps; give both weights, or logits and maps."
            )
        elif logits is None or maps is None:
            raise ValueError(
                "a soft routing was given no weights, and not both logits and maps to make them; "
                "give dispatch_weight and combine_weight, or logits and maps."
            )
        for name, value in (
            ("grouping", grouping),
            ("mask", mask),
            ("logits", logits),
            ("maps", maps),
            ("given", given),
        ):
            object.__setattr__(self, name, value)

    @property
    def dispatch_weight(self) -> Weights:
        """For each slot a distribution over the real tokens of its group.

        All zero in a group without real tokens.
        """
        return self.given[0] if self.given else dispatch_weight(self._like, self._real)

    @property
    def combine_weight(self) -> Weights:
        """For each real token a distribution over all slots; zero for padding."""
        return self.given[1] if self.given else combine_weight(self._like, self._real)

    @property
    def _like(self) -> Tensor:
        """A tensor of the shape of both weights: the logits, where these make the weights."""
        shaped = self.logits if self.given is None else self.given[0]
        assert shaped is not None
        return shaped

    @property
    def _real(self) -> Tensor | None:
        return None if self.mask is None else self.grouping.split(self.mask)

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self._like.shape[2]

    @property
    def slots(self) -> int:
        """Rows of one expert in one group."""
        return self._like.shape[3]

    @property
    def num_tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.grouping.batch * self.grouping.tokens

    @property
    def rows_per_expert(self) -> Int[Tensor, " experts"]:
        """Number of rows of every expert: slots times groups, the same for all."""
        groups, _, experts, slots = self._like.shape
        return torch.full((experts,), groups * slots, device=self._like.device)

    @property
    def expert_of_row(self) -> Int[Tensor, " rows"]:
        """Expert of every row."""
        groups, _, experts, slots = self._like.shape
        expert = torch.arange(experts, device=self._like.device)
        return expert.repeat_interleave(groups * slots)

    def dispatch(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "rows dim"]:
        """Tokens to rows: every row is a weighted mean of the tokens of its group."""
        if self.maps is not None:
            return self.maps.dispatch(self._like, self.grouping.split(x), self._real)
        return to_rows(self.dispatch_weight, self.grouping.split(x), self._real)

    def settled(self, rows: Float[Tensor, "rows dim"]) -> "SoftRouting":
        """Itself: no result of an expert changes it, see `SparseRouting.settled`."""
        return self

    def combine(self, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Rows to tokens: every real token is a weighted mean of all rows of its group."""
        if self.maps is not None:
            return self.grouping.merge(self.maps.combine(self._like, rows, self._real))
        return self.grouping.merge(to_tokens(self.combine_weight, rows))

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
