"""The sparse router: three choices, and the logits they start from.

    x --logits--> [experts] --score--> what competes --choice--> pairs --weight--> a sparse routing

Shapes: `batch tokens dim` in; inside, `groups members experts`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moefold.ops.precise import in_full_precision
from moefold.routers.adapt import Adapt, RunningThreshold
from moefold.routers.base import (
    AbstractRouter,
    Reach,
    check_at_least_zero,
    check_positive,
    float32_or_better,
)
from moefold.routers.choice import Choice, TopExperts
from moefold.routers.compete import Competition
from moefold.routers.fused import picked_and_weighed, routed
from moefold.routers.inference import (
    Known,
    MembershipHead,
    Past,
    Predictor,
    Prefix,
    Rule,
    Threshold,
)
from moefold.routers.score import Score, Softmax
from moefold.routers.weight import Weight
from moefold.routing import Group, Grouping, Routing, SparseRouting

_FURTHER: tuple[Reach, ...] = ("token", "past", "group", "batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosine:
    """Logits as cosines in a narrow space, divided by a learnt temperature (XMoE).

    Source: Chi et al., *On the Representation Collapse of Sparse Mixture of Experts*, 2022,
    section 3.2. Both the token and the expert are normalised, as in the paper; the released code of
    torchscale leaves the token as it is.
    """

    width: int = 16
    temperature: float = 0.3

    def __post_init__(self) -> None:
        check_positive("width", self.width)
        check_positive("temperature", self.temperature, integer=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A sparse router as data: score x choice x weight, and what surrounds them.

    Attributes:
        score: what competes.
        choice: who picks whom.
        weight: how much of an expert's result comes back.
        cosine: cosine logits instead of linear ones.
        adapt: what is learnt without gradient.
        noise_std: in training, noise of standard deviation `noise_std / experts` on the logits
            (Riquelme et al., 2021).
        jitter: in training, the router's input is multiplied by a uniform number from
            `[1 - jitter, 1 + jitter]` (Fedus et al., *Switch Transformers*, 2022).
        group: which tokens compete.
        losses: auxiliary losses that belong to the recipe, name to coefficient.
        inference: how tokens are routed outside of training, None for the same way.
        competition: in some passes of training the experts' results choose, see `compete`.
    """

    score: Score = field(default_factory=Softmax)
    choice: Choice = field(default_factory=TopExperts)
    weight: Weight = field(default_factory=Weight)
    cosine: Cosine | None = None
    adapt: Adapt | None = None
    noise_std: float = 0.0
    jitter: float = 0.0
    group: Group = "sequence"
    losses: Mapping[str, float] = field(default_factory=dict)
    inference: Rule | None = None
    competition: Competition | None = None

    def __post_init__(self) -> None:
        check_at_least_zero("noise_std", self.noise_std)
        check_at_least_zero("jitter", self.jitter)
        if self.jitter >= 1:
            raise ValueError(f"jitter is {self.jitter!r}; it must be smaller than 1.")
        if self.inference is None:
            return
        self.inference.check(self.choice)
        if self.adapt is not None or self.reach == "token":
            raise ValueError(
                "inference is a rule for routers that look at a group in training; this one looks "
                "at one token already. Leave inference out."
            )

    @property
    def reach(self) -> Reach:
        """How far the recipe looks in training: as far as its score or its choice does."""
        return _FURTHER[max(map(_FURTHER.index, (self.score.reach, self.choice.reach)))]


