"""Activations by name: what an expert applies between its two products.

Shapes: `x [*any]`; every activation works on each number by itself. Names are those of
transformers' `ACT2FN`, so that a host's configuration can be read as it is.
"""

import difflib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = str | Callable[[Tensor], Tensor]


def relu2(x: Tensor) -> Tensor:
    """`relu(x)^2` (So et al., Primer, arXiv:2109.08668)."""
    return functional.relu(x).square()


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, the approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel, arXiv:1606.08415, section 2)."""
    return functional.gelu(x, approximate="tanh")


def identity(x: Tensor) -> Tensor:
    """`x`; with a gate, a bilinear expert."""
    return x


_BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": gelu_tanh,
    "identity": identity,
    "leaky_relu": functional.leaky_relu,
    "mish": functional.mish,
    "quick_gelu": quick_gelu,
    "relu": functional.relu,
    "relu2": relu2,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
_ALIASES = {
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "linear": "identity",
    "swish": "silu",
}


def names() -> tuple[str, ...]:
    """Return every name, without its aliases."""
    return tuple(_BY_NAME)


def canonical(activation: Activation) -> Activation:
    """Return the one name of a named activation; a function stays itself.

    Raises:
        ValueError: if no activation has this name (with the nearest one, and all of them).
    """
    if not isinstance(activation, str):
        return activation
    name = _ALIASES.get(activation, activation)
    if name not in _BY_NAME:
        near = difflib.get_close_matches(activation, [*_BY_NAME, *_ALIASES], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown activation {activation!r}; {hint}Known: {', '.join(_BY_NAME)} "
            f"(also {', '.join(_ALIASES)}), or pass a function of a tensor"
        )
    return name


def get(activation: Activation) -> Callable[[Tensor], Tensor]:
    """Return the function of this name or alias; a function is returned as it is.

    Raises:
        ValueError: as `canonical`.
    """
    found = canonical(activation)
    return _BY_NAME[found] if isinstance(found, str) else found


def recognise(function: object) -> str | None:
    """Return the name of the activation that has the values of this function, or None.

    Activations that differ by less than 1e-7 count as one: `gelu_fast` of transformers spells
    sqrt(2 / pi) with ten digits. One with parameters is none of ours, whatever they are now.
    """
    if not callable(function):
        return None
    if isinstance(function, nn.Module) and next(function.parameters(), None) is not None:
        return None
    with torch.no_grad():
        # The bends are near zero; where relu6 and its kin end, further out.
        near = torch.linspace(-6.0, 6.0, 241, dtype=torch.float64, device="cpu")
        grid = torch.cat([near, near * 5, near * 200])
        try:
            values = function(grid.clone())  # it may work in place
        except (RuntimeError, TypeError, ValueError):
            return None
        if not isinstance(values, Tensor) or values.shape != grid.shape:
            return None
        for name, known in _BY_NAME.items():
            if torch.allclose(known(grid), values.double(), rtol=1e-12, atol=1e-7):
                return name
    return None
