"""Tiny layers and peers that do what a test says."""

from typing import final

import torch
from torch import Tensor, nn

from moefold.bench.agreement import gradients_of
from moefold.bench.layers import copy_weights, ours
from moefold.bench.peers import AbstractPeer, Built, Given
from moefold.bench.settings import Settings
from moefold.bench.shapes import Shape

TOKENS = Shape(name="tokens", tokens=48, dim=16, width=24, experts=4, k=2)
EXPERTS = Shape(
    name="experts", tokens=48, dim=16, width=24, experts=4, router="expert-choice", gated=False
)
SOFT = Shape(
    name="soft",
    tokens=48,
    sequences=2,
    dim=16,
    width=24,
    experts=4,
    router="soft",
    slots=6,
    gated=False,
)
TINY = (TOKENS, EXPERTS, SOFT)
QUICK = Settings(
    rounds=2, warmup=1, gemm=16, allocator="default", empty_calls=4, decode_tokens=(1, 3)
)


@final
class Changed(nn.Module):
    """Our layer, and something done to its result."""

    def __init__(self, layer: nn.Module, change) -> None:
        super().__init__()
        self.layer = layer
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.layer(x))


@final
class Fake(AbstractPeer):
    """A peer that is our layer, changed."""

    package = "moefold"

    def __init__(self, name: str, change=lambda y: y, *, another: str = "", gradients=None) -> None:
        self.name = name
        self.change = change
        self.another = another
        self.gradients = gradients

    def reasons_against(self, shape: Shape, dtype: torch.dtype, device: str) -> list[str]:
        return []

    def build(self, given: Given) -> Built:
        layer = ours(given.shape, "reference").to(given.dtype)
        copy_weights(given.master, layer)
        found = self.gradients or gradients_of
        return Built(
            layer=Changed(layer, self.change),
            gradients=lambda: found(layer),
            another=self.another,
        )


@final
class Backwards(torch.autograd.Function):
    """The identity, with a gradient that is twice too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return 2 * grads[0]
