"""Experts by two grouped products over all rows.

Shapes: see `base`. Runs on the CPU and on CUDA, eager or compiled, in every floating dtype, and
without waiting for the device where torch's grouped kernel takes the tensors (see `ops.grouped`).
"""

from typing import final

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from moefold.experts import activations
from moefold.experts.backends.base import AbstractBackend, ExpertWeights
from moefold.ops.grouped import grouped_mm


@final
class GroupedBackend(AbstractBackend):
    """Two grouped products."""

    def reasons_against(self, rows: Tensor, weights: ExpertWeights) -> list[str]:
        """Nothing on the CPU and on CUDA."""
        if rows.device.type not in ("cpu", "cuda", "meta"):
            return [f"it was never run on {rows.device.type}, only on cpu and cuda"]
        return []

    def compute(
        self,
        rows: Float[Tensor, "rows dim"],
        rows_per_expert: Int[Tensor, " experts"],
        weights: ExpertWeights,
    ) -> Float[Tensor, "rows dim"]:
        """Apply every expert to its rows."""
        activate = activations.get(weights.activation)
        hidden = _linear(rows, weights.up, weights.up_bias, rows_per_expert)
        if weights.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = activate(gate) * value
        else:
            hidden = activate(hidden)
        return _linear(hidden, weights.down, weights.down_bias, rows_per_expert)


def _linear(rows: Tensor, matrices: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    product = grouped_mm(rows, matrices, counts)
    if bias is None:
        return product
    # The bias of every row, as a product of depth 8 (16 bytes of bfloat16, what the CUDA kernel
    # needs) in which only the first column is not zero. Exact; its gradient is a sum that a matrix
    # product accumulates in float32, which scattering bfloat16 would not; spare rows get zero.
    first = functional.pad(rows.new_ones(rows.shape[0], 1), (0, 7))
    return product + grouped_mm(first, functional.pad(bias.unsqueeze(2), (0, 7)), counts)
