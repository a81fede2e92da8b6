"""Weights: how much of an expert's result comes back. The third of the three choices.

Shapes: everything is `[groups, members, experts]`. The router learns through its weights only:
which pairs are chosen has no gradient.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moefold.routers.base import check_one_of, check_positive

Source = Literal["scores", "softmax", "clean-softmax", "sigmoid", "clean-sigmoid", "one"]
SOURCES = ("scores", "softmax", "clean-softmax", "sigmoid", "clean-sigmoid", "one")
NORMALIZE = ("no", "chosen", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """Combine weight of every pair.

    Attributes:
        source: `scores` (what competed), `softmax` or `sigmoid` of the logits that were scored,
            `clean-softmax` or `clean-sigmoid` of the logits before noise, or `one`.
        normalize: divide by the sum over the `chosen` experts of the token, by the sum over `all`
            experts, or not. A token without an expert keeps zero weights.
        scale: multiplies every weight.
    """

    source: Source = "scores"
    normalize: Literal["no", "chosen", "all"] = "no"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_one_of("source", self.source, SOURCES)
        check_one_of("normalize", self.normalize, NORMALIZE)
        check_positive("scale", self.scale, integer=False)

    def __call__(
        self,
        scores: Float[Tensor, "groups members experts"],
        logits: Float[Tensor, "groups members experts"],
        clean: Float[Tensor, "groups members experts"],
        chosen: Bool[Tensor, "groups members experts"],
    ) -> Float[Tensor, "groups members experts"]:
        match self.source:
            case "scores":
                weights = scores
            case "softmax":
                weights = logits.softmax(-1)
            case "clean-softmax":
                weights = clean.softmax(-1)
            case "sigmoid":
                weights = logits.sigmoid()
            case "clean-sigmoid":
                weights = clean.sigmoid()
            case "one":
                weights = torch.ones_like(logits)
        if self.normalize != "no" and weights.numel():
            counted = torch.where(chosen, weights, 0.0) if self.normalize == "chosen" else weights
            total = counted.sum(-1, keepdim=True)
            weights = weights / torch.where(total > 0, total, 1.0)
        return weights if self.scale == 1.0 else weights * self.scale
