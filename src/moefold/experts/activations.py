"""Activations by the names hosts use for them.

Shapes: elementwise, any shape.
"""

import difflib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, as in CLIP."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """The square of the positive part (So et al., *Primer*, 2021)."""
    return functional.relu(x).square()


def identity(x: Tensor) -> Tensor:
    """`x` itself."""
    return x


_tanh_gelu = partial(functional.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Activation] = {
    "gelu": functional.gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_tanh": _tanh_gelu,
    "identity": identity,
    "linear": identity,
    "quick_gelu": quick_gelu,
    "relu": functional.relu,
    "relu2": relu2,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Activation:
    """The activation of that name.

    Raises:
        ValueError: unknown name, with the nearest known one.
    """
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(name, ACTIVATIONS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown activation {name!r}.{hint} Known: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]
