"""A sparse routing: a list of rows sorted by expert.

Shapes: `batch tokens dim` is the input, `experts` the number of experts, and `rows` the number of
(token, expert) pairs that were chosen. A *flat token* is an index into `batch * tokens`.

    rows:            expert 0           | expert 1      | expert 2 has none | expert 3
    token_of_row:    0   2   5          | 2   3         |                   | 4
    weight_of_row:   .6  .5  .9         | .5  1.        |                   | .7
    rows_per_expert: 3                  | 2             | 0                 | 1

Token 1 has no row (it comes back as exactly zero), token 2 has two.

A graph that must not depend on data (under `torch.compile`) and a device that must not be waited
for (CUDA) cannot know how many pairs there are. There the list is as long as it could ever be, and
the rows past `rows_per_expert.sum()` are *spare*: they belong to no expert, have token 0 and weight
0, and count nowhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefold.ops.rows import list_rows
from moefold.routing.grouping import Grouping


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseRouting:
    """Which token goes to which expert, and with what weight its result comes back.

    Attributes:
        token_of_row: flat token of every row.
        weight_of_row: combine weight of every row, float32 or better; has the router's gradient.
        rows_per_expert: int64; rows of expert 0 come first, then those of expert 1, and so on.
        grouping: which tokens competed, and the shape of the input.
        mask: True for real tokens, None if all are.
        logits: what the router computed, before noise.
        noisy_logits: what was scored, where that was not `logits`.
        noise_std: standard deviation of the noise between the two.
        scores: what competed.
        wanted: pairs asked for before capacity was applied, None if that is what was chosen.
        l1_strength: how strongly the router asks to be made sparse, for the `l1` loss.
        predicted: log-odds that a predictor gives every pair, for the `membership` loss.
        student: logits of a gate that learns to foresee `scores`, for the `competition` loss.
        decide: what to make of the experts' results where these decide, see `settled`.
    """

    token_of_row: Int[Tensor, " rows"]
    weight_of_row: Float[Tensor, " rows"]
    rows_per_expert: Int[Tensor, " experts"]
    grouping: Grouping
    mask: Bool[Tensor, "batch tokens"] | None = None
    logits: Float[Tensor, "batch tokens experts"] | None = None
    noisy_logits: Float[Tensor, "batch tokens experts"] | None = None
    noise_std: float = 0.0
    scores: Float[Tensor, "batch tokens experts"] | None = None
    wanted: Bool[Tensor, "batch tokens experts"] | None = None
    l1_strength: Float[Tensor, ""] | None = None
    predicted: Float[Tensor, "batch tokens experts"] | None = None
    student: Float[Tensor, "batch tokens experts"] | None = None
    decide: Callable[["SparseRouting", Tensor], "SparseRouting"] | None = None

    @classmethod
    def from_choice(
        cls,
        chosen: Bool[Tensor, "batch tokens experts"],
        weights: Float[Tensor, "batch tokens experts"],
        *,
        most_rows: int | None = None,
        grouping: Grouping | None = None,
        **extra: object,
    ) -> "SparseRouting":
        """Build the list of rows from a matrix of chosen pairs.

        Args:
            chosen: which token takes which expert. Padding must not be chosen.
            weights: combine weight of every pair; only the chosen ones are read.
            most_rows: the most pairs there can ever be; every pair if None. Only used where the
                number of pairs may not be read from the data.
            grouping: which tokens competed; one group per sequence if None.
            **extra: the optional attributes of the routing.
        """
        batch, tokens, _ = chosen.shape
        rows = list_rows(chosen, weights, chosen.numel() if most_rows is None else most_rows)
        return cls(
            token_of_row=rows.token_of_row,
            weight_of_row=rows.weight_of_row,
            rows_per_expert=rows.rows_per_expert,
            grouping=grouping or Grouping("sequence", batch, tokens),
            **extra,  # pyright: ignore[reportArgumentType]
        )

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.rows_per_expert.shape[0]

    @property
    def num_tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.grouping.batch * self.grouping.tokens

    @property
    def expert_of_row(self) -> Int[Tensor, " rows"]:
        """Expert of every row; `num_experts` for spare rows."""
        rows = torch.arange(self.token_of_row.shape[0], device=self.token_of_row.device)
        return torch.searchsorted(self.rows_per_expert.cumsum(0), rows, right=True)

    @property
    def weights(self) -> Float[Tensor, "batch tokens experts"]:
        """Combine weight of every pair, zero where it was not chosen."""
        return self.by_pair(self.weight_of_row)

    @property
    def chosen(self) -> Bool[Tensor, "batch tokens experts"]:
        """Which token has a row of which expert."""
        return self.by_pair(torch.ones_like(self.weight_of_row)).detach() > 0

    def by_pair(self, of_row: Float[Tensor, " rows"]) -> Float[Tensor, "batch tokens experts"]:
        """A number of every row, where its pair is; zero for pairs without a row."""
        width = self.num_experts + 1  # a last column takes the spare rows
        matrix = of_row.new_zeros(self.num_tokens * width)
        matrix = matrix.index_add(0, self.token_of_row * width + self.expert_of_row, of_row)
        shape = self.grouping.batch, self.grouping.tokens, width
        return matrix.reshape(shape)[..., : self.num_experts]

    def by_row(self, of_pair: Float[Tensor, "batch tokens experts"]) -> Float[Tensor, " rows"]:
        """The inverse: a number of every pair, for those that have a row; zero for spare rows."""
        padded = torch.nn.functional.pad(of_pair, (0, 1)).reshape(-1)
        return padded.gather(0, self.token_of_row * (self.num_experts + 1) + self.expert_of_row)

    def settled(self, rows: Float[Tensor, "rows dim"]) -> "SparseRouting":
        """The routing once the experts have computed its rows: the same rows, maybe weighed anew.

        Itself but for routers that let the experts' results decide.
        """
        return self if self.decide is None else self.decide(self, rows)

    def dispatch(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "rows dim"]:
        """Tokens to rows: every row is a copy of its token."""
        return x.reshape(self.num_tokens, x.shape[-1]).index_select(0, self.token_of_row)

    def combine(self, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Rows to tokens: every token is the weighted sum of its rows, zero if it has none."""
        weighted = rows * self.weight_of_row.to(rows.dtype).unsqueeze(1)
        out = rows.new_zeros(self.num_tokens, rows.shape[1])
        out = out.index_add(0, self.token_of_row, weighted)
        return out.reshape(self.grouping.batch, self.grouping.tokens, rows.shape[1])

    def as_matrices(
        self,
    ) -> tuple[Float[Tensor, "rows flat_tokens"], Float[Tensor, "flat_tokens rows"]]:
        """The two maps as matrices: `dispatch` is `D @ x` and `combine` is `C @ rows`.

        `x` is flattened to `[batch * tokens, dim]`. This is the definition; it is slow.
        """
        rows = self.token_of_row.shape[0]
        real = (self.expert_of_row < self.num_experts).to(self.weight_of_row.dtype)
        dispatch = self.weight_of_row.new_zeros(rows, self.num_tokens)
        dispatch = dispatch.scatter(1, self.token_of_row.unsqueeze(1), real.unsqueeze(1))
        return dispatch, (dispatch * self.weight_of_row.unsqueeze(1)).t()
