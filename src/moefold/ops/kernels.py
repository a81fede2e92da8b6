"""When a kernel of `moefold.ops.triton` stands in for its slow twin.

Shapes: tensors of any `shape`; only device and dtype are looked at.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

on_cuda = os.environ.get("MOEFOLD_TRITON") == "1"
"""Kernels on CUDA, for whoever asks by the environment variable.

They agree with their slow twins in Triton's interpreter and compile for real devices, which shows
neither a race nor a block that is too slow; until they were run on one, nobody gets them unasked.
"""

everywhere = False
"""Kernels on CUDA and on the CPU, there in Triton's interpreter; a test sets it."""

_INSTALLED = find_spec("triton") is not None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serve(tensor: Tensor) -> bool:
    """Whether kernels work on this tensor: on a GPU if asked for, in float32 or less.

    Not in a program that is exported, which must run where moefold is not installed.
    """
    return (
        _INSTALLED
        and tensor.dtype in _DTYPES
        and (everywhere or (on_cuda and tensor.device.type == "cuda"))
        and tensor.device.type in ("cpu", "cuda")
        and not torch.compiler.is_exporting()
    )
