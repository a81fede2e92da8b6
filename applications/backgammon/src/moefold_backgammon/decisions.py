"""Decisions of an expert: positions, every legal play of each, which one the expert takes.

The plays of all decisions lie one after the other, `lengths` says how many belong to each. Boards
are kept as the mover sees them, before and after the play, so that plays can be compared without
turning a board.

    before   0                1
    finals   0  1  2  3       4  5          lengths 4 2
    chosen         2             1          counted within the decision

Shapes: `n` decisions with `m` plays in all; `2 25` men by side and point, [opponent, mover].
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Float32, Int8, Int32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decisions:
    """Decisions with every legal play valued by the expert.

    Attributes:
        before: the positions, [opponent, mover].
        dice: what was rolled.
        finals: the positions after each distinct play, still [opponent, mover].
        lengths: number of plays of each decision; at least two, since a forced play teaches
            nothing.
        chosen: which of its plays the expert takes.
        equities: of every play, for the mover, in points.
        plies: how deep the expert looked at each play; equities of different depths cannot be
            compared, and those of the deepest decide.
        game: the number of the game each decision is from: the unit to split by.
    """

    before: Int8[np.ndarray, "n 2 25"]
    dice: Int8[np.ndarray, "n 2"]
    finals: Int8[np.ndarray, "m 2 25"]
    lengths: Int32[np.ndarray, " n"]
    chosen: Int32[np.ndarray, " n"]
    equities: Float32[np.ndarray, " m"]
    plies: Int8[np.ndarray, " m"]
    game: Int32[np.ndarray, " n"]

    def __post_init__(self) -> None:
        if int(self.lengths.sum()) != len(self.finals):
            raise ValueError(
                f"the decisions have {int(self.lengths.sum())} plays by their lengths, but there "
                f"are {len(self.finals)} boards after a play"
            )
        wrong = np.flatnonzero((self.chosen < 0) | (self.chosen >= self.lengths))
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"decision {at} chooses play {self.chosen[at]} of {self.lengths[at]}; plays are "
                f"counted from 0"
            )

    def __len__(self) -> int:
        return len(self.before)

    @property
    def starts(self) -> Int32[np.ndarray, " n"]:
        """Where the plays of each decision begin."""
        return (np.cumsum(self.lengths) - self.lengths).astype(np.int32)

    @property
    def comparable(self) -> Float32[np.ndarray, " m"]:
        """Equities as far as they can be compared: those of the deepest look at each decision.

        A play that was not looked at so deeply was left out as worse: it is worth no more than the
        worst of those that were.
        """
        if not len(self) or self.plies.min() == self.plies.max():
            return self.equities
        owner = np.repeat(np.arange(len(self)), self.lengths)
        deepest = self.plies == np.maximum.reduceat(self.plies, self.starts)[owner]
        known = np.where(deepest, self.equities, np.inf).astype(np.float32)
        worst = np.minimum.reduceat(known, self.starts)[owner]
        return np.where(deepest, self.equities, np.minimum(self.equities, worst))

    def part(self, kept: np.ndarray) -> Self:
        """The decisions at these places, or where a mask holds, with their plays.

        Args:
            kept: places, or a mask over the decisions.
        """
        places = np.flatnonzero(kept) if kept.dtype == bool else kept
        lengths = self.lengths[places]
        first = np.repeat(self.starts[places] - (np.cumsum(lengths) - lengths), lengths)
        plays = first + np.arange(len(first))
        by_play = ("finals", "equities", "plies")
        return type(self)(
            **{
                part.name: getattr(self, part.name)[plays if part.name in by_play else places]
                for part in fields(self)
            }
        )

    def save(self, file: Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Writes a safetensors file, whole or not at all."""
        from safetensors.numpy import save_file

        arrays = {
            part.name: np.ascontiguousarray(getattr(self, part.name)) for part in fields(self)
        }
        partial = file.with_name(f"{file.name}.{os.getpid()}.part")
        save_file(arrays, partial, metadata=dict(metadata or {}))
        partial.replace(file)


def read_decisions(source: Path | Sequence[Path]) -> Decisions:
    """Reads files of decisions, or every `.safetensors` file of a folder in the order of names.

    Raises:
        ValueError: there is no file, or one holds something else.
    """
    if isinstance(source, Path):
        files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    else:
        files = list(source)
    if not files:
        raise ValueError(f"{source} holds no .safetensors file; label some games first")
    return join(_read(file) for file in files)


def join(parts: Iterable[Decisions]) -> Decisions:
    """Decisions after decisions."""
    all_parts = list(parts)
    return Decisions(
        **{
            part.name: np.concatenate([getattr(one, part.name) for one in all_parts])
            for part in fields(Decisions)
        }
    )


def _read(file: Path) -> Decisions:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as decisions: {error}") from error
    names = {part.name for part in fields(Decisions)}
    if arrays.keys() != names:
        raise ValueError(
            f"{file} holds {json.dumps(sorted(arrays))}, not decisions, which are "
            f"{json.dumps(sorted(names))}"
        )
    return Decisions(**arrays)


__all__ = ["Decisions", "join", "read_decisions"]
