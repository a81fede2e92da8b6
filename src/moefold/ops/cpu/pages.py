"""Memory of large tensors in huge pages.

Shapes: tensors of any `[shape]`.

A stack of matrices and its gradient have hundreds of megabytes, the gradient anew in every step. In
pages of 4 KiB much of a backward pass goes into page faults, and products wait for addresses. Linux
gives pages of 2 MiB to whoever asks; numpy asks for its arrays from 4 MiB on, and so do we.
(`THP_MEM_ALLOC_ENABLE=1` in the environment makes torch ask for all of its memory.)
"""

import ctypes
import mmap
from functools import cache
from typing import Any

from torch import Tensor

LARGE = 1 << 22
"""Bytes from which on huge pages are asked for."""

_PAGE = 1 << 21


def in_huge_pages(fresh: Tensor) -> Tensor:
    """Return the tensor; if it is large and on the CPU, its memory will come in huge pages.

    Args:
        fresh: one whose memory nobody wrote to yet: pages that exist stay as they are.
    """
    if type(fresh) is Tensor and fresh.device.type == "cpu" and fresh.nbytes >= LARGE:
        advise, start = _madvise(), -(-fresh.data_ptr() // _PAGE) * _PAGE
        size = (fresh.data_ptr() + fresh.nbytes - start) // _PAGE * _PAGE
        if advise is not None and size > 0:
            advise(start, size, mmap.MADV_HUGEPAGE)  # a wish: where it fails nothing is lost
    return fresh


@cache
def _madvise() -> Any:
    """The function of the C library, or None where there is none or no such advice."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
