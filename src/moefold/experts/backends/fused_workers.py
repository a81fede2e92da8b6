"""Threads that each compute blocks of their own: the fused backend on several cores.

Products of a few hundred rows are too small to be divided: of two cores that share each of them, a
part of one is lost in waiting. So each core gets experts of its own, whole blocks, and a sum of its
own to add them to. Which ones is decided by sizes alone, so that a result does not depend on who
came first.

The threads compute without autograd, autocast and modes, as whatever runs inside of an operator.

Shapes: stacks of matrices are `experts out in`.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

MOST_WORKERS = 8
"""With more threads than this, each product is divided among them after all: every worker has a sum
of all tokens of its own, and there may be no more experts than workers."""

WORTH_IT = 1 << 32
"""Multiplications from which on threads are used. Those that torch divides an operation among go on
waiting busily for some milliseconds after it, and take cores from ours for so long."""

Share = TypeVar("Share")

_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork


def workers_for(rows: int, *stacks: Tensor) -> int:
    """How many threads are to compute so many rows; 1 for the calling one alone.

    Args:
        rows: of all experts.
        *stacks: the matrices that each row is multiplied by, by expert.
    """
    threads = torch.get_num_threads()
    products = rows * sum(stack.shape[1] * stack.shape[2] for stack in stacks)
    return threads if 1 < threads <= MOST_WORKERS and products >= WORTH_IT else 1


def share_out(sizes: Sequence[int], workers: int) -> list[list[int]]:
    """Which things each worker gets: the largest first, to the one that has least so far.

    Args:
        sizes: of the things.
        workers: how many there are.

    Returns:
        Indices by worker, ascending; none for a worker for whom nothing is left.
    """
    shares: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += sizes[i]
    return [sorted(share) for share in shares]


def run_on(shares: Sequence[Share], work: Callable[[Share], None]) -> None:
    """Do the work for every share, each in a thread of its own; a single one in this thread."""
    if len(shares) == 1:
        work(shares[0])
        return
    inference = torch.is_inference_mode_enabled()

    def alone(share: Share) -> None:
        with torch.inference_mode() if inference else torch.no_grad():
            work(share)

    pool = _pool(len(shares))
    futures = [pool.submit(alone, share) for share in shares]
    wait(futures)  # all of them, before anybody lets go of what they write to
    for future in futures:
        future.result()


def _pool(workers: int) -> ThreadPoolExecutor:
    """As many threads, each of which computes alone; made once."""
    if workers not in _pools:
        pool = ThreadPoolExecutor(workers, "moefold-experts", initializer=_compute_alone)
        threads, all_here = torch.get_num_threads(), Barrier(workers + 1)
        for _ in range(workers):
            pool.submit(all_here.wait)
        all_here.wait()
        torch.set_num_threads(threads)  # what threads that are started later begin with
        _pools[workers] = pool
    return _pools[workers]


def _compute_alone() -> None:
    torch.get_num_threads()  # a thread that has not asked yet forgets what it is told
    torch.set_num_threads(1)
