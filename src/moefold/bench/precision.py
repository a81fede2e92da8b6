"""The dtypes that layers are measured in, one of them by autocast.

Shapes: whatever a layer takes.
"""

from contextlib import AbstractContextManager, nullcontext
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
    """What our layers return and gradients of results are drawn in."""
    return torch.bfloat16 if name == AMP else DTYPES[name]


def running(name: str, device: str) -> AbstractContextManager[object]:
    """Where a layer runs in this dtype, and is asked whether it can."""
    if name != AMP:
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def as_run(layer: nn.Module, name: str, device: str) -> nn.Module:
    """The layer, under autocast if the dtype asks for it."""
    return Autocast(layer, device) if name == AMP else layer


@final
class Autocast(nn.Module):
    """A layer under autocast to bfloat16."""

    def __init__(self, layer: nn.Module, device: str) -> None:
        super().__init__()
        self.layer = layer
        self.device = device

    def forward(self, *given: Any, **named: Any) -> Any:
        """What the layer makes of it."""
        with running(AMP, self.device):
            return self.layer(*given, **named)


__all__ = ["AMP", "DTYPES", "Autocast", "as_run", "result_dtype", "running"]
