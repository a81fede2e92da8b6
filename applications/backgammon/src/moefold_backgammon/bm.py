"""Benchmark files of gnubg's makers (`.bm`): positions whose plays have been rolled out.

    m KEY DIE DIE BEST_KEY [OTHER_KEY LOSS ...]

A key is a position as the player on roll sees it (see `position_id`): in KEY that is the mover, in
the keys of plays the next player. The losses are in points against the best play; only the best few
plays are listed. Lines that begin otherwise (`o`, cube decisions; `s` and `r`, settings) are passed
over. Files may be compressed by bzip2 or xz.

Shapes: `n` decisions with `m` listed plays in all; `2 25` men by side and point, [opponent, mover].
"""

import bz2
import lzma
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int8, Int32

from moefold_backgammon.board import swapped
from moefold_backgammon.decisions import Decisions
from moefold_backgammon.position_id import decode_keys, encode_keys

_KEY = re.compile(r"[A-P]{20}")
_OPEN: dict[str, Any] = {".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Benchmark:
    """Decisions with their best plays.

    Attributes:
        before: the positions, [opponent, mover].
        dice: what was rolled.
        finals: the positions after the listed plays, [opponent, mover], the best of each decision
            first.
        lengths: number of listed plays of each decision, at least one.
        losses: of the listed plays against the best, in points; 0 for the best.
    """

    before: Int8[np.ndarray, "n 2 25"]
    dice: Int8[np.ndarray, "n 2"]
    finals: Int8[np.ndarray, "m 2 25"]
    lengths: Int32[np.ndarray, " n"]
    losses: Float32[np.ndarray, " m"]

    def __len__(self) -> int:
        return len(self.before)

    @classmethod
    def of(cls, decisions: Decisions, *, top: int = 5) -> "Benchmark":
        """The best plays of decisions that an expert has valued.

        Plays at which it looked less deep than at the best are left out, for their equities cannot
        be compared.

        Args:
            decisions: what the expert thinks.
            top: list so many plays at most.
        """
        depth = np.maximum.reduceat(decisions.plies, decisions.starts)
        decision = np.repeat(np.arange(len(decisions)), decisions.lengths)
        deep = np.flatnonzero(decisions.plies == depth[decision])
        order = deep[np.lexsort((-decisions.equities[deep], decision[deep]))]
        owner = decision[order]
        rank = np.arange(len(order)) - np.searchsorted(owner, owner)
        order, owner = order[rank < top], owner[rank < top]
        lengths = np.bincount(owner, minlength=len(decisions))
        best = np.repeat(decisions.equities[order][np.cumsum(lengths) - lengths], lengths)
        return cls(
            before=decisions.before,
            dice=decisions.dice,
            finals=decisions.finals[order],
            lengths=lengths.astype(np.int32),
            losses=best - decisions.equities[order],
        )

    def losses_of(
        self, made: Int8[np.ndarray, "n 2 25"]
    ) -> tuple[Float64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """What plays lose; 1000 times the mean is the error rate.

        A play that is not listed is charged as much as the worst that is, though it may lose more.

        Args:
            made: the position after the play that is made in each decision, [opponent, mover].

        Returns:
            losses: in points.
            listed: whether the play is.
        """
        decision = np.repeat(np.arange(len(self)), self.lengths)
        same = (self.finals == made[decision]).all(axis=(1, 2))
        losses = np.maximum.reduceat(self.losses, np.cumsum(self.lengths) - self.lengths)
        losses = losses.astype(np.float64)
        losses[decision[same]] = self.losses[same]
        listed = np.zeros(len(self), bool)
        listed[decision[same]] = True
        return losses, listed


def read_bm(file: Path) -> Benchmark:
    """Reads the plays of a benchmark file.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: a line is cut off or not of such a file; says which line.
    """
    numbers, rows = [], []
    with _OPEN.get(file.suffix, open)(file, "rt", encoding="ascii", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.split(maxsplit=1)[:1] == ["m"]:
                rows.append(_row(line, number, file))
                numbers.append(number)
    if not rows:
        raise ValueError(f"{file} has no line that begins with m; there is no play to judge")
    lengths = np.array([len(plays) for _, _, plays in rows], np.int32)
    keys = [key for _, _, plays in rows for key, _ in plays]
    return Benchmark(
        before=_decoded([key for key, _, _ in rows], numbers, file),
        dice=np.array([dice for _, dice, _ in rows], np.int8),
        finals=swapped(_decoded(keys, np.repeat(numbers, lengths).tolist(), file)),
        lengths=lengths,
        losses=np.array([loss for _, _, plays in rows for _, loss in plays], np.float32),
    )


def write_bm(file: Path, benchmark: Benchmark) -> None:
    """Writes a benchmark file, whole or not at all; losses with six digits.

    Args:
        file: the file; not compressed, whatever its name.
        benchmark: what to write.
    """
    before = encode_keys(benchmark.before)
    after = encode_keys(swapped(benchmark.finals))
    starts = np.cumsum(benchmark.lengths) - benchmark.lengths
    lines = []
    for key, dice, start, length in zip(
        before, benchmark.dice.tolist(), starts.tolist(), benchmark.lengths.tolist(), strict=True
    ):
        places = slice(start, start + length)
        plays = zip(after[places], benchmark.losses[places].tolist(), strict=True)
        lines.append(bm_line(key, dice, list(plays)))
    partial = file.with_name(f"{file.name}.{os.getpid()}.part")
    partial.write_text("".join(lines), encoding="ascii")
    partial.replace(file)


def bm_line(key: str, dice: Sequence[int], plays: Sequence[tuple[str, float]]) -> str:
    """A decision as a line of such a file, with its end.

    Args:
        key: of the position, the mover on roll.
        dice: what was rolled.
        plays: the key after each, the next player on roll, and what it loses; the best first.
    """
    (best, _), *others = plays
    said = (f"{after} {loss:.6f}" for after, loss in others)
    return " ".join(["m", key, *map(str, dice), best, *said]) + "\n"


_Row = tuple[str, tuple[int, int], list[tuple[str, float]]]
"""Key, dice, and the plays with what they lose."""


def _row(line: str, number: int, file: Path) -> _Row:
    where = f"line {number} of {file}"
    if not line.endswith("\n"):
        raise ValueError(
            f"{where}, the last, is cut off: {line[-40:]!r} does not end with the end of a line"
        )
    _, *said = line.split()
    if len(said) < 4 or len(said) % 2:
        raise ValueError(
            f"{where} is cut off: after m it has {len(said)} words; there must be a key, two dice, "
            f"the best play's key, and then a key and a loss for each other play"
        )
    key, first, second, best, *rest = said
    for one in (key, best, *rest[::2]):
        if not _KEY.fullmatch(one):
            raise ValueError(f"{where} has the key {one!r}; a key is 20 letters from A to P")
    if not {first, second} <= set("123456"):
        raise ValueError(f"{where} has the dice {first} and {second}; a die shows 1 to 6")
    plays = [(best, 0.0), *zip(rest[::2], map(_number, rest[1::2]), strict=True)]
    for _, loss in plays:
        if not 0 <= loss < math.inf:
            raise ValueError(f"{where} has a loss that is not a number from 0 on: {rest[1::2]}")
    return key, (int(first), int(second)), plays


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _decoded(keys: list[str], numbers: Sequence[int], file: Path) -> np.ndarray:
    try:
        return decode_keys(keys)
    except ValueError:
        for key, number in zip(keys, numbers, strict=True):
            try:
                decode_keys([key])
            except ValueError as error:
                raise ValueError(f"line {number} of {file}: {error}") from None
        raise


__all__ = ["Benchmark", "bm_line", "read_bm", "write_bm"]
