"""Triton kernels on a machine without a GPU: its interpreter runs them with NumPy.

Import this before anything of `moefold.ops.triton`. Triton decides how to run a kernel when the
kernel is defined, so the variable has to be set before.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.utils.deterministic

from moefold.ops import kernels

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if interpreted else "cuda"


def rounding(dtype: torch.dtype) -> float:
    """What storing a number in this dtype changes at most, as a part of it.

    Half a unit in the last place; a whole one for bfloat16 in the interpreter, which cuts digits
    off where a GPU rounds to the nearest.
    """
    cut = interpreted and dtype == torch.bfloat16
    return torch.finfo(dtype).eps * (1.0 if cut else 0.5)


@contextmanager
def kernels_everywhere() -> Iterator[None]:
    """Kernels instead of their slow twins, on the CPU too."""
    before, kernels.everywhere = kernels.everywhere, True
    try:
        yield
    finally:
        kernels.everywhere = before


@contextmanager
def unwritten_memory_is_poison() -> Iterator[None]:
    """NaN, or the largest integer, in memory that nobody wrote, also inside of operators.

    Together with it, operators that are not deterministic raise.
    """
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
