"""Recipes that one kernel follows: scores, choice and weights of token choice in one step.

On the CPU the scores are torch's, so that a choice does not depend on who made it; choice and
weights are one step there.

Shapes: `groups members experts`, as in a recipe. See `moefold.ops.route` for what is computed.
"""

from typing import NamedTuple, TypeGuard

from jaxtyping import Bool, Float
from torch import Tensor

from moefold.ops import kernels
from moefold.ops.cpu import routing as compiled
from moefold.ops.route import MOST_EXPERTS, route
from moefold.routers.adapt import Adapt, BiasBalance
from moefold.routers.choice import Choice, Picked, TopExperts
from moefold.routers.score import Score, Sigmoid, Softmax, Unified
from moefold.routers.weight import Weight


class Fused(NamedTuple):
    """What a recipe makes of logits: as its three parts one after another would have."""

    scores: Float[Tensor, "groups members experts"]
    picked: Picked
    weights: Float[Tensor, "groups members experts"]


def routed(
    score: Score,
    choice: Choice,
    weight: Weight,
    adapt: Adapt | None,
    logits: Float[Tensor, "groups members experts"],
    valid: Bool[Tensor, "groups members"] | None,
    state: Float[Tensor, "*state"] | None,
) -> Fused | None:
    """Scores, choice and weights; None where no kernel does what the recipe says.

    It does what needs nothing but the token: softmax, sigmoid or the sum of both; the best
    experts, without capacity and groups of experts; weights that are scores. A bias on the scores
    may shift the choice.

    Args:
        score: of the recipe.
        choice: of the recipe.
        weight: of the recipe.
        adapt: of the recipe.
        logits: what is scored.
        valid: real tokens; all if None.
        state: of the router.
    """
    mix = coefficients(score, logits.shape[-1])
    if mix is None or not kernels.serve(logits) or logits.shape[-1] > MOST_EXPERTS:
        return None
    if not _is_plain(choice, weight) or not isinstance(adapt, BiasBalance | None):
        return None
    made = route(
        logits.flatten(0, 1),
        choice.k,
        softmax=mix[0],
        sigmoid=mix[1],
        bias=None if adapt is None else state,
        real=None if valid is None else valid.flatten(),
        normalize=weight.normalize == "chosen",
        scale=weight.scale,
    )
    scores, chosen, weights = (part.reshape(logits.shape) for part in made)
    most_rows = logits.shape[0] * logits.shape[1] * choice.k
    return Fused(scores, Picked(chosen, None, most_rows), weights)


def picked_and_weighed(
    choice: Choice,
    weight: Weight,
    contest: Float[Tensor, "groups members experts"],
    scores: Float[Tensor, "groups members experts"],
    valid: Bool[Tensor, "groups members"] | None,
) -> tuple[Picked, Float[Tensor, "groups members experts"]] | None:
    """Choice and weights; None where no compiled code does what the recipe says.

    Args:
        choice: of the recipe.
        weight: of the recipe.
        contest: what decides.
        scores: what weights are made of.
        valid: real tokens; all if None.
    """
    if not _is_plain(choice, weight) or choice.k > compiled.MOST_CHOSEN:
        return None
    if scores.shape[-1] > compiled.MOST_EXPERTS:
        return None
    marks = [] if valid is None else [valid]
    if not compiled.serves(contest, scores, marks=marks, as_operator=True):
        return None
    chosen, weights = compiled.choose(
        contest,
        scores,
        choice.k,
        real=valid,
        normalize=weight.normalize == "chosen",
        scale=weight.scale,
    )
    return Picked(chosen, None, scores.shape[0] * scores.shape[1] * choice.k), weights


def _is_plain(choice: Choice, weight: Weight) -> TypeGuard[TopExperts]:
    """Whether each token takes its best experts, and their scores are its weights."""
    return (
        isinstance(choice, TopExperts)
        and choice.capacity.is_unlimited
        and choice.top_groups == choice.expert_groups
        and weight.source == "scores"
        and weight.normalize != "all"
    )


def coefficients(score: Score, experts: int) -> tuple[float, float] | None:
    """How much of a softmax over experts and of a sigmoid a score is; None for other scores."""
    match score:
        case Softmax():
            return 1.0, 0.0
        case Sigmoid():
            return 0.0, 1.0
        case Unified(expert_score="sigmoid"):
            return 1 - score.alpha, score.alpha * 2.0 / experts
        case _:
            return None
