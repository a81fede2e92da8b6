"""How much memory a pass takes, and an allocator that does not spoil the clock.

On a GPU torch counts the bytes itself. On the CPU we let torch's profiler report every allocation
and release of a tensor's memory, in order, and follow the sum: the most that is alive at once,
counted from the start of the pass, to the byte and whatever the allocator keeps. It does not see
what a library takes for itself inside a product, which holds for the dense MLP as well.
"""

import ctypes
import os
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most bytes alive at once while something runs, beyond those alive before.

    What it returns counts as alive to the end. It must give back nothing that was there before: the
    profiler does not know how large that is.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it announces itself on standard error
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        held = run()
    del held
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    alive = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, alive)
    return peak


def parameter_bytes(layer: nn.Module) -> int:
    """Of all parameters; their gradients take as much again."""
    return sum(p.numel() * p.element_size() for p in layer.parameters())


def keep_freed_memory() -> None:
    """Let glibc serve every size from its heap, and never shrink it.

    By default it maps every block above 32 MiB anew, and gives much of the rest back when it is
    freed, or not, depending on what another variant left behind; touching 40 MB again page by page
    then costs 20 ms.

    Raises:
        ValueError: this is another allocator.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError) as error:
        raise ValueError(_other_allocator()) from error
    if not (mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1)):
        raise ValueError(_other_allocator())


def _other_allocator() -> str:
    return (
        "the allocator of this system is not glibc's and cannot be told to keep memory; "
        "use --allocator default"
    )


__all__ = ["keep_freed_memory", "parameter_bytes", "peak_bytes"]
