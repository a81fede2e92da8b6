"""The definition of experts: a loop, one expert at a time, differentiated by autograd.

Shapes: see `base`. Any dtype, any device, any activation; slow where there are many experts.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from moefold.experts import activations
from moefold.experts.backends.base import AbstractBackend, ExpertWeights


@final
class ReferenceBackend(AbstractBackend):
    """A loop over experts."""

    def reasons_against(self, rows: Tensor, weights: ExpertWeights) -> list[str]:
        """Anything but a compiled graph."""
        if torch.compiler.is_compiling():
            return ["it reads rows_per_expert on the host, which not every torch can compile"]
        return []

    def compute(
        self,
        rows: Float[Tensor, "rows dim"],
        rows_per_expert: Int[Tensor, " experts"],
        weights: ExpertWeights,
    ) -> Float[Tensor, "rows dim"]:
        """Apply every expert to its rows."""
        counts = rows_per_expert.tolist()
        activate = activations.get(weights.activation)
        # unbind and split are differentiated into one tensor each; indexing in the loop would make
        # a gradient of full size per expert.
        total = rows[: sum(counts)].split(counts)
        experts = len(counts)
        up_biases = [None] * experts if weights.up_bias is None else weights.up_bias.unbind(0)
        down_biases = [None] * experts if weights.down_bias is None else weights.down_bias.unbind(0)
        each = zip(
            total, weights.up.unbind(0), up_biases, weights.down.unbind(0), down_biases, strict=True
        )
        out = []
        for x, up, up_bias, down, down_bias in each:
            hidden = functional.linear(x, up, up_bias)
            if weights.gated:
                gate, value = hidden.chunk(2, dim=-1)
                hidden = activate(gate) * value
            else:
                hidden = activate(hidden)
            out.append(functional.linear(hidden, down, down_bias))
        spare = out[0].new_zeros(rows.shape[0] - sum(counts), weights.down.shape[1])
        return torch.cat([*out, spare])