class AbstractRecipeRouter(AbstractRouter):
    """Follows a recipe, wherever the logits come from.

    Attributes:
        recipe: the recipe.
        state: what `recipe.adapt` or `recipe.inference` learns without gradient, or None.
        alone: the score that looks at one token, for the inference rule.
        predictor: says which pairs a group would choose, where the inference rule asks for it.
        experts_compete: where the recipe has a competition, whether experts compete in passes of
            training; None to draw it in each pass.
    """

    def __init__(
        self, dim: int, num_experts: int, recipe: Recipe, *, hidden_dim: int | None = None
    ) -> None:
        rule = recipe.inference
        super().__init__(
            dim,
            num_experts,
            reach=recipe.reach,
            group=recipe.group,
            losses={
                **recipe.losses,
                **({"membership": 1.0} if isinstance(rule, Predictor) else {}),
            },
            reach_at_inference=None if rule is None else rule.reach,
        )
        recipe.choice.check(num_experts)
        self.recipe = recipe
        self.alone = recipe.score.alone()  # made here: torch.compile cannot check its settings
        self.experts_compete: bool | None = None
        self.remembers = isinstance(rule, Prefix)
        self.state: Tensor | None
        self.register_buffer("state", _initial(recipe, num_experts))
        self.predictor: MembershipHead | None = None
        if isinstance(rule, Predictor):
            self.predictor = MembershipHead(hidden_dim or dim, num_experts)

    @property
    def is_taught(self) -> bool:
        """Whether its predictor, if it has one, was trained."""
        return self.predictor is None or bool(self.predictor.is_trained)

    @torch.no_grad()
    def update(self, routings: Sequence[Routing], *, at_once: bool = False) -> None:
        """Adapt the state to the routings of one optimiser step; see `routers.adapt`.

        Args:
            routings: of the step.
            at_once: for a threshold that is learnt as a running average: forget the one before.
        """
        sparse = [routing for routing in routings if isinstance(routing, SparseRouting)]
        if self.state is None or not sparse:
            return
        adapt, rule = self.recipe.adapt, self.recipe.inference
        if isinstance(rule, Threshold | Predictor):
            now = rule.step(sparse, self.recipe)
            if now is not None:
                self.state.lerp_(now.to(self.state), 1.0 if at_once else 1.0 - rule.momentum)
        elif adapt is not None:
            if at_once and isinstance(adapt, RunningThreshold):
                adapt = replace(adapt, momentum=0.0)
            self.state.copy_(adapt.update(self.state, sparse))

    def _apply(self, fn, recurse=True):
        # A bias that moves by 0.001 a step stands still in bfloat16: the state stays float32.
        before = self.state
        super()._apply(fn, recurse)
        if before is not None and self.state is not None:
            kept = self.state if before.is_meta or self.state.is_meta else before
            dtype = torch.promote_types(self.state.dtype, torch.float32)
            self.state = kept.to(device=self.state.device, dtype=dtype)
        return self


def _initial(recipe: Recipe, num_experts: int) -> Tensor | None:
    state = None
    if recipe.inference is not None:
        state = recipe.inference.initial(recipe.choice, num_experts)
    elif recipe.adapt is not None:
        state = recipe.adapt.initial(num_experts)
    return None if state is None else state.float()


def pairs_of(
    router: AbstractRecipeRouter,
    logits: Float[Tensor, "batch tokens experts"],
    mask: Bool[Tensor, "batch tokens"] | None,
    x: Float[Tensor, "batch tokens dim"] | None = None,
    past: Past | None = None,
) -> dict[str, Any]:
    """What a recipe makes of logits: every pair, chosen or not, before there is a list of rows.

    Args:
        router: has the recipe, groups the tokens, and names the layer in errors.
        logits: in float32 or better.
        mask: True for real tokens.
        x: the tokens, for a router with a predictor.
        past: earlier tokens, for a router that looks at them.
    """
    with in_full_precision(logits.device):
        router.check_finite(logits, mask)
        if router.recipe.inference is None or router.training or router.competes:
            pairs, contest = _by_group(router, logits, mask, x), router.recipe.competition
            if contest is not None and router.training and contest.is_on(router.experts_compete):
                return contest.opened(pairs)
            return pairs
        return _by_rule(router, router.recipe.inference, logits, mask, x, past)


def _by_group(
    router: AbstractRecipeRouter, logits: Tensor, mask: Tensor | None, x: Tensor | None
) -> dict[str, Any]:
    recipe, adapt, state = router.recipe, router.recipe.adapt, router.state
    grouping, valid = router.as_groups(logits, mask)
    noise_std = recipe.noise_std / router.num_experts if router.training else 0.0
    noisy = logits + torch.randn_like(logits) * noise_std if noise_std else logits

    clean, scored = grouping.split(logits), grouping.split(noisy)
    fused = routed(recipe.score, recipe.choice, recipe.weight, adapt, scored, valid, state)
    if fused is not None:
        scores, (chosen, wanted, most_rows), weights = fused
    else:
        scores = recipe.score(scored, valid)
        contest = scores.detach()
        if adapt is not None and state is not None:
            contest = adapt.shift(contest, state)
        made = picked_and_weighed(recipe.choice, recipe.weight, contest, scores, valid)
        if made is None:
            picked = recipe.choice(contest, valid, router.training)
            made = picked, recipe.weight(scores, scored, clean, picked.chosen)
        (chosen, wanted, most_rows), weights = made
    return {
        "chosen": grouping.merge(chosen),
        "weights": grouping.merge(weights),
        "most_rows": most_rows,
        "grouping": grouping,
        "mask": mask,
        "logits": logits,
        "noisy_logits": noisy if noise_std else None,
        "noise_std": noise_std,
        "scores": grouping.merge(scores),
        "wanted": None if wanted is None else grouping.merge(wanted),
        "l1_strength": None if adapt is None or state is None else adapt.l1_strength(state),
        "predicted": None
        if router.predictor is None
        else _predicted(router.predictor, x, router.alone(logits, mask), mask),
    }


