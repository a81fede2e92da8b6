"""Who computes which experts: the fused backend on several cores.

Products of a few hundred rows are too small to be divided: of two cores that share each of them, a
part of one is lost in waiting. So each core gets experts of its own and, where these may meet at a
token, a sum of its own to add them to. Which ones is decided by sizes alone, so that a result does
not depend on who came first.

Shapes: stacks of matrices are `experts out in`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from moefold.ops.cpu.team import all_threads, run_together

MOST_WORKERS = 8
"""With more threads than this, each product is divided among them after all: every worker may have
a sum of all tokens of its own, and there may be no more experts than workers."""

WORTH_IT = 1 << 19
"""Multiplications from which on threads are used."""

Share = TypeVar("Share")


def workers_for(rows: int, *stacks: Tensor) -> int:
    """How many threads are to compute so many rows, each of them alone.

    1 is the calling one; 0 says that there is enough to do for every operation to be divided among
    all threads, of which there are too many.

    Args:
        rows: of all experts.
        *stacks: the matrices that each row is multiplied by, by expert.
    """
    threads = torch.get_num_threads()
    products = rows * sum(stack.shape[1] * stack.shape[2] for stack in stacks)
    if threads == 1 or products < WORTH_IT:
        return 1
    return threads if threads <= MOST_WORKERS else 0


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
    """Do the work for every share, each in a thread of its own; a single one in this thread.

    Several threads compute without autograd, autocast and modes, as whatever runs inside of an
    operator.
    """
    if len(shares) < 2:
        for share in shares:
            work(share)
        return
    inference, left = torch.is_inference_mode_enabled(), deque(shares)

    def one_after_another() -> None:
        grad = torch.inference_mode() if inference else torch.no_grad()
        with grad, torch.autocast("cpu", enabled=False):
            while True:
                try:
                    share = left.popleft()
                except IndexError:
                    return
                work(share)

    run_together(one_after_another, all_threads(len(shares)))
