"""Choices: who picks whom. The second of the three choices that make a sparse router.

Shapes: scores `[groups, members, experts]` in, a boolean matrix of the same shape out. `valid`
marks the real tokens; padding is never chosen. Ties go to the lowest index.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefold.ops.select import rank, top, within_both, within_capacity, within_columns
from moefold.ops.transport import assign_balanced
from moefold.routers.base import Reach, check_at_least_zero, check_k, check_one_of, check_positive
from moefold.routers.capacity import Capacity

Scores = Float[Tensor, "groups members experts"]
Valid = Bool[Tensor, "groups members"] | None


Share = Literal["pairs", "experts", "tokens"]
"""One budget for all pairs of a group, a number of rows for each expert, or for each token."""


class Picked(NamedTuple):
    """What a choice returns.

    Attributes:
        chosen: the pairs that get a row.
        wanted: the pairs asked for, where capacity turned some away; None otherwise.
        most_rows: the most rows there can be in all groups together, whatever the scores are.
    """

    chosen: Bool[Tensor, "groups members experts"]
    wanted: Bool[Tensor, "groups members experts"] | None
    most_rows: int


@runtime_checkable
class Choice(Protocol):
    """Picks pairs by their scores."""

    @property
    def reach(self) -> Reach: ...

    @property
    def share(self) -> Share:
        """What a group's pairs compete for; see `Share`."""
        ...

    def fan_out(self, num_experts: int) -> float:
        """Experts of one token on average.

        Raises:
            ValueError: it depends on the number of tokens.
        """
        ...

    def quota(self, tokens: Int[Tensor, "*groups"], num_experts: int) -> Int[Tensor, "*groups"]:
        """Pairs that groups of so many real tokens choose, of each share."""
        ...

    def check(self, num_experts: int) -> None:
        """Refuse settings that do not fit the number of experts."""
        ...

    def __call__(self, scores: Scores, valid: Valid, training: bool) -> Picked: ...


