"""Decisions from files: JSON lines, plain or packed (.xz, .gz), and Parquet, read piece by piece.

A line, or a row with columns of these names, is one decision:

    {"candidates": [[0.1, 2], [0.3, 1], [0.2, 5]],        numbers of each candidate, or texts
     "chosen": 2,                                         or "ranking": [2, 0], best first
                                                          or "utilities": [0.1, 0.2, 0.7]
     "context": [1, 0], "weight": 1.0,                    these may be left out,
     "split": "match 7", "category": "race"}              in all lines alike

Shapes: `candidates features` of one decision.
"""

import difflib
import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from moefold.preference.groups import Groups
from moefold.preference.ragged import SHOWN

PARTS = {
    "chosen": "chosen",
    "ranking": "rankings",
    "utilities": "utilities",
    "context": "context",
    "weight": "weights",
    "split": "split",
    "category": "category",
}
"""What a line may hold beside its candidates, and the argument of `Groups.of` that it becomes."""

FORCED = ("error", "drop", "keep")

Advance = Callable[[int, int], None]


def read(
    source: str | Path,
    *,
    at_once: int = 4096,
    forced: str = "error",
    advance: Advance | None = None,
) -> Iterator[Groups]:
    """The decisions of a file, some at a time, in their order.

    Args:
        source: a `.jsonl` file, one packed as `.jsonl.xz` or `.jsonl.gz`, or a `.parquet` file,
            which needs pyarrow.
        at_once: decisions in a piece.
        forced: what to do with a decision of one candidate: "error", "drop", or "keep", which is
            for choosing only.
        advance: called after every piece with how much of the file has been read, and its size.

    Raises:
        ValueError: there is no such file, or some lines hold no decision; names the file, the
            lines, what is wrong with each, and what a line must be.
    """
    file = Path(source)
    if forced not in FORCED:
        raise ValueError(f"forced is {forced!r}; allowed: {', '.join(map(repr, FORCED))}")
    if at_once < 1:
        raise ValueError(f"at_once is {at_once}; it must be 1 or more")
    if not file.is_file():
        raise ValueError(
            f"no file at {file}; give decisions as .jsonl, .jsonl.xz, .jsonl.gz or .parquet"
        )
    pieces = _parquet(file, at_once) if file.suffix == ".parquet" else _json_lines(file, at_once)
    form = _Form(file, "row" if file.suffix == ".parquet" else "line")
    for rows, done, size in pieces:
        groups = form.groups(rows, forced)
        if groups is not None:
            yield groups
        if advance is not None:
            advance(done, size)


def read_all(
    source: str | Path, *, forced: str = "error", advance: Advance | None = None
) -> Groups:
    """All decisions of a file; see `read`.

    Raises:
        ValueError: as `read` does, or the file holds none.
    """
    parts = list(read(source, forced=forced, advance=advance))
    if not parts:
        raise ValueError(f"{source} holds no decisions; write one a line")
    return Groups.concatenate(parts)


