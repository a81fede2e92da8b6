"""What a match has given so far: a file that survives an interruption, and the numbers.

The file has one line of JSON for the match and one for every pair of games that is finished:

    {"match": {"first": "net", "second": "pubeval", "seed": 0}}
    {"pair": 17, "points": [2, -1]}

Both games of a pair have the same dice; the first player begins in one, the second in the other.
A pair is written when both are over, so that an interrupted match loses only what was on the board.

Shapes: `pairs 2` points of the first player.
"""

import fcntl
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, final

import numpy as np
from jaxtyping import Int8

from moefold.evaluate.intervals import Interval

NORMAL_95 = 1.959964
"""Standard errors from the mean to an end of an interval of 95 %, of many pairs."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MatchResult:
    """The outcome of a match without the cube; `str(result)` is a line to read.

    Attributes:
        first: name of the first player.
        second: name of the second player.
        points: what the first player won in the game it began and in the other game of each pair:
            1, 2 for a gammon, 3 for a backgammon, and the same below zero.
    """

    first: str
    second: str
    points: Int8[np.ndarray, "pairs 2"]

    @property
    def games(self) -> int:
        """Number of games."""
        return self.points.size

    @property
    def points_per_game(self) -> Interval:
        """Mean points of the first player, with an interval of 95 % over pairs of games."""
        return self._mean(self.points)

    @property
    def wins(self) -> Interval:
        """Share of the games that the first player won, with an interval of 95 %."""
        return self._mean(self.points > 0)

    @property
    def gammons(self) -> Interval:
        """Share of the games that the first player won by a gammon or more."""
        return self._mean(self.points > 1)

    @property
    def standard_error(self) -> float:
        """Of the mean points, over pairs; infinite for fewer than two."""
        return _standard_error(self.points)

    def __str__(self) -> str:
        """Points and wins in a line."""
        points, wins = self.points_per_game, self.wins
        return (
            f"{self.first} against {self.second}: {points.mean:+.3f} points per game "
            f"({points.low:+.3f} to {points.high:+.3f}), {100 * wins.mean:.1f} % of "
            f"{self.games:,} games won"
        )

    def _mean(self, values: np.ndarray) -> Interval:
        if not len(values):
            raise ValueError(f"{self.first} and {self.second} have finished no pair of games")
        mean, half = float(values.mean()), NORMAL_95 * _standard_error(values)
        return Interval(mean=mean, low=mean - half, high=mean + half)


@final
class MatchFile:
    """The finished pairs of a match, in a file if there is one; a context manager.

    Args:
        file: where they are kept; only in memory if not said.
        match: what the match is: names and seed. A file of another match is refused.

    Raises:
        ValueError: the file is of another match, is none, or holds a pair twice.
        RuntimeError: somebody else is writing to it.
    """

    def __init__(self, file: Path | None, match: Mapping[str, Any]) -> None:
        self.points: dict[int, tuple[int, int]] = {}
        self._path = file
        self._match = dict(match)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b")
            try:
                self._lock(self._file, self._path)
                self._read(self._file, self._path)
            except BaseException:
                self._file.close()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, pairs: Mapping[int, tuple[int, int]]) -> None:
        """Keeps pairs that are finished.

        Raises:
            ValueError: one has been counted before.
        """
        twice = sorted(pairs.keys() & self.points.keys())
        if twice:
            raise ValueError(f"pair {twice[0]} has been counted before")
        self.points.update(pairs)
        self._write(*({"pair": pair, "points": points} for pair, points in pairs.items()))

    def _write(self, *lines: Mapping[str, Any]) -> None:
        if self._file is None or not lines:
            return
        self._file.write(b"".join(map(_line, lines)))
        self._file.flush()
        os.fsync(self._file.fileno())

    @staticmethod
    def _lock(file: IO[bytes], path: Path) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another match is being written to {path}; wait for it, or name another file"
            ) from None

    def _read(self, file: IO[bytes], path: Path) -> None:
        """Takes over what is there, but for a last line that was cut off while it was written."""
        file.seek(0)
        written = file.read()
        end = written.rfind(b"\n") + 1
        header = _line({"match": self._match})
        if not header.startswith(written):  # nothing yet, or not even the first line whole
            first, *pairs = written[:end].splitlines() or [written]
            self._check(_parsed(first, "match", 1, path), path)
            for number, line in enumerate(pairs, start=2):
                pair, points = _parsed(line, "pair", number, path)
                if pair in self.points:
                    raise ValueError(f"line {number} of {path} holds pair {pair} a second time")
                self.points[pair] = points
        file.truncate(end)  # only now, when it is known to be ours
        if not end:
            self._write({"match": self._match})

    def _check(self, theirs: Mapping[str, Any], path: Path) -> None:
        if theirs != self._match:
            raise ValueError(
                f"{path} is of another match: {json.dumps(theirs)} instead of "
                f"{json.dumps(self._match)}; name another file"
            )


def _parsed(line: bytes, kind: str, number: int, path: Path) -> Any:
    """What a line says of a match, or a pair with its points."""
    try:
        found = json.loads(line)
        if kind == "match":
            return found["match"]
        pair, (begun, other) = found["pair"], found["points"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"line {number} of {path} is not of a match: {line[:80]!r}; move the file away"
        ) from error
    return pair, (begun, other)


def _line(said: Mapping[str, Any]) -> bytes:
    return json.dumps(said).encode() + b"\n"


def _standard_error(values: np.ndarray) -> float:
    """Of the mean over pairs: the games of a pair are not independent."""
    by_pair = values.mean(axis=1)
    if len(by_pair) < 2:
        return math.inf
    return float(by_pair.std(ddof=1) / math.sqrt(len(by_pair)))


__all__ = ["MatchFile", "MatchResult"]
