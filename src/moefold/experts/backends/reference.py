"""The definition: a loop over experts, in plain autograd, for any dtype and device.

Shapes: `rows dim` in and out.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from moefold.experts.backends.base import AbstractBackend, ExpertWeights


@final
class Reference(AbstractBackend):
    """One expert after the other; every other backend is compared with this one."""

    def reasons_against(self, rows: Tensor, weights: ExpertWeights) -> list[str]:
        """It reads the number of rows on the host, which a compiled graph cannot."""
        if torch.compiler.is_compiling():
            return ["it reads rows_per_expert on the host, which torch.compile cannot trace"]
        return []

    def compute(
        self,
        rows: Float[Tensor, "rows dim"],
        rows_per_expert: Int[Tensor, " experts"],
        weights: ExpertWeights,
    ) -> Float[Tensor, "rows dim"]:
        """Every row through its expert; spare rows come back as zero."""
        counts = rows_per_expert.tolist()
        *of_expert, spare = rows.split([*counts, rows.shape[0] - sum(counts)])
        out = []
        for expert, x in enumerate(of_expert):
            up_bias = None if weights.up_bias is None else weights.up_bias[expert]
            down_bias = None if weights.down_bias is None else weights.down_bias[expert]
            hidden = functional.linear(x, weights.up[expert], up_bias)
            out.append(functional.linear(weights.activate(hidden), weights.down[expert], down_bias))
        return torch.cat([*out, torch.zeros_like(spare, dtype=out[0].dtype)])
