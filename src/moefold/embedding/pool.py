"""From the tokens of a text to one vector, whatever the padding, and the kinds of vectors.

Shapes: `batch tokens dim` in, `batch dim` out; `mask` is True for real tokens, at least one in each
row, all next to each other.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from moefold.embedding.config import Kind, Pooling

EPS = 1e-8
"""Added to deviations, as published."""


def pooled(
    values: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"], pooling: Pooling
) -> Float[Tensor, "batch dim"]:
    """One vector for each row of tokens; padding is not read, whatever stands there."""
    place = mask.cumsum(1)  # 1, 2, 3, ... along the real tokens
    if pooling == "last":
        last = place.argmax(1)  # the first place at which the count is complete
        return values[torch.arange(len(values), device=values.device), last]
    weight = (place if pooling == "weighted-mean" else torch.ones_like(place)) * mask
    share = weight.to(values.dtype) / weight.sum(1, keepdim=True)
    return torch.einsum("bt,btd->bd", share, values.masked_fill(~mask.unsqueeze(2), 0.0))


def standardized(
    features: Float[Tensor, "batch dim"],
    mean: Float[Tensor, " dim"] | None = None,
    std: Float[Tensor, " dim"] | None = None,
) -> Float[Tensor, "batch dim"]:
    """Every feature with mean 0 and deviation 1, by the given ones or by those of this batch.

    As published: `(x - mean) / (std + 1e-8)`, and 0 where that is no number, which in a batch of
    one text is everywhere.
    """
    if mean is None or std is None:
        if len(features) == 1:
            return torch.zeros_like(features)
        mean, std = features.mean(0), features.std(0)
    made = (features - mean) / (std + EPS)
    return torch.where(made.isnan(), 0.0, made)


def joined(
    hidden: Float[Tensor, "batch hidden"] | None,
    routing: Float[Tensor, "batch routing"] | None,
    kind: Kind,
    similarity_weight: float,
) -> Float[Tensor, "batch dim"]:
    """The vector of a kind from its parts.

    For "sum" it is [unit h ; sqrt(a) unit r], so that the dot product of two such vectors is
    cos(h, h') + a cos(r, r'), the similarity that MoEE publishes. All have length sqrt(1 + a):
    their cosine is that similarity too, but for a factor.
    """
    parts = [part for part in (hidden, routing) if part is not None]
    assert len(parts) == (1 if kind in ("hidden", "routing") else 2)
    if kind == "sum":
        scales = (1.0, similarity_weight**0.5)
        parts = [scale * normalize(p, dim=1) for scale, p in zip(scales, parts, strict=True)]
    return torch.cat(parts, dim=1)
