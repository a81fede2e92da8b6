"""Recipes that one kernel follows: scores, choice and weights of token choice in one step.

Shapes: `groups members experts`, as in a recipe. See `moefold.ops.route` for what is computed.
"""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from moefold.ops import kernels
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
    if not isinstance(choice, TopExperts) or not choice.capacity.is_unlimited:
        return None
    if choice.top_groups != choice.expert_groups or not isinstance(adapt, BiasBalance | None):
        return None
    if weight.source != "scores" or weight.normalize == "all":
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
