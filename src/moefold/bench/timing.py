"""A clock for several variants on one noisy machine.

All variants are run in every round, in an order that rotates, and each round has an input of its
own. What is reported is medians with quartiles: of times, and of *ratios within a round*, so that a
machine that slows down slows both sides of a ratio. Nothing is collected as garbage in between.

A variant that is much slower than the first one takes part in a few rounds only; its ratios are of
those rounds.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

Clock = Literal["wall", "cpu"]
Input = TypeVar("Input")
Progress = Callable[[int, int], None]

_FEW = 3


@dataclass(frozen=True, slots=True)
class Seconds:
    """One pass: its forward part, and all of it (the same if it has no backward part)."""

    forward: float
    both: float

    @property
    def backward(self) -> float:
        """What is not forward."""
        return self.both - self.forward


Pass = Callable[[Input, Callable[[], float]], Seconds]
"""Something to be timed: gets an input and a clock."""


def clock_of(device: str, kind: Clock) -> Callable[[], float]:
    """A clock in seconds; on a GPU it waits for what was asked of it before.

    Raises:
        ValueError: the time of this process says nothing of a GPU.
    """
    if torch.device(device).type != "cuda":
        return {"wall": time.perf_counter, "cpu": time.process_time}[kind]
    if kind == "cpu":
        raise ValueError("--clock cpu counts the time of this process, not of a GPU; leave it out")

    def waited() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return waited


def interleave(
    passes: Mapping[str, Pass[Input]],
    inputs: Sequence[Input],
    clock: Callable[[], float],
    *,
    warmup: int,
    few: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, dict[int, Seconds]]:
    """Time every pass in every round.

    Args:
        passes: what to time, by name.
        inputs: one for each round; the first `warmup` are not counted.
        clock: in seconds.
        warmup: rounds before counting.
        few: names that take part in the last of the warm-up and in three counted rounds.
        progress: told of each round: how many are done, of how many.

    Returns:
        For each pass, seconds by the number of the counted round.
    """
    seconds: dict[str, dict[int, Seconds]] = {name: {} for name in passes}
    counted = len(inputs) - warmup
    # Spread over the run, as the others are.
    chosen = {-1, *(round(i * (counted - 1) / (_FEW - 1)) for i in range(_FEW))}
    order = list(passes)
    with _no_garbage_collection():
        for turn, x in enumerate(inputs):
            at = turn % len(order) if order else 0
            for name in order[at:] + order[:at]:
                if name in few and turn - warmup not in chosen:
                    continue
                took = passes[name](x, clock)
                if turn >= warmup:
                    seconds[name][turn - warmup] = took
            if progress is not None:
                progress(turn + 1, len(inputs))
    return seconds


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower quartile, the median and the upper one; of a single value, itself."""
    if len(values) < 2:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def ratios(above: Mapping[int, float], below: Mapping[int, float]) -> list[float]:
    """Quartiles of a ratio over the rounds that both took part in.

    Raises:
        ValueError: there is no such round.
    """
    common = sorted(above.keys() & below.keys())
    if not common:
        raise ValueError("no round has both times; give more rounds")
    return quartiles([above[turn] / below[turn] for turn in common])


def part(seconds: Mapping[int, Seconds], name: str) -> dict[int, float]:
    """One part, `forward`, `backward` or `both`, by round."""
    return {turn: getattr(took, name) for turn, took in seconds.items()}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


__all__ = ["Clock", "Pass", "Progress", "Seconds", "clock_of", "interleave", "part", "quartiles",
           "ratios"]  # fmt: skip