def _spread(valid: Valid, scores: Tensor) -> Tensor | None:
    return None if valid is None else valid.unsqueeze(-1).expand_as(scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopExperts:
    """Each token takes its `k` best experts, as far as their buffers have room (token choice).

    Attributes:
        k: experts of one token.
        capacity: rows of one expert in one group; unlimited by default (dropless).
        priority: who finds room first among the first choices, then among the second, and so on:
            by `order` of the tokens, or by their best `gate` (Batch Prioritised Routing).
        expert_groups: experts lie in so many groups, and a token takes experts from its
            `top_groups` best only, a group being judged by the sum of its two best scores
            (DeepSeek-V3, 2024, section 2.1.2).
        top_groups: see `expert_groups`.
    """

    k: int = 2
    capacity: Capacity = field(default_factory=Capacity)
    priority: Literal["order", "gate"] = "order"
    expert_groups: int = 1
    top_groups: int = 1
    share: Share = field(default="tokens", init=False)

    def __post_init__(self) -> None:
        check_positive("k", self.k)
        check_one_of("priority", self.priority, ("order", "gate"))
        check_positive("expert_groups", self.expert_groups)
        check_positive("top_groups", self.top_groups)

    @property
    def reach(self) -> Reach:
        if self.capacity.is_unlimited:
            return "token"
        # Room by arrival depends on the past only, if the room itself is a fixed number.
        by_arrival = self.k == 1 and self.priority == "order" and self.capacity.rows is not None
        return "past" if by_arrival else "group"

    def fan_out(self, num_experts: int) -> float:
        return float(self.k)

    def quota(self, tokens: Tensor, num_experts: int) -> Tensor:
        return torch.full_like(tokens, self.k)

    def check(self, num_experts: int) -> None:
        check_k(self.k, num_experts)
        if num_experts % self.expert_groups:
            raise ValueError(
                f"expert_groups is {self.expert_groups}, which does not divide {num_experts} "
                "experts; use a divisor."
            )
        if self.top_groups > self.expert_groups:
            raise ValueError(
                f"top_groups is {self.top_groups}, but there are only {self.expert_groups} "
                "expert_groups."
            )
        reachable = num_experts // self.expert_groups * self.top_groups
        if self.k > reachable:
            raise ValueError(
                f"k is {self.k}, but top_groups={self.top_groups} leaves a token only {reachable} "
                "experts; raise top_groups or lower k."
            )

    def __call__(self, scores: Scores, valid: Valid, training: bool) -> Picked:
        groups, members, experts = scores.shape
        real = _spread(valid, scores)
        open_to = self._best_groups(scores)
        if open_to is not None:
            real = open_to if real is None else real & open_to
        wanted = top(scores, self.k, -1, real)
        most = groups * members * self.k
        if self.capacity.is_unlimited:
            return Picked(wanted, None, most)
        if valid is None:
            rows = self.capacity.of(members, self.k, experts)
        else:
            rows = self.capacity.of_groups(valid.sum(1), self.k, experts)
        kept = within_capacity(wanted, scores, rows, self.k, self.priority == "gate")
        return Picked(kept, wanted, most)

    def _best_groups(self, scores: Tensor) -> Tensor | None:
        if self.top_groups == self.expert_groups:
            return None
        grouped = scores.unflatten(-1, (self.expert_groups, -1))
        of_group = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        best = top(of_group, self.top_groups, -1)
        return best.unsqueeze(-1).expand_as(grouped).flatten(-2)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopTokens:
    """Each expert takes its best tokens, as many as its capacity (expert choice).

    Attributes:
        capacity: rows of one expert in one group. Every expert fills it: loads are equal.
        only_positive: leave rows empty rather than take a token with a score of zero.
    """

    capacity: Capacity = field(default_factory=lambda: Capacity(factor=2.0))
    only_positive: bool = False
    reach: Reach = field(default="group", init=False)
    share: Share = field(default="experts", init=False)

    def __post_init__(self) -> None:
        if self.capacity.is_unlimited:
            raise ValueError(
                "capacity and capacity_factor are both None; where experts choose tokens one of "
                "them must say how many, for instance capacity_factor=2.0."
            )

    def fan_out(self, num_experts: int) -> float:
        if self.capacity.factor is None:
            raise ValueError(
                f"capacity is {self.capacity.rows} rows of an expert, whatever the number of "
                f"tokens, so that nothing says how many experts one token has; give "
                f"capacity_factor, or another inference rule than 'token-choice'."
            )
        return self.capacity.factor

    def quota(self, tokens: Tensor, num_experts: int) -> Tensor:
        return self.capacity.of_groups(tokens, 1, num_experts)

    def check(self, num_experts: int) -> None:
        pass

    def __call__(self, scores: Scores, valid: Valid, training: bool) -> Picked:
        groups, members, experts = scores.shape
        most = self.capacity.of(members, 1, experts)
        rows = most if valid is None else self.capacity.of_groups(valid.sum(1), 1, experts)
        chosen = top(scores, rows, 1, _spread(valid, scores), most)
        if self.only_positive:
            chosen = chosen & (scores > 0)
        return Picked(chosen, None, groups * experts * most)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopPairs:
    """Each group takes its best (token, expert) pairs (USMoE's unified competition).

    The group's budget is `floor(budget * real tokens + 1/2)` pairs, so a fractional budget is an
    average. Bounds on the experts of one token make it SeqTopK: the minimum is taken first, the
    rest by score, which is exact (the bounds form a laminar matroid). So is a bound on the tokens
    of one expert alone: each expert's best pairs, and of those the best.

    `max_experts` and `capacity` together ask for a b-matching. The pairs are taken greedily, the
    best first, each if its token and its expert have room. Where scores are not negative they then
    add up to at least half of the most that is possible (Korte and Hausmann, *An analysis of the
    greedy heuristic for independence systems*, 1978: the bounds are two matroids). Greed is settled
    in rounds whose number depends on the scores, which `torch.compile` cannot follow.

    Where the bounds leave no room for the whole budget, fewer pairs are taken. Capacity wins over
    `min_experts`: first every token takes up to its minimum, greedily among the experts that have
    room, so a token has less only where no other expert with room was left for it; then the rest
    of the budget is given out.

    Attributes:
        budget: pairs for each real token, on average; need not be whole.
        min_experts: every token takes at least so many, as far as there is room.
        max_experts: no token takes more, None for no bound.
        capacity: rows of one expert in one group; the fair share of a factor is
            `budget * tokens / experts`. Unlimited by default.
    """

    budget: float = 2.0
    min_experts: int = 0
    max_experts: int | None = None
    capacity: Capacity = field(default_factory=Capacity)
    reach: Reach = field(default="group", init=False)
    share: Share = field(default="pairs", init=False)

    def __post_init__(self) -> None:
        check_positive("budget", self.budget, integer=False)
        check_at_least_zero("min_experts", self.min_experts, integer=True)
        if self.max_experts is not None:
            check_positive("max_experts", self.max_experts)
        if self.min_experts > self.budget:
            raise ValueError(
                f"min_experts is {self.min_experts}, more than the budget of {self.budget} experts "
                "a token; raise budget or lower min_experts."
            )
        if self.max_experts is not None and self.max_experts < self.budget:
            raise ValueError(
                f"max_experts is {self.max_experts}, less than the budget of {self.budget} experts "
                "a token; raise max_experts or lower budget."
            )

    def fan_out(self, num_experts: int) -> float:
        return float(self.budget)

    def quota(self, tokens: Tensor, num_experts: int) -> Tensor:
        pairs = torch.floor(tokens.double() * self.budget + 0.5).long()
        return torch.minimum(pairs, tokens * num_experts)

    def bounds(self, scores: Scores) -> tuple[Tensor | None, Tensor | None]:
        """Pairs that a token takes in any case, and pairs it may take; None for no such bound."""
        if not self.min_experts and self.max_experts is None:
            return None, None
        place = rank(scores)
        must = place < self.min_experts if self.min_experts else None
        return must, None if self.max_experts is None else place < self.max_experts

    def check(self, num_experts: int) -> None:
        check_positive("num_experts", num_experts)
        if self.budget > num_experts:
            raise ValueError(
                f"budget is {self.budget} experts a token, but there are only {num_experts} "
                f"experts; use a budget of at most {num_experts}."
            )

    def __call__(self, scores: Scores, valid: Valid, training: bool) -> Picked:
        groups, members, experts = scores.shape
        open_to = _spread(valid, scores)
        must, may = self.bounds(scores)
        if may is not None:
            open_to = may if open_to is None else open_to & may
        contest = scores if must is None else scores.masked_fill(must, torch.inf)
        most = self.pairs(members, experts)
        count = most if valid is None else self.quota(valid.sum(1), experts)
        open_flat = None if open_to is None else open_to.flatten(1)
        chosen = top(contest.flatten(1), count, 1, open_flat, most).reshape(scores.shape)
        if self.capacity.is_unlimited:
            return Picked(chosen, None, groups * most)
        must, may = self._within_capacity(scores, valid)
        contest = scores if must is None else scores.masked_fill(must, torch.inf)
        kept = top(contest.flatten(1), count, 1, may.flatten(1), most).reshape(scores.shape)
        room = self.capacity.of(members, self.budget, experts)
        return Picked(kept, chosen, groups * min(most, experts * room))

    def _within_capacity(self, scores: Scores, valid: Valid) -> tuple[Tensor | None, Tensor]:
        """Pairs that are taken for a minimum, and all pairs that the bounds let through."""
        groups, members, experts = scores.shape
        bounded = self.min_experts > 0 or self.max_experts is not None
        if bounded and torch.compiler.is_compiling():
            raise ValueError(
                "capacity together with min_experts or max_experts is settled in rounds, whose "
                "number depends on the scores, and cannot be compiled; leave one of the two bounds "
                "out, or do not compile the router."
            )
        most = self.capacity.of(members, self.budget, experts)
        rows = most
        if valid is not None:
            rows = self.capacity.of_groups(valid.sum(1), self.budget, experts)
        real = _spread(valid, scores)
        if not bounded:
            return None, top(scores, rows, 1, real, most)
        rest = torch.ones_like(scores, dtype=torch.bool) if real is None else real
        of_token = torch.zeros(groups, members, dtype=torch.long, device=scores.device)
        of_expert = of_token.new_zeros(groups, experts)
        of_expert += rows if isinstance(rows, int) else rows.unsqueeze(1)
        must = None
        if self.min_experts:
            must = within_both(scores, rest, of_token + self.min_experts, of_expert)
            rest, of_token = rest & ~must, of_token - must.sum(2)
            of_expert = of_expert - must.sum(1)
        if self.max_experts is None:
            may = within_columns(scores, rest, of_expert)
        else:
            may = within_both(scores, rest, of_token + self.max_experts, of_expert)
        return must, may if must is None else may | must

    def pairs(self, tokens: int, experts: int) -> int:
        """Budget of a group of so many real tokens; halves are rounded up."""
        # trunc is floor here, and the one of the two that a saved program of torch.export can hold.
        return min(math.trunc(self.budget * tokens + 0.5), tokens * experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Above:
    """Every pair whose score is larger than `threshold`; a token may take none or all experts."""

    threshold: float = 0.0
    reach: Reach = field(default="token", init=False)
    share: Share = field(default="tokens", init=False)

    def fan_out(self, num_experts: int) -> float:
        raise ValueError(
            "pairs above a threshold are as many as there are; nothing says how many experts one "
            "token has."
        )

    def quota(self, tokens: Tensor, num_experts: int) -> Tensor:
        return torch.full_like(tokens, num_experts)

    def check(self, num_experts: int) -> None:
        pass

    def __call__(self, scores: Scores, valid: Valid, training: bool) -> Picked:
        chosen = scores > self.threshold
        if valid is not None:
            chosen = chosen & valid.unsqueeze(-1)
        return Picked(chosen, None, scores.numel())


@dataclass(frozen=True, slots=True, kw_only=True)
class Balanced:
    """One expert a token, in training at most `ceil(tokens / experts)` each; else the best one.

    Source: Lewis et al., *BASE Layers*, 2021.
    """

    reach: Reach = field(default="group", init=False)
    share: Share = field(default="tokens", init=False)

    def fan_out(self, num_experts: int) -> float:
        return 1.0

    def quota(self, tokens: Tensor, num_experts: int) -> Tensor:
        return torch.ones_like(tokens)

    def check(self, num_experts: int) -> None:
        pass

    def __call__(self, scores: Scores, valid: Valid, training: bool) -> Picked:
        most = scores.shape[0] * scores.shape[1]
        if not training:
            return Picked(top(scores, 1, -1, _spread(valid, scores)), None, most)
        if torch.compiler.is_compiling():
            raise ValueError(
                "balanced assignment is solved on the host and cannot be compiled for training; "
                "compile the model in eval mode, or train it in eager mode."
            )
        return Picked(assign_balanced(scores, valid), None, most)
