"""Experts on the CPU, from tokens to tokens, one block of rows at a time in cache.

Shapes: see `base`. The backward pass is written by hand (see `fused_ops`), so it exists for some
activations only, and it has no second derivative.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefold.experts.backends.base import AbstractMixer, ExpertWeights
from moefold.experts.backends.fused_hidden import WRITTEN
from moefold.experts.backends.fused_ops import mix
from moefold.ops.grouped import linear_dtype
from moefold.routing import SparseRouting


@final
class FusedBackend(AbstractMixer):
    """One block of rows at a time, from its tokens to its part of their sum."""

    def reasons_against(self, rows: Tensor, weights: ExpertWeights) -> list[str]:
        """Other devices than the CPU, and activations whose derivative is not written here."""
        reasons = []
        if rows.device.type != "cpu":
            reasons.append(f"it is for the cpu, and the rows are on {rows.device.type}")
        parameters = (weights.up, weights.down, weights.up_bias, weights.down_bias)
        elsewhere = {t.device.type for t in parameters if t is not None} - {"cpu"}
        if elsewhere:
            reasons.append(f"it is for the cpu, and experts are on {', '.join(sorted(elsewhere))}")
        if weights.activation not in WRITTEN:
            reasons.append(
                f"it knows the derivative of {', '.join(WRITTEN)}, not of {weights.activation}"
            )
        return reasons

    def compute(
        self,
        rows: Float[Tensor, "rows dim"],
        rows_per_expert: Int[Tensor, " experts"],
        weights: ExpertWeights,
    ) -> Float[Tensor, "rows dim"]:
        """Apply every expert to its rows."""
        return _run(rows, None, None, rows_per_expert, weights)

    def mix(
        self, x: Float[Tensor, "tokens dim"], routing: SparseRouting, weights: ExpertWeights
    ) -> Float[Tensor, "tokens dim"]:
        """Tokens to tokens."""
        return _run(
            x, routing.token_of_row, routing.weight_of_row, routing.rows_per_expert, weights
        )


def _run(
    x: Tensor,
    token_of_row: Tensor | None,
    weight_of_row: Tensor | None,
    rows_per_expert: Tensor,
    weights: ExpertWeights,
) -> Tensor:
    parameters = (weights.up, weights.down, weights.up_bias, weights.down_bias)
    given = (x, weight_of_row, *parameters)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    assert isinstance(weights.activation, str), "reasons_against refuses functions"
    return mix(
        x,
        token_of_row,
        weight_of_row,
        rows_per_expert,
        *parameters,
        weights.gated,
        weights.activation,
        linear_dtype(x),
        keep,
    )
