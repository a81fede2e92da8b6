"""Inference rules: how a router that competes within a group chooses while tokens come one by one.

In training, pairs compete in the group. At inference a pair is judged by what is known when its
token comes, so that no later token and no other sequence changes a choice, and a cache of earlier
tokens gives the same choice as a full pass:

    token-choice   the token's best experts, as many as a token has on average
    threshold      pairs whose score is above a level that earlier batches have taught
    prefix         pairs that the group would choose if the text ended with the token
    predictor      pairs that a small head, trained beside the router, expects to be chosen

Scores that look at the group (transport plans, a softmax over tokens) have a stand-in that looks at
the token alone, see `Score.alone`.

Shapes: `batch tokens experts`; a level is a scalar where all pairs compete for one budget, and
` experts` where every expert has a share of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moefold.ops.prefix import chosen_so_far
from moefold.ops.select import top
from moefold.routers.base import Reach, check_one_of
from moefold.routers.choice import Choice, TopPairs
from moefold.routing import Grouping, SparseRouting

Scores = Float[Tensor, "batch tokens experts"]
Mask = Bool[Tensor, "batch tokens"] | None


@runtime_checkable
class Past(Protocol):
    """What earlier tokens of the same sequences have left, for a router that looks at them."""

    def scores(self) -> Float[Tensor, "batch earlier experts"] | None:
        """What competed for each earlier token, -inf for padding; None if there is none."""
        ...

    def add(self, scores: Scores) -> None:
        """Append those of the tokens that have come now."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Known:
    """What a rule is told.

    Attributes:
        scores: what competes, each token's by itself; no gradient.
        mask: True for real tokens.
        choice: the choice the group makes in training.
        state: what the rule has learnt, None if it learns nothing.
        predicted: log-odds of being chosen, where there is a head that says so.
        past: earlier tokens, None if there are none.
    """

    scores: Scores
    mask: Mask
    choice: Choice
    state: Tensor | None
    predicted: Scores | None
    past: Past | None


@runtime_checkable
class Rule(Protocol):
    """Chooses without looking at later tokens."""

    @property
    def reach(self) -> Reach: ...

    def check(self, choice: Choice) -> None:
        """Refuse a choice that the rule cannot stand for."""
        ...

    def initial(self, choice: Choice, num_experts: int) -> Tensor | None:
        """State before any update, None for a rule without one."""
        ...

    def __call__(self, known: Known) -> Bool[Tensor, "batch tokens experts"]: ...


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """Each token takes its best experts: the average of the group's choice, rounded."""

    reach: Reach = field(default="token", init=False)

    def check(self, choice: Choice) -> None:
        choice.fan_out(1)

    def initial(self, choice: Choice, num_experts: int) -> Tensor | None:
        return None

    def __call__(self, known: Known) -> Tensor:
        experts = known.scores.shape[-1]
        k = min(max(int(known.choice.fan_out(experts) + 0.5), 1), experts)
        return top(known.scores, k, -1, _spread(known.mask, known.scores))


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """Each pair whose score is above a level: `level <- m * level + (1 - m) * level of a step`.

    The level of a step lies between the last score that the group's choice would take and the
    first that it would not, were there nothing but scores to choose by: one level where all pairs
    compete, and one for each expert where an expert's share is its own.

    Source: the inference rule of Yuan et al., *Expert Race*, 2025 (one level), and of Expert
    Threshold routing, 2026 (one for each expert).
    """

    momentum: float = 0.99
    reach: Reach = field(default="token", init=False)

    def check(self, choice: Choice) -> None:
        pass

    def initial(self, choice: Choice, num_experts: int) -> Tensor | None:
        # The score of an undecided router, under a softmax and under the unified score alike.
        level = torch.tensor(1.0 / num_experts)
        return level if choice.share == "pairs" else level.expand(num_experts).clone()

    def __call__(self, known: Known) -> Tensor:
        return _above(known.scores, known)

    def step(self, routings: Sequence[SparseRouting], recipe: Any) -> Tensor | None:
        """The level of a step that made these routings, whichever rule made them."""
        made = [_own_choice(recipe, routing) for routing in routings]
        return _level([(scores, scores, chosen) for scores, chosen in made], recipe.choice)


