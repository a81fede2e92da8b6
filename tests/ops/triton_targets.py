"""Compile kernels for a GPU that is not there, with what they are launched with.

The interpreter accepts programs that the compiler refuses (types that differ between the branches
of an `if`, more memory than a processor has), so what it has tested is compiled as well. Triton
brings all that is needed; only the launch is left out. Run in a process of its own, where kernels
are not defined for the interpreter.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moefold.ops import kernels

NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages")

# Memory of a multiprocessor that one program may have, in bytes: from NVIDIA's CUDA programming
# guide, table of technical specifications by compute capability.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}


def source_of(kernel: Any, given: dict[str, Any]) -> ASTSource:
    """What Triton would compile for a launch with these arguments."""
    signature, constants, facts = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (whole and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = NAMES[value.dtype]
        elif whole:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
        else:
            signature[parameter.name] = "fp32"
        if isinstance(value, Tensor) or (whole and value % 16 == 0):
            facts[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=facts)


def compile_launches(capability: int, call: Callable[[], object]) -> dict[str, int]:
    """Compile every kernel that `call` launches; how often each was, for what it was launched with.

    Raises:
        ValueError: a kernel wants more memory than a program may have.
    """
    compiled: dict[str, int] = {}

    def launch(kernel: Any, *args: Any, grid: object, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        source = source_of(kernel, dict(zip(kernel.arg_names, args, strict=False)) | named)
        target = GPUTarget("cuda", capability, 32)
        shared = triton.compile(source, target=target, options=options).metadata.shared
        if shared > SHARED[capability]:
            raise ValueError(
                f"{kernel.__name__} wants {shared} bytes of shared memory; there are "
                f"{SHARED[capability]} at capability {capability}."
            )
        compiled[kernel.__name__] = compiled.get(kernel.__name__, 0) + 1

    kernels.everywhere = True
    before = JITFunction.run
    JITFunction.run = launch  # pyright: ignore[reportAttributeAccessIssue]
    try:
        call()
    finally:
        JITFunction.run = before
        kernels.everywhere = False
    return compiled
