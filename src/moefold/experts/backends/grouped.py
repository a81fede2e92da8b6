"""Grouped matrix products over rows sorted by expert, on CPU and GPU.

Shapes: `rows dim` in and out.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefold.experts.backends.base import AbstractBackend, ExpertWeights
from moefold.ops.grouped import grouped_mm


@final
class Grouped(AbstractBackend):
    """Two grouped products with the activation between them; compiles, waits for no device."""

    def reasons_against(self, rows: Tensor, weights: ExpertWeights) -> list[str]:
        """None where there is a matrix product at all."""
        if rows.device.type not in ("cpu", "cuda"):
            return [f"it is written for cpu and cuda, not for {rows.device.type}"]
        return []

    def compute(
        self,
        rows: Float[Tensor, "rows dim"],
        rows_per_expert: Int[Tensor, " experts"],
        weights: ExpertWeights,
    ) -> Float[Tensor, "rows dim"]:
        """Every row through its expert."""
        hidden = grouped_mm(rows, weights.up, rows_per_expert)
        if weights.up_bias is not None:
            hidden = hidden + _of_rows(weights.up_bias, rows_per_expert, hidden)
        out = grouped_mm(weights.activate(hidden), weights.down, rows_per_expert)
        if weights.down_bias is not None:
            out = out + _of_rows(weights.down_bias, rows_per_expert, out)
        return out


def _of_rows(bias: Tensor, rows_per_expert: Tensor, like: Tensor) -> Tensor:
    """The bias of every row's expert, zero for spare rows, `[rows, width]`."""
    padded = torch.cat([bias, bias.new_zeros(1, bias.shape[1])]).to(like.dtype)
    rows = torch.arange(like.shape[0], device=like.device)
    expert = torch.searchsorted(rows_per_expert.cumsum(0), rows, right=True)
    return padded.index_select(0, expert)
