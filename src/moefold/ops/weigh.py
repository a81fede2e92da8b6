"""Weights of chosen pairs, made of their scores.

Shapes: `tokens experts` pairs, with any dimensions before them.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def weigh(
    chosen: Bool[Tensor, "*tokens experts"],
    scores: Float[Tensor, "*tokens experts"],
    normalize: bool,
    scale: float,
) -> Float[Tensor, "*tokens experts"]:
    """`scale * score [/ sum of the token's chosen scores]` where chosen, zero elsewhere.

    Args:
        chosen: which pairs.
        scores: of all pairs.
        normalize: divide by the sum of the chosen scores, where that is positive.
        scale: multiplies every weight.
    """
    weights = torch.where(chosen, scores, torch.zeros_like(scores))
    if normalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, torch.ones_like(total))
    return weights * scale


def weigh_backward(
    chosen: Bool[Tensor, "*tokens experts"],
    scores: Float[Tensor, "*tokens experts"],
    of_weights: Float[Tensor, "*tokens experts"],
    normalize: bool,
    scale: float,
) -> Float[Tensor, "*tokens experts"]:
    """The gradient of the scores; can be differentiated again.

    Args:
        chosen: as in `weigh`.
        scores: likewise.
        of_weights: the gradient of what it returned.
        normalize: likewise.
        scale: likewise.
    """
    nothing = torch.zeros_like(scores)
    own = torch.where(chosen, of_weights * scale, nothing)
    if not normalize:
        return own
    kept = torch.where(chosen, scores, nothing)
    total = kept.sum(-1, keepdim=True)
    divisor = torch.where(total > 0, total, torch.ones_like(total))
    shared = torch.where(total > 0, (own * kept).sum(-1, keepdim=True) / divisor, 0.0)
    return torch.where(chosen, (own - shared) / divisor, nothing)
