"""A benchmark file of our own: gnubg's nets look two plies deep at plays of their games.

Decision number `i` is one decision of game number `i`, drawn at random, so that no two decisions
are of one game and a longer benchmark begins with the shorter one. The games are gnubg's against
itself, some plays drawn at random, as labels are made; their seed is another than that of labels,
since a net must not be measured on games it has learnt from.

The file is made line by line under the name `FILE.part`, and gets its own name when it is whole. An
interrupted run goes on after the last whole line. The first line, which readers of `.bm` files pass
over, says how the decisions were made:

    # {"gnubg_nn": "1.1.0a11", "plies": 2, "top": 8, "random_share": 0.05, "seed": 1988}
    m HGPAAABEOMLGHIAAAAAA 3 1 ...

Shapes: none.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO

import numpy as np

from moefold_backgammon.bm import Benchmark, bm_line, read_bm
from moefold_backgammon.gnubg_nn_expert import LabelConfig, import_gnubg_nn, play_game, rank
from moefold_backgammon.position_id import encode_keys
from moefold_backgammon.processes import workers

SEED = 1988
"""Of the games of a benchmark, if nothing else is said; labels have the seed 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig:
    """What a benchmark is made of.

    Attributes:
        decisions: how many.
        plies: how deep the plays are valued, 1 or 2; 2 takes half a second for a decision.
        top: how many plays of a decision are valued and listed, the best by 0 plies.
        random_share: share of the plays of a game that is drawn at random.
        seed: of the games.
    """

    decisions: int = 2000
    plies: int = 2
    top: int = 8
    random_share: float = 0.05
    seed: int = SEED

    def __post_init__(self) -> None:
        if self.decisions < 1:
            raise ValueError(f"{self.decisions} decisions: there must be at least one")
        if self.plies not in (1, 2):
            raise ValueError(
                f"plies {self.plies}: 1 or 2; at 0 gnubg's nets would be measured by themselves"
            )
        if self.top < 2:
            raise ValueError(f"top {self.top}: at least two plays must be valued to compare them")
        _ = self.games  # which refuses a share that is none

    @property
    def games(self) -> LabelConfig:
        """The games that decisions are drawn from."""
        return LabelConfig(games=1, random_share=self.random_share, seed=self.seed)


def make_benchmark(
    file: Path,
    config: BenchmarkConfig,
    *,
    processes: int = 1,
    watch: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Makes a benchmark file, or what is missing of it.

    The file does not depend on the number of processes, nor on interruptions. One that is there and
    was made alike is kept if it has as many decisions, and made longer if it has fewer.

    Args:
        file: what to write; its name must end in `.bm`.
        config: what it is made of.
        processes: how many work at a time.
        watch: told how many decisions are done, and of how many.

    Raises:
        RuntimeError: gnubg-nn is not installed, or somebody else is writing the file.
        ValueError: the file is there and was made otherwise, or has another ending.
    """
    import_gnubg_nn()
    if file.suffix != ".bm":
        raise ValueError(f"{file} does not end in .bm, by which a benchmark is known; rename it")
    head = _head(config)
    if file.is_file():
        _refuse_other(file, head)
        if _count(file) >= config.decisions:
            return read_bm(file)
    tell = watch or (lambda *_: None)
    unfinished = file.with_name(f"{file.name}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("a+b") as written:
        _lock(written, unfinished)
        if not unfinished.stat().st_size and file.is_file():
            with file.open("rb") as shorter:
                shutil.copyfileobj(shorter, written)
        done = _take_up(written, unfinished, head)
        tell(min(done, config.decisions), config.decisions)
        for line in _lines(config, done, processes):
            written.write(line.encode("ascii"))
            written.flush()
            done += 1
            tell(done, config.decisions)
        os.fsync(written.fileno())
        unfinished.replace(file)
    return read_bm(file)


def decide(config: BenchmarkConfig, number: int) -> str:
    """A decision with its best plays, as a line of a benchmark file.

    Args:
        config: what the benchmark is made of.
        number: of the decision, from 0, and of the game it is drawn from.

    Raises:
        RuntimeError: gnubg-nn is not installed.
    """
    game = play_game(config.games, number)  # the first roll, no doublet, always leaves a choice
    at = int(np.random.default_rng([config.seed, number, 2**31 + 1]).integers(len(game)))
    first, second = game.dice[at].tolist()
    found = rank(game.before[at], (first, second), plies=config.plies, top=config.top)
    best = found[0][1]
    deep = [(key, best - equity) for key, equity, depth in found if depth == config.plies]
    return bm_line(encode_keys(game.before[at : at + 1])[0], (first, second), deep)


def _lines(config: BenchmarkConfig, done: int, processes: int) -> Iterator[str]:
    """The lines that are missing, in order."""
    missing = range(done, config.decisions)
    make = partial(decide, config)
    if processes == 1 or len(missing) < 2:
        yield from map(make, missing)
        return
    with workers(min(processes, len(missing))) as pool:
        yield from pool.map(make, missing)


def _head(config: BenchmarkConfig) -> str:
    made = {"gnubg_nn": version("gnubg-nn"), **asdict(config)}
    del made["decisions"]  # more of them only add lines
    return f"# {json.dumps(made)}\n"


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"another benchmark is being written to {path}; wait for it, or name another file"
        ) from None


def _take_up(file: IO[bytes], path: Path, head: str) -> int:
    """Decisions that are there; a last line that was cut off while it was written goes."""
    file.seek(0)
    written = file.read()
    end = written.rfind(b"\n") + 1
    if not head.encode().startswith(written):
        _refuse_other(path, head)
        file.truncate(end)
        return max(written.count(b"\n") - 1, 0)
    file.truncate(0)
    file.write(head.encode())
    return 0


def _refuse_other(file: Path, head: str) -> None:
    with file.open("rb") as opened:
        first = opened.readline().decode("ascii", "replace")
    if first != head:
        raise ValueError(
            f"{file} is there and was made otherwise: {first.strip()[:120]!r} instead of "
            f"{head.strip()!r}; name another file, or move it away"
        )


def _count(file: Path) -> int:
    with file.open("rb") as opened:
        return sum(line.startswith(b"m ") for line in opened)


__all__ = ["SEED", "BenchmarkConfig", "decide", "make_benchmark"]