@final
@dataclass(slots=True)
class _Form:
    """What the lines of a file look like, learnt from the first: the others must be alike."""

    file: Path
    unit: str
    first: int | None = None
    keys: frozenset[str] = frozenset()
    shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)

    def groups(self, rows: list[tuple[int, Any]], forced: str) -> Groups | None:
        """Decisions of these lines; None if none is left.

        Raises:
            ValueError: names the lines at fault.
        """
        faults: list[str] = []
        numbers: list[int] = []
        bodies: list[Any] = []
        told: dict[str, list[Any]] = {}
        for number, row in rows:
            try:
                body, parts = self._row(number, row)
            except _FaultError as fault:
                faults.append(f"{self.unit} {number} {fault}")
                continue
            if forced == "drop" and len(body) == 1:
                continue
            numbers.append(number)
            bodies.append(body)
            for name, value in parts.items():
                told.setdefault(PARTS[name], []).append(value)
        if faults:
            more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
            raise ValueError(f"{self.file}: {'; '.join(faults[:SHOWN] + more)}")
        return self._checked(numbers, bodies, told, forced) if bodies else None

    def _checked(
        self, numbers: list[int], bodies: list[Any], told: dict[str, list[Any]], forced: str
    ) -> Groups:
        alone = [len(body) == 1 for body in bodies] if forced == "keep" else [False]
        if any(alone):
            bodies, told = _doubled(bodies, told, alone)
        try:
            parts: dict[str, Any] = told
            groups = Groups.of(bodies, **parts)
        except ValueError as error:
            # It counts the groups of this piece; whoever mends the file needs its lines.
            said = re.sub(
                r"\bgroup (\d+)\b",
                lambda found: f"{self.unit} {numbers[int(found[1])]}",
                str(error).replace(" (forced='drop' leaves groups of one out)", ""),
            )
            raise ValueError(f"{self.file}: {said}") from error
        if any(alone):
            second = groups.starts[torch.tensor(alone)] + 1
            kept = torch.ones(len(groups.candidates), dtype=torch.bool)
            kept[second] = False
            groups = groups.with_candidates(kept)
        return groups

    def _row(self, number: int, row: Any) -> tuple[Any, dict[str, Any]]:
        if not isinstance(row, Mapping):
            raise _FaultError(
                f'is no decision; write {{"candidates": [...], "chosen": 0}}, not {_short(row)}'
            )
        given = {name: value for name, value in row.items() if value is not None}
        if "candidates" not in given:
            raise _FaultError("has no 'candidates'")
        keys = frozenset(given) - {"candidates"}
        if self.first is None:
            if strangers := sorted(keys - set(PARTS)):
                near = difflib.get_close_matches(strangers[0], PARTS, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise _FaultError(f"has {strangers[0]!r}; {hint}It may have {', '.join(PARTS)}")
            self.first, self.keys = number, keys
        elif keys != self.keys:
            which = min(keys ^ self.keys)
            have, lack = (number, self.first) if which in keys else (self.first, number)
            verb = "has" if have == number else "lacks"
            raise _FaultError(
                f"{verb} {which!r}, which {self.unit} {self.first} "
                f"{'lacks' if lack == self.first else 'has'}; all must be alike"
            )
        parts = {name: given[name] for name in PARTS if name in given}
        if "context" in parts:
            parts["context"] = self._items("context", parts["context"], of_one=True)
        return self._items("candidates", given["candidates"]), parts

    def _items(self, name: str, value: Any, *, of_one: bool = False) -> Any:
        """Texts as they are, numbers as an array, both of the form of the first line.

        Raises:
            _FaultError: it is neither, or other than in the first line.
        """
        if not of_one and not isinstance(value, list):
            raise _FaultError(f"has {name} {_short(value)}; it must be a list")
        is_text = isinstance(value, str) if of_one else bool(value) and isinstance(value[0], str)
        if is_text:
            if not of_one and not all(isinstance(one, str) for one in value):
                raise _FaultError(f"has {name} of which some are texts and others not")
            shape = None
        else:
            try:
                value = np.asarray(value, dtype=np.float32)
            except (TypeError, ValueError):
                what = "numbers" if of_one else "lists of equally many numbers"
                raise _FaultError(f"has {name} that are no texts and no {what}") from None
            if value.ndim == (0 if of_one else 1):
                value = value[..., None]
            shape = value.shape if of_one else value.shape[1:]
        if not len(value) and not of_one:
            return value
        known = self.shapes.setdefault(name, shape)
        if shape != known:
            raise _FaultError(
                f"has {name} of {_kind(shape)}, "
                f"those of {self.unit} {self.first} are {_kind(known)}"
            )
        return value


class _FaultError(Exception):
    """What is wrong with a line, in words that follow its number."""


def _doubled(
    bodies: list[Any], told: dict[str, list[Any]], alone: list[bool]
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Lone candidates, and what is said of them, twice: groups are checked as groups of two."""
    bodies = [
        (body * 2 if isinstance(body, list) else body.repeat(2, axis=0)) if lone else body
        for body, lone in zip(bodies, alone, strict=True)
    ]
    utilities = told.get("utilities")
    if utilities is not None:
        both = zip(utilities, alone, strict=True)
        told = {**told, "utilities": [list(value) * 2 if lone else value for value, lone in both]}
    return bodies, told


def _json_lines(file: Path, at_once: int) -> Iterator[tuple[list[tuple[int, Any]], int, int]]:
    size = file.stat().st_size
    rows: list[tuple[int, Any]] = []
    number = 0
    try:
        with file.open("rb") as raw:
            stream = _UNPACKED.get(file.suffix, lambda packed: packed)(raw)
            for number, line in enumerate(stream, 1):
                if line.strip():
                    rows.append((number, _parsed(file, number, line)))
                if len(rows) == at_once:
                    yield rows, raw.tell(), size
                    rows = []
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(
            f"{file} cannot be unpacked after line {number} ({error}); it is truncated or of "
            f"another kind"
        ) from error
    if rows:
        yield rows, size, size


_UNPACKED: Mapping[str, Callable[[Any], Any]] = {
    ".xz": lzma.LZMAFile,
    ".gz": lambda packed: gzip.GzipFile(fileobj=packed),
}


def _parsed(file: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}, line {number} is no JSON ({error}); write one decision a line, as in "
            f'{{"candidates": [[0.1], [0.7]], "chosen": 1}}'
        ) from error


def _parquet(file: Path, at_once: int) -> Iterator[tuple[list[tuple[int, Any]], int, int]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{file} is read with pyarrow, which is not installed; run "
            f"`pip install 'moefold[prefer]'` or `pip install pyarrow`"
        ) from error
    try:
        with parquet.ParquetFile(file) as opened:
            size, done = opened.metadata.num_rows, 0
            for batch in opened.iter_batches(batch_size=at_once):
                rows = list(enumerate(batch.to_pylist(), done + 1))
                done += len(rows)
                yield rows, done, size
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet ({error})") from error


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _kind(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "text"
    return f"{'x'.join(map(str, shape))} numbers"


__all__ = ["read", "read_all"]
