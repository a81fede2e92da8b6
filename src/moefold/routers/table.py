"""Named routers: each is a line of score x choice x weight.

Every function here takes `dim` and `num_experts` and the settings of its router, all with defaults,
and returns the module. The settings are spelt alike everywhere.
"""

import difflib
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, Literal

from moefold.routers.adapt import AdaptiveL1, BiasBalance, RunningThreshold
from moefold.routers.base import check_k, check_one_of
from moefold.routers.capacity import Capacity, Convention
from moefold.routers.choice import Above, Balanced, TopExperts, TopPairs, TopTokens
from moefold.routers.compete import Competition
from moefold.routers.inference import GROUP, rule_named
from moefold.routers.score import (
    Identity,
    Relu,
    Sigmoid,
    Sinkhorn,
    Softmax,
    SparseTransport,
    Unified,
)
from moefold.routers.sparse import Cosine, Recipe, SparseRouter
from moefold.routers.weight import SOURCES, Weight
from moefold.routing import Group

BALANCE = {"balance": 0.01}  # Switch Transformers' factor, also flaxformer's default


def _normalize(renormalize: object) -> Literal["no", "chosen"]:
    check_one_of("renormalize", renormalize, (False, True))
    return "chosen" if renormalize else "no"


def token_choice(
    dim: int,
    num_experts: int,
    *,
    k: int = 2,
    renormalize: bool = False,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    convention: Convention = "moefold",
    priority: Literal["order", "gate"] = "order",
    noise_std: float = 0.0,
    jitter: float = 0.0,
    group: Group = "sequence",
) -> SparseRouter:
    """Softmax over experts; each token takes its top k (Shazeer 2017, V-MoE 2021)."""
    room = Capacity(rows=capacity, factor=capacity_factor, convention=convention)
    return SparseRouter(
        dim,
        num_experts,
        Recipe(
            choice=TopExperts(k=k, capacity=room, priority=priority),
            weight=Weight(normalize=_normalize(renormalize)),
            noise_std=noise_std,
            jitter=jitter,
            group=group,
            losses=BALANCE,
        ),
    )


def switch(
    dim: int,
    num_experts: int,
    *,
    capacity_factor: float = 1.25,
    jitter: float = 0.01,
    group: Group = "sequence",
) -> SparseRouter:
    """Token choice of one expert with capacity and jitter (Switch Transformers 2022)."""
    return token_choice(
        dim, num_experts, k=1, capacity_factor=capacity_factor, jitter=jitter, group=group
    )


def mixtral(dim: int, num_experts: int, *, k: int = 2, jitter: float = 0.0) -> SparseRouter:
    """Dropless token choice whose weights are renormalised over the k experts (Mixtral 2024)."""
    return token_choice(dim, num_experts, k=k, renormalize=True, jitter=jitter)


def compete(
    dim: int, num_experts: int, *, k: int = 2, renormalize: bool = True, rate: float = 0.07
) -> SparseRouter:
    """Token choice that learns from passes in which the experts' results choose (CompeteSMoE v2).

    In a share `rate` of the training passes every expert computes every token and the largest
    results win; the `competition` loss teaches the gate to foresee who does. All other passes, and
    all outside of training, are `token-choice`'s.
    """
    check_k(k, num_experts)
    # The released code's 0.01, for a mean that it takes over k^2 instead of k (k - 1) pairs.
    diversity = {"competing-diversity": 0.01 * (k - 1) / k} if k > 1 else {}
    return SparseRouter(
        dim,
        num_experts,
        Recipe(
            choice=TopExperts(k=k),
            weight=Weight(normalize=_normalize(renormalize)),
            losses={**BALANCE, "competition": 0.01, **diversity},
            competition=Competition(k=k, rate=rate),
        ),
    )


def sinkhorn_token_choice(
    dim: int,
    num_experts: int,
    *,
    k: int = 2,
    renormalize: bool = False,
    iterations: int = 20,
    epsilon: float = 1.0,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    convention: Convention = "moefold",
    priority: Literal["order", "gate"] = "order",
    noise_std: float = 0.0,
    group: Group = "sequence",
    inference: str = GROUP,
) -> SparseRouter:
    """Entropic transport plan; each token takes the top k of its row, weighed by a softmax.

    The plan is made of the noisy logits and the weights of the clean ones, as in the released code.
    """
    room = Capacity(rows=capacity, factor=capacity_factor, convention=convention)
    return SparseRouter(
        dim,
        num_experts,
        Recipe(
            score=Sinkhorn(iterations=iterations, epsilon=epsilon),
            choice=TopExperts(k=k, capacity=room, priority=priority),
            weight=Weight(source="clean-softmax", normalize=_normalize(renormalize)),
            noise_std=noise_std,
            group=group,
            inference=rule_named(inference),
        ),
    )