def _by_rule(
    router: AbstractRecipeRouter,
    rule: Rule,
    logits: Tensor,
    mask: Tensor | None,
    x: Tensor | None,
    past: Past | None,
) -> dict[str, Any]:
    recipe = router.recipe
    scores = router.alone(logits, mask)
    predicted = None
    if router.predictor is not None:
        router.check_trained(router.predictor.is_trained)
        predicted = _predicted(router.predictor, x, scores, mask)
    known = Known(
        scores=scores.detach(),
        mask=mask,
        choice=recipe.choice,
        state=router.state,
        predicted=predicted,
        past=past,
    )
    chosen = rule(known)
    return {
        "chosen": chosen,
        "weights": recipe.weight(scores, logits, logits, chosen),
        "most_rows": logits.numel(),
        "grouping": Grouping("sequence", *logits.shape[:2]),
        "mask": mask,
        "logits": logits,
        "scores": scores,
        "predicted": predicted,
    }


def _predicted(
    head: MembershipHead, x: Tensor | None, scores: Tensor, mask: Tensor | None
) -> Float[Tensor, "batch tokens experts"]:
    assert x is not None, "whoever calls a router with a predictor gives it the tokens"
    if mask is not None:
        x = x.masked_fill(~mask.unsqueeze(-1), 0.0)  # padding may hold NaN
    return float32_or_better(head(x, scores))


@final
class SparseRouter(AbstractRecipeRouter):
    """Routes by a recipe, on logits of its own.

    Attributes:
        weight: `[experts, dim]`, or `[experts, width]` for cosine logits; no bias.
    """

    def __init__(self, dim: int, num_experts: int, recipe: Recipe) -> None:
        super().__init__(dim, num_experts, recipe)
        cosine = recipe.cosine
        self.weight = nn.Parameter(
            torch.empty(num_experts, dim if cosine is None else cosine.width)
        )
        if cosine is not None:
            self.projection = nn.Parameter(torch.empty(cosine.width, dim))
            self.temperature = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LeCun normal, as V-MoE; orthogonal of gain 0.32 for the experts of cosine logits.

        The state starts again as well.
        """
        if self.recipe.cosine is None:
            nn.init.normal_(self.weight, std=self.dim**-0.5)
        else:
            nn.init.orthogonal_(self.weight, gain=0.32)
            nn.init.normal_(self.projection, std=self.dim**-0.5)
            nn.init.constant_(self.temperature, self.recipe.cosine.temperature)
        first = _initial(self.recipe, self.num_experts)
        if first is not None and self.state is not None:
            self.state.copy_(first)
        if self.predictor is not None:
            self.predictor.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        ids: Int[Tensor, "batch tokens"] | None = None,
        past: Past | None = None,
    ) -> Routing:
        """Route the tokens; see `AbstractRouter.forward`."""
        return SparseRouting.from_choice(**self.pairs(x, mask, past))

    def pairs(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        past: Past | None = None,
    ) -> dict[str, Any]:
        """Every pair, chosen or not, before there is a list: what `from_choice` makes a routing of.

        For graphs in which a number of rows cannot depend on the data.
        """
        self.check(x, mask)
        with in_full_precision(x.device):
            logits = self._logits(x, mask)
        return pairs_of(self, logits, mask, x, past)

    def _logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = float32_or_better(x)
        if mask is not None:
            # Padding may hold NaN, and zero times NaN would reach the router's gradient.
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        if self.recipe.jitter and self.training:
            x = x * torch.empty_like(x).uniform_(1 - self.recipe.jitter, 1 + self.recipe.jitter)
        weight = self.weight.to(x.dtype)
        if self.recipe.cosine is None:
            return nn.functional.linear(x, weight)
        narrow = nn.functional.linear(x, self.projection.to(x.dtype))
        cosine = nn.functional.normalize(narrow, dim=-1, eps=1e-6) @ (
            nn.functional.normalize(weight, dim=-1, eps=1e-6).t()
        )
        return cosine / self.temperature.to(x.dtype).clamp_min(0.01)


@final
class LogitRouter(AbstractRecipeRouter):
    """Routes by a recipe on logits that somebody else computed; its only weights are a predictor's.

    Args:
        num_experts: number of experts.
        recipe: the recipe.
        hidden_dim: width of the tokens, for a predictor.
    """

    def __init__(self, num_experts: int, recipe: Recipe, hidden_dim: int | None = None) -> None:
        super().__init__(num_experts, num_experts, recipe, hidden_dim=hidden_dim)

    def forward(
        self,
        x: Float[Tensor, "batch tokens experts"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        ids: Int[Tensor, "batch tokens"] | None = None,
        past: Past | None = None,
        hidden: Float[Tensor, "batch tokens dim"] | None = None,
    ) -> Routing:
        """Route the tokens whose logits are `x`; see `AbstractRouter.forward`.

        Args:
            x: the logits.
            mask: True for real tokens.
            ids: not used.
            past: earlier tokens, for a router that looks at them.
            hidden: the tokens, for a router with a predictor.
        """
        self.check(x, mask)
        return SparseRouting.from_choice(**pairs_of(self, float32_or_better(x), mask, hidden, past))
