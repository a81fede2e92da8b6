"""transformers' mixture block, with each of its expert functions.

Shapes: `batch tokens dim` in and out.
"""

import importlib.util
from typing import final

import torch
from torch import Tensor

from moefold.bench.layers import ours, weights_of
from moefold.bench.peers.base import AbstractPeer, Built, Given, only
from moefold.bench.room import available_bytes
from moefold.bench.shapes import Shape
from moefold.experts.backends.from_transformers import TransformersBackend


@final
class TransformersBlock(AbstractPeer):
    """OLMoE's block: gated experts, top-k, renormalised; the experts by one of its functions."""

    package = "transformers"

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self.name = f"transformers {implementation}"

    def reasons_against(self, shape: Shape, dtype: torch.dtype, device: str) -> list[str]:
        """Other routers, plain experts, and what its function says against the shape."""
        if importlib.util.find_spec("transformers") is None:
            return ["transformers is not installed"]
        if other := only(("token-choice",), shape, "tokens choose in its blocks"):
            return other
        if not shape.gated:
            return ["the experts of its block are gated; this shape's are plain"]
        reasons = []
        if self.implementation != "eager":
            rows = torch.empty(0, shape.dim, dtype=dtype, device=device, requires_grad=True)
            with torch.device("meta"):
                weights = ours(shape, "reference").to(dtype).experts.weights
            reasons = TransformersBackend(self.implementation).reasons_against(rows, weights)
        if self.implementation == "batched_mm" and not reasons:
            # A copy of an expert for each row, and its gradient.
            number = 2 * shape.rows * 3 * shape.dim * shape.width * dtype.itemsize
            if number > (have := available_bytes(device)):
                reasons.append(
                    f"it copies an expert's weights for each row: {number / 1e9:.0f} GB with "
                    f"their gradients, and {have / 1e9:.0f} GB are available"
                )
        return reasons

    def build(self, given: Given) -> Built:
        """Make the block."""
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

        shape = given.shape
        config = OlmoeConfig(
            hidden_size=shape.dim,
            intermediate_size=shape.width,
            num_experts=shape.experts,
            num_experts_per_tok=shape.k,
            norm_topk_prob=True,
        )
        config._experts_implementation = self.implementation
        block = OlmoeSparseMoeBlock(config).to(given.device, given.dtype)
        wanted = weights_of(given.master)
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                parameter.copy_(wanted[_ours(name)])

        def gradients() -> dict[str, Tensor]:
            return {_ours(n): p.grad for n, p in block.named_parameters() if p.grad is not None}

        return Built(layer=block, gradients=gradients)


def _ours(name: str) -> str:
    return name.replace("gate.", "router.")


__all__ = ["TransformersBlock"]
