"""The dtypes that layers are measured in, and layers that run under autocast.

Shapes: whatever the layer takes.
"""

from typing import Any, final

import torch
from torch import nn

AMP = "amp"

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    AMP: torch.float32,
}
"""Of weights and tokens, by what tables call it. The last, for automatic mixed precision, is how
most models are trained: float32 under autocast to bfloat16."""


def result_dtype(name: str) -> torch.dtype:
    """What a layer returns, and most of its products are made of."""
    return torch.bfloat16 if name == AMP else DTYPES[name]


def as_run(layer: nn.Module, name: str) -> nn.Module:
    """The layer, under autocast if the dtype asks for it."""
    return Autocast(layer) if name == AMP else layer


@final
class Autocast(nn.Module):
    """A layer under autocast to bfloat16."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *given: Any, **named: Any) -> Any:
        """What the layer makes of it."""
        device = next(self.layer.parameters()).device.type
        with torch.autocast(device, torch.bfloat16):
            return self.layer(*given, **named)


__all__ = ["AMP", "DTYPES", "Autocast", "as_run", "result_dtype"]