def expert_choice(
    dim: int,
    num_experts: int,
    *,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    convention: Convention = "moefold",
    renormalize: bool = False,
    noise_std: float = 0.0,
    group: Group = "sequence",
    inference: str = GROUP,
) -> SparseRouter:
    """Softmax over experts; each expert takes its best tokens (Zhou et al. 2022)."""
    return SparseRouter(
        dim,
        num_experts,
        Recipe(
            choice=TopTokens(capacity=_expert_room(capacity, capacity_factor, convention)),
            weight=Weight(normalize=_normalize(renormalize)),
            noise_std=noise_std,
            group=group,
            inference=rule_named(inference),
        ),
    )


def sinkhorn_expert_choice(
    dim: int,
    num_experts: int,
    *,
    iterations: int = 20,
    epsilon: float = 1.0,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    convention: Convention = "moefold",
    renormalize: bool = False,
    noise_std: float = 0.0,
    group: Group = "sequence",
    inference: str = GROUP,
) -> SparseRouter:
    """Entropic transport plan; each expert takes the best tokens of its column."""
    return SparseRouter(
        dim,
        num_experts,
        Recipe(
            score=Sinkhorn(iterations=iterations, epsilon=epsilon),
            choice=TopTokens(capacity=_expert_room(capacity, capacity_factor, convention)),
            weight=Weight(source="softmax", normalize=_normalize(renormalize)),
            noise_std=noise_std,
            group=group,
            inference=rule_named(inference),
        ),
    )


def sparse_transport_expert_choice(
    dim: int,
    num_experts: int,
    *,
    iterations: int = 20,
    learning_rate: float = 1e-2,
    gamma: float = 1.0,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    convention: Convention = "moefold",
    renormalize: bool = False,
    group: Group = "sequence",
    inference: str = GROUP,
) -> SparseRouter:
    """k-sparse transport plan; each expert takes the non-zeros of its column (softmax weights)."""
    room = _expert_room(capacity, capacity_factor, convention)
    return SparseRouter(
        dim,
        num_experts,
        Recipe(
            score=SparseTransport(
                capacity=room, iterations=iterations, learning_rate=learning_rate, gamma=gamma
            ),
            choice=TopTokens(capacity=room, only_positive=True),
            weight=Weight(source="softmax", normalize=_normalize(renormalize)),
            group=group,
            inference=rule_named(inference),
        ),
    )


def unified(
    dim: int,
    num_experts: int,
    *,
    budget: float = 2.0,
    alpha: float = 0.5,
    expert_score: Literal["sigmoid", "token-softmax"] = "sigmoid",
    combine: Literal["unified", "softmax", "renormalized", "row-normalized"] = "unified",
    min_experts: int = 0,
    max_experts: int | None = None,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    convention: Convention = "moefold",
    group: Group = "sequence",
    inference: str = GROUP,
) -> SparseRouter:
    """USMoE: the best pairs of the whole token x expert matrix, under one budget."""
    check_one_of("combine", combine, tuple(_COMBINE))
    room = Capacity(rows=capacity, factor=capacity_factor, convention=convention)
    return SparseRouter(
        dim,
        num_experts,
        Recipe(
            score=Unified(alpha=alpha, expert_score=expert_score),
            choice=TopPairs(
                budget=budget, min_experts=min_experts, max_experts=max_experts, capacity=room
            ),
            weight=_COMBINE[combine],
            group=group,
            inference=rule_named(inference),
        ),
    )


_COMBINE = {
    "unified": Weight(),
    "softmax": Weight(source="softmax"),
    "renormalized": Weight(normalize="chosen"),
    "row-normalized": Weight(normalize="all"),
}


def seq_topk(
    dim: int,
    num_experts: int,
    *,
    k: int = 2,
    renormalize: bool = False,
    inference: str = GROUP,
) -> SparseRouter:
    """SeqTopK 2025: unified competition of softmax scores, 1 to k + 2 experts for each token."""
    check_k(k, num_experts)
    return unified(
        dim,
        num_experts,
        budget=float(k),
        alpha=0.0,
        combine="renormalized" if _normalize(renormalize) == "chosen" else "unified",
        min_experts=1,
        max_experts=min(k + 2, num_experts),
        inference=inference,
    )


def expert_race(dim: int, num_experts: int, *, k: int = 2, inference: str = GROUP) -> SparseRouter:
    """Expert Race 2025: unified competition of softmax scores over the whole batch."""
    check_k(k, num_experts)
    return SparseRouter(
        dim,
        num_experts,
        Recipe(
            choice=TopPairs(budget=float(k)),
            group="batch",
            losses={"similarity": 1e-5},
            inference=rule_named(inference),
        ),
    )


def bias_balanced(
    dim: int,
    num_experts: int,
    *,
    k: int = 2,
    expert_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    renormalize: bool = True,
    rate: float = 1e-3,
    rule: Literal["sign", "error"] = "sign",
) -> SparseRouter:
    """Sigmoid scores, balanced by a bias that only chooses (AuxFree 2024, DeepSeek-V3)."""
    return SparseRouter(
        dim,
        num_experts,
        Recipe(
            score=Sigmoid(),
            choice=TopExperts(k=k, expert_groups=expert_groups, top_groups=top_groups),
            weight=Weight(normalize=_normalize(renormalize), scale=scale),
            adapt=BiasBalance(rate=rate, rule=rule),
            losses={"sequence-balance": 1e-4},
        ),
    )


