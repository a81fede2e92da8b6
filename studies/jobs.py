"""Work in pieces, each of which leaves one file, several at a time, one core each.

A piece whose file is there is not done again, so that a study that was stopped goes on.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A piece of work.

    Attributes:
        name: what it is called.
        leaves: the file that is there when it is done.
        call: a function of a module, so that another process can find it.
        given: its arguments.
    """

    name: str
    leaves: Path
    call: Callable[..., Any]
    given: tuple[Any, ...]


def work(jobs: Sequence[Job], processes: int) -> None:
    """Does what is not done yet.

    Args:
        jobs: in the order in which they are begun.
        processes: how many at a time; each computes with one thread.

    Raises:
        RuntimeError: a job left no file.
    """
    left = [job for job in jobs if not job.leaves.exists()]
    if not left:
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
        running = {pool.submit(job.call, *job.given): job for job in left}
        try:
            for future in as_completed(running):
                future.result()
                job = running[future]
                if not job.leaves.exists():
                    raise RuntimeError(f"{job.name} left no {job.leaves}")
                print(f"done: {job.name}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def one_thread() -> None:
    """Several processes of one thread each are faster than one of several, for small models."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _begin() -> None:
    """One thread for the work, and one that ends the process if the one that began it is killed.

    Two studies that write to one folder would otherwise be at work after a second begin.
    """
    one_thread()
    first = parent_process()
    assert first is not None

    def end() -> None:
        first.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
