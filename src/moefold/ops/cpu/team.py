"""Work in several threads at once: those that torch divides its operations among, if possible.

These wait busily for some milliseconds after every operation, and take the cores from any other
threads for so long. OpenMP's own entrance for a parallel region, `GOMP_parallel`, which compilers
call (GNU libgomp manual, "Implementing PARALLEL construct"), lends them to whoever asks: they are
there at once, and torch's operations within the region do not divide themselves again.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from threading import Barrier
from typing import Any

import torch

_pools: dict[int, ThreadPoolExecutor] = {}
_forked: list[bool] = []


def _forget_threads() -> None:
    """Threads do not survive a fork, and OpenMP would wait for its own for ever."""
    _pools.clear()
    _forked.append(True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def all_threads(parts: int) -> int:
    """How many threads to call for some work in parts: all of torch's, or the calling one.

    All, even if some find nothing to do: OpenMP would end those that it does not need, and start
    them again for the next operation.
    """
    return max(parts, torch.get_num_threads()) if parts > 1 else 1


def run_together(work: Callable[[], None], threads: int) -> None:
    """Call a function once in each of several threads, and wait for all of them.

    Args:
        work: the function. What it raises is raised here, once all have returned; of several
            failures the first.
        threads: how many at most. OpenMP may give fewer, down to the calling one: whatever is to
            be done has to be shared out among those that come.
    """
    failures: list[BaseException] = []

    def body(_: Any) -> None:
        try:
            work()
        except BaseException as failure:  # it could not pass through OpenMP
            failures.append(failure)

    run_compiled_together(_Body(body), None, threads)
    if failures:
        raise failures[0]


def run_compiled_together(function: Any, given: Any, threads: int) -> None:
    """Call a compiled function, `void function(void *given)`, as `run_together` does."""
    parallel = None if _forked else _parallel()
    if threads == 1:
        function(given)
    elif parallel is not None:
        # As it is: ctypes.cast would make a cycle, and what a function of Python refers to, such as
        # gradients, would live until the next collection.
        parallel(function, given, threads, 0)
    else:
        _run_in_pool(function, given, threads)


def _run_in_pool(function: Any, given: Any, threads: int) -> None:
    futures = []
    try:
        pool = _pool(threads)
        futures += [pool.submit(function, given) for _ in range(threads)]
    except RuntimeError:  # the interpreter is about to end and starts no threads
        function(given)
    try:
        wait(futures)
    finally:
        wait(futures)  # whoever interrupts it: nobody lets go of what they still write to


@cache
def _parallel() -> Any:
    """OpenMP's entrance as torch finds it, or None where there is no such thing."""
    folder = Path(torch.__file__).parent / "lib"
    # What was loaded for everybody comes first, as for torch; then what torch itself depends on.
    for name in (None, *(str(path) for path in sorted(folder.glob("libtorch_cpu.*")))):
        try:
            found = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError, TypeError):
            continue
        found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        found.restype = None
        return found
    return None


def _pool(threads: int) -> ThreadPoolExecutor:
    """As many threads of our own, in each of which torch computes alone; made once."""
    if threads not in _pools:
        pool = ThreadPoolExecutor(threads, "moefold-experts", initializer=_compute_alone)
        before, all_here = torch.get_num_threads(), Barrier(threads + 1)
        for _ in range(threads):
            pool.submit(all_here.wait)
        all_here.wait()
        torch.set_num_threads(before)  # what threads that are started later begin with
        _pools[threads] = pool
    return _pools[threads]


def _compute_alone() -> None:
    torch.get_num_threads()  # a thread that has not asked yet forgets what it is told
    torch.set_num_threads(1)
