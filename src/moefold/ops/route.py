"""The router of token choice in one step: scores, the best experts of each token, their weights.

Shapes: `tokens experts` logits; each token takes `k` experts.

    score   = softmax * softmax over experts + sigmoid * sigmoid of each logit
    chosen  = the k largest of score + bias, the lowest index first among equals
    weight  = scale * score [ / sum of the chosen scores ] where chosen, zero elsewhere

With coefficients 1 and 0 this is token choice by a softmax, with 0 and 1 by a sigmoid, with
`1 - alpha` and `2 * alpha / experts` the unified score (see `moefold.routers.score`).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moefold.ops import kernels
from moefold.ops.select import top
from moefold.ops.weigh import weigh

MOST_EXPERTS = 4096
"""As many as one program of the kernel holds; with more, the slow twin is used."""


class Routed(NamedTuple):
    """What becomes of the logits; which pairs are chosen has no gradient."""

    scores: Float[Tensor, "tokens experts"]
    chosen: Bool[Tensor, "tokens experts"]
    weights: Float[Tensor, "tokens experts"]


def route(
    logits: Float[Tensor, "tokens experts"],
    k: int,
    *,
    softmax: float = 1.0,
    sigmoid: float = 0.0,
    bias: Float[Tensor, " experts"] | None = None,
    real: Bool[Tensor, " tokens"] | None = None,
    normalize: bool = False,
    scale: float = 1.0,
) -> Routed:
    """Score, choose and weigh.

    The kernel and the slow twin round scores differently in the last bit, so that experts whose
    scores are that close may change places; each chooses exactly by the scores it returns.

    Args:
        logits: without NaN.
        k: experts of a token.
        softmax: coefficient of the softmax over experts.
        sigmoid: coefficient of the sigmoid of each logit.
        bias: added to the scores for the choice only.
        real: tokens that choose; all if None.
        normalize: divide by the sum of the chosen scores, where that is positive.
        scale: multiplies every weight.
    """
    if not kernels.serve(logits) or logits.shape[1] > MOST_EXPERTS:
        return route_reference(
            logits,
            k,
            softmax=softmax,
            sigmoid=sigmoid,
            bias=bias,
            real=real,
            normalize=normalize,
            scale=scale,
        )
    from moefold.ops.triton.select import route as kernel

    bias = None if bias is None else bias.detach().float().contiguous()
    real = None if real is None else real.contiguous()
    numbers = float(softmax), float(sigmoid), normalize, float(scale)
    return Routed(*kernel(logits.contiguous(), bias, real, k, *numbers))


def route_reference(
    logits: Float[Tensor, "tokens experts"],
    k: int,
    *,
    softmax: float = 1.0,
    sigmoid: float = 0.0,
    bias: Float[Tensor, " experts"] | None = None,
    real: Bool[Tensor, " tokens"] | None = None,
    normalize: bool = False,
    scale: float = 1.0,
) -> Routed:
    """What `route` computes, one tensor after another."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = softmax * logits.softmax(-1) + sigmoid * logits.sigmoid()
    contest = scores.detach() if bias is None else scores.detach() + bias.detach()
    chosen = top(contest, k, 1, None if real is None else real.unsqueeze(1).expand_as(contest))
    return Routed(scores, chosen, weigh(chosen, scores, normalize, scale))