@dataclass(frozen=True, slots=True)
class Prefix:
    """Each token takes what the group's choice would give it if the text ended with it.

    A running quantile over the past: exact, without parameters, and never revised. In a text whose
    scores come in no particular order a token has as many experts as in training, on average.
    """

    reach: Reach = field(default="past", init=False)

    def check(self, choice: Choice) -> None:
        if isinstance(choice, TopPairs) and not choice.capacity.is_unlimited:
            raise ValueError(
                "inference is 'prefix', and capacity bounds the tokens of an expert: which earlier "
                "pairs are still within it changes with every token. Leave capacity out, or use "
                "inference='threshold'."
            )

    def initial(self, choice: Choice, num_experts: int) -> Tensor | None:
        return None

    def __call__(self, known: Known) -> Tensor:
        choice, contest, mask = known.choice, known.scores, known.mask
        if choice.share == "tokens":  # who chooses looks at one token: nothing to remember
            return TokenChoice()(known)
        if isinstance(choice, TopPairs):
            must, may = choice.bounds(contest)
            contest = contest if may is None else contest.masked_fill(~may, -torch.inf)
            contest = contest if must is None else contest.masked_fill(must, torch.inf)
        here = torch.ones_like(contest[..., 0], dtype=torch.bool) if mask is None else mask
        contest = contest.masked_fill(~here.unsqueeze(-1), -torch.inf)
        past = None if known.past is None else known.past.scores()
        seen = here.cumsum(1)
        if past is not None:
            seen = seen + (past > -torch.inf).any(-1).sum(1, keepdim=True)
        quota = choice.quota(seen, contest.shape[-1])
        if choice.share == "pairs":
            chosen = chosen_so_far(contest, quota, past)
        else:
            chosen = _for_each_expert(contest, quota, past)
        if known.past is not None:
            known.past.add(contest)
        return chosen & here.unsqueeze(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """Each pair that a small head expects to be chosen.

    The head sees the token as the router does, without passing a gradient back, and learns by the
    loss `membership` beside the model's own; see `MembershipHead`. As published, a pair is chosen
    if its odds are above one to one; here above a level that follows the choices of training as a
    threshold does, for a head that is often unsure would spend less than the budget.

    Source: Raposo et al., *Mixture-of-Depths*, 2024, section 3.5, the second of its two ways.
    """

    momentum: float = 0.99
    reach: Reach = field(default="token", init=False)

    def check(self, choice: Choice) -> None:
        pass

    def initial(self, choice: Choice, num_experts: int) -> Tensor | None:
        return torch.zeros(() if choice.share == "pairs" else num_experts)

    def __call__(self, known: Known) -> Tensor:
        assert known.predicted is not None, "a router with this rule has a head"
        return _above(known.predicted, known)

    def step(self, routings: Sequence[SparseRouting], recipe: Any) -> Tensor | None:
        """The level of a step in which the group chose."""
        made = []
        for routing in routings:
            assert routing.predicted is not None
            assert routing.logits is not None
            real, mask = _real_of(routing), routing.mask
            scores = recipe.score.alone()(routing.logits.detach(), mask)
            made.append((routing.predicted.detach()[real], scores[real], routing.chosen[real]))
        return _level(made, recipe.choice)


@final
class MembershipHead(nn.Module):
    """Log-odds that the group would choose a pair, from the token and its scores.

    A hidden layer on the token, scaled to unit mean square, and on its scores in logarithms. The
    last layer starts at zero, which is how an untrained head is known.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim + num_experts, max(num_experts, dim // 4))
        self.out = nn.Linear(self.hidden.out_features, num_experts)
        self.slope = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """An untrained head."""
        self.hidden.reset_parameters()
        for last in (self.out.weight, self.out.bias, self.slope):
            nn.init.zeros_(last)

    @property
    def is_trained(self) -> Bool[Tensor, ""]:
        """Whether anything was learnt."""
        return self.out.weight.any()

    def forward(self, x: Float[Tensor, "batch tokens dim"], scores: Scores) -> Scores:
        """Log-odds of every pair; no gradient goes to the token or its scores."""
        kind = self.hidden.weight.dtype
        x, scores = x.detach().to(kind), scores.detach().to(kind)
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        height = (scores.clamp_min(1e-12) * scores.shape[-1]).log()
        deep = self.out(nn.functional.silu(self.hidden(torch.cat([x, height], -1))))
        return deep + self.slope * height


GROUP = "group"
"""The setting of a router without a rule: the group chooses at inference as in training."""

RULES: dict[str, type] = {
    "token-choice": TokenChoice,
    "threshold": Threshold,
    "prefix": Prefix,
    "predictor": Predictor,
}
"""Inference rules by name."""


def rule_named(name: str) -> Rule | None:
    """An inference rule, None for the group's own choice.

    Raises:
        ValueError: there is no such rule.
    """
    check_one_of("inference", name, (GROUP, *RULES))
    return None if name == GROUP else RULES[name]()


def _spread(mask: Mask, scores: Tensor) -> Tensor | None:
    return None if mask is None else mask.unsqueeze(-1).expand_as(scores)


def _for_each_expert(contest: Tensor, quota: Tensor, past: Tensor | None) -> Tensor:
    """A running quantile for each expert: pairs of one expert compete with each other only."""
    batch, tokens, experts = contest.shape

    def columns(scores: Tensor) -> Tensor:
        return scores.transpose(1, 2).flatten(0, 1).unsqueeze(2)

    counts = quota.repeat_interleave(experts, 0)
    chosen = chosen_so_far(columns(contest), counts, None if past is None else columns(past))
    return chosen.reshape(batch, experts, tokens).transpose(1, 2)


def _above(values: Tensor, known: Known) -> Tensor:
    """Pairs above the level that was learnt, within the bounds of the choice."""
    assert known.state is not None
    chosen = values > known.state.to(values.dtype)
    if isinstance(known.choice, TopPairs):
        must, may = known.choice.bounds(known.scores)
        chosen = chosen if may is None else chosen & may
        chosen = chosen if must is None else chosen | must
    return chosen if known.mask is None else chosen & known.mask.unsqueeze(-1)


@torch.no_grad()
def _own_choice(recipe: Any, routing: SparseRouting) -> tuple[Tensor, Tensor]:
    """Scores of the real tokens, each by itself, and what the group would choose of them."""
    if routing.logits is None:
        raise ValueError("this routing carries no logits; a threshold is learnt from them.")
    logits, mask = routing.logits.detach(), routing.mask
    grouping = Grouping(recipe.group, *logits.shape[:2])
    split = grouping.split(logits)
    valid = None if mask is None else grouping.split(mask)
    chosen = grouping.merge(recipe.choice(recipe.score(split, valid), valid, False).chosen)
    real = _real_of(routing)
    return recipe.score.alone()(logits, mask)[real], chosen[real]


def _real_of(routing: SparseRouting) -> Bool[Tensor, "batch tokens"]:
    if routing.mask is not None:
        return routing.mask
    shape = routing.grouping.batch, routing.grouping.tokens
    return torch.ones(shape, dtype=torch.bool, device=routing.token_of_row.device)


def _level(made: Sequence[tuple[Tensor, Tensor, Tensor]], choice: Choice) -> Tensor | None:
    """Where to cut so that as many pairs are above as were chosen; None without a token.

    Args:
        made: values to cut, scores, and what was chosen; each `[real tokens, experts]`.
        choice: says what shares there are, and which pairs are within its bounds in any case.
    """
    values, scores, chosen = (torch.cat(parts) for parts in zip(*made, strict=True))
    if choice.share == "pairs":
        must = may = None
        if isinstance(choice, TopPairs):
            must, may = choice.bounds(scores.unsqueeze(0))
        free = torch.ones_like(chosen) if may is None else may.squeeze(0)
        free = free if must is None else free & ~must.squeeze(0)
        values, chosen = values[free].unsqueeze(1), chosen[free].unsqueeze(1)
    if values.shape[0] == 0:
        return None
    ordered = values.sort(0, descending=True).values
    count, last = chosen.sum(0, keepdim=True), values.shape[0] - 1
    edges = [ordered.gather(0, at.clamp(0, last)) for at in (count - 1, count)]
    level = ((edges[0] + edges[1]) / 2).squeeze(0)
    return level.squeeze(0) if choice.share == "pairs" else level