def cosine(
    dim: int,
    num_experts: int,
    *,
    k: int = 2,
    width: int = 16,
    temperature: float = 0.3,
    renormalize: bool = False,
) -> SparseRouter:
    """Cosine scores in a narrow space with a learnt temperature (XMoE 2022)."""
    return SparseRouter(
        dim,
        num_experts,
        Recipe(
            choice=TopExperts(k=k),
            weight=Weight(normalize=_normalize(renormalize)),
            cosine=Cosine(width=width, temperature=temperature),
            losses=BALANCE,
        ),
    )


def relu(
    dim: int, num_experts: int, *, k: int = 2, start: float = 1e-8, factor: float = 1.2
) -> SparseRouter:
    """Every expert with a positive logit, kept sparse by an adaptive L1 penalty (ReMoE 2024)."""
    check_k(k, num_experts)
    return SparseRouter(
        dim,
        num_experts,
        Recipe(
            score=Relu(),
            choice=Above(),
            adapt=AdaptiveL1(k=k, start=start, factor=factor),
            losses={"l1": 1.0},
        ),
    )


def threshold(
    dim: int,
    num_experts: int,
    *,
    budget: float = 2.0,
    alpha: float = 0.5,
    momentum: float = 0.99,
    renormalize: bool = False,
) -> SparseRouter:
    """Every pair whose unified score is above a running threshold; causal."""
    TopPairs(budget=budget).check(num_experts)
    return SparseRouter(
        dim,
        num_experts,
        Recipe(
            score=Unified(alpha=alpha),
            choice=Above(),
            weight=Weight(normalize=_normalize(renormalize)),
            adapt=RunningThreshold(budget=budget, momentum=momentum),
        ),
    )


def base(dim: int, num_experts: int, *, group: Group = "sequence") -> SparseRouter:
    """Balanced assignment in training, the best expert otherwise; sigmoid weights (BASE 2021)."""
    if find_spec("scipy") is None:
        raise ValueError("router 'base' solves its assignment with SciPy: pip install scipy")
    return SparseRouter(
        dim,
        num_experts,
        Recipe(score=Identity(), choice=Balanced(), weight=Weight(source="sigmoid"), group=group),
    )


_COMMON = (
    *("score", "choice", "weight", "normalize", "capacity", "capacity_factor", "group"),
    "inference",
)
_SCORES: dict[str, type] = {
    "softmax": Softmax,
    "sigmoid": Sigmoid,
    "relu": Relu,
    "identity": Identity,
    "unified": Unified,
    "sinkhorn": Sinkhorn,
    "sparse-transport": SparseTransport,
}
_CHOICES: dict[str, type] = {
    "top-experts": TopExperts,
    "top-tokens": TopTokens,
    "top-pairs": TopPairs,
    "above": Above,
    "balanced": Balanced,
}


def custom(
    dim: int,
    num_experts: int,
    *,
    score: str = "softmax",
    choice: str = "top-experts",
    weight: str = "scores",
    normalize: Literal["no", "chosen", "all"] = "no",
    capacity: int | None = None,
    capacity_factor: float | None = None,
    convention: Convention = "moefold",
    noise_std: float = 0.0,
    jitter: float = 0.0,
    group: Group = "sequence",
    inference: str = GROUP,
    **settings: Any,
) -> SparseRouter:
    """Any score x choice x weight; other settings go to the score or choice that knows them."""
    check_one_of("score", score, tuple(_SCORES))
    check_one_of("choice", choice, tuple(_CHOICES))
    check_one_of("weight", weight, SOURCES)
    if (capacity, capacity_factor, convention) != (None, None, "moefold"):
        settings["capacity"] = Capacity(
            rows=capacity, factor=capacity_factor, convention=convention
        )
    parts, known = [], set()
    for part in (_SCORES[score], _CHOICES[choice]):
        takes = {field.name for field in fields(part) if field.init}
        known |= takes
        parts.append(part(**{name: settings[name] for name in settings if name in takes}))
    strangers = sorted(set(settings) - known)
    if strangers:
        near = difflib.get_close_matches(strangers[0], [*known, *_COMMON], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"custom router: {score} x {choice} knows no setting "
            f"{', '.join(map(repr, strangers))}; "
            f"it knows {', '.join(sorted(known))}.{hint}"
        )
    return SparseRouter(
        dim,
        num_experts,
        Recipe(
            score=parts[0],
            choice=parts[1],
            weight=Weight(source=weight, normalize=normalize),  # pyright: ignore[reportArgumentType]
            noise_std=noise_std,
            jitter=jitter,
            group=group,
            inference=rule_named(inference),
        ),
    )


def _expert_room(rows: int | None, factor: float | None, convention: Convention) -> Capacity:
    """Capacity where experts choose: a factor of 2 unless something else is said."""
    if rows is None and factor is None:
        factor = 2.0
    return Capacity(rows=rows, factor=factor, convention=convention)
