"""Activations and their slopes inside of kernels, computed in float32.

Shapes: numbers of any `rows columns` block; every one by itself.
"""

# ruff: noqa: N803 - constants are written large in kernels

from typing import no_type_check

import triton
from triton import language as tl

# Kernels are marked as not to be type checked: a run-time checker's wrapper is no kernel.


@triton.jit
@no_type_check
def _sigmoid(x):
    # exp of a negative number cannot overflow
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
@no_type_check
def _tanh(x):
    return 2.0 * _sigmoid(2.0 * x) - 1.0


@triton.jit
@no_type_check
def activated(x: tl.tensor, NAME: tl.constexpr) -> tl.tuple:
    """Return the activation at x, and its slope there."""
    if NAME == "silu":
        s = _sigmoid(x)
        y = x * s
        slope = s + y * (1.0 - s)
    elif NAME == "gelu":
        part = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        y = x * part
        slope = part + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        square = x * x
        t = _tanh(0.7978845608028654 * x * (1.0 + 0.044715 * square))
        part = 0.5 + 0.5 * t
        y = x * part
        inner = 0.7978845608028654 * (1.0 + 0.134145 * square)
        slope = part + 0.5 * x * (1.0 - t * t) * inner
    elif NAME == "quick_gelu":
        s = _sigmoid(1.702 * x)
        y = x * s
        slope = s + 1.702 * y * (1.0 - s)
    elif NAME == "relu":
        y = tl.where(x < 0, 0.0, x)  # so that NaN stays
        slope = tl.where(x > 0, 1.0, 0.0)
    elif NAME == "relu2":
        root = tl.where(x < 0, 0.0, x)
        y = root * root
        slope = 2.0 * root
    elif NAME == "sigmoid":
        y = _sigmoid(x)
        slope = y * (1.0 - y)
    elif NAME == "tanh":
        y = _tanh(x)
        slope = 1.0 - y * y
    else:
        tl.static_assert(NAME == "identity")
        y = x
        slope = x * 0.0 + 1.0
    return y, slope
