"""Decisions of people, from a file of analysed matches.

The file has a line of JSON for each decision, compressed by xz or not:

    {"match": "27ebd6afc2", "player": 0, "position": "4HPwATDgc/ABMA",
     "match_id": "MIDmAAAAAAAE", "dice": "51", "played": "24/23 13/8",
     "analysis": [[4, "24/23 13/8", 0.009], [2, "13/7", -0.087]]}

`analysis` lists up to five plays, [plies, play, equity], the deeper looked at first and the better
first among equals. A play that is not listed has no equity; equities of different depths cannot be
compared. They count the cube and the score of the match, and so did the players: a play that is
right at one score can be wrong at another.

The list is not all that is legal. Every play of the file is sought among *all* legal plays; what a
model chooses among the listed ones only would be easier to get right.

Shapes: `n` decisions with `m` plays in all; `2 25` men by side and point, [opponent, mover].
"""

import hashlib
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Int, Int8, Int32

from moefold_backgammon import board
from moefold_backgammon.decisions import Decisions
from moefold_backgammon.notation import match_texts
from moefold_backgammon.plays import plays
from moefold_backgammon.position_id import MatchStates, decode_match_ids, decode_position_ids

T = TypeVar("T")

NOT_LISTED = -1
"""The depth of a play that the analysis does not list; its equity is not a number."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HumanDecisions:
    """What people chose, and what an engine thought of it.

    Attributes:
        decisions: positions, legal plays, and the play that was made. `game` is the place of the
            match in `matches`. Plays that the analysis does not list have the depth `NOT_LISTED`
            and no number for an equity.
        best: the play that the analysis lists first, counted within the decision.
        player: the number of who decided.
        category: of the position, an index into `board.CATEGORIES`.
        states: cube, score and the like.
        matches: the names of the matches, in the order of the file.
        forced: decisions of the file that were left out because only one play was legal.
    """

    decisions: Decisions
    best: Int32[np.ndarray, " n"]
    player: Int32[np.ndarray, " n"]
    category: Int8[np.ndarray, " n"]
    states: MatchStates
    matches: tuple[str, ...]
    forced: int

    def __len__(self) -> int:
        return len(self.decisions)

    def part(self, kept: np.ndarray) -> "HumanDecisions":
        """The decisions at these places, or where a mask holds; `matches` stays as it is.

        Args:
            kept: places, or a mask over the decisions.
        """
        return replace(
            self,
            decisions=self.decisions.part(kept),
            best=self.best[kept],
            player=self.player[kept],
            category=self.category[kept],
            states=_part_of_states(self.states, kept),
        )

    def held_out(self, share: float) -> Bool[np.ndarray, " n"]:
        """Whether each decision is of a match that is kept for testing.

        Whole matches are; which ones follows from their names, so that more or fewer lines in the
        file change nothing for the others. Positions of the opening come up in many matches all the
        same: see `moefold.preference.seen_before`.

        Args:
            share: of the matches, from 0 to 1, on average.

        Raises:
            ValueError: it is no share.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share {share} of the matches must be from 0 to 1")
        out = np.array([_fraction(name) < share for name in self.matches], bool)
        return out[self.decisions.game]


def read_human(file: Path, *, most: int | None = None) -> HumanDecisions:
    """Reads a file of analysed human decisions.

    Args:
        file: lines of JSON; compressed if its name ends in `.xz`.
        most: read so many lines only.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: a line is not of such a file, its dice are not those of its match id, or a play
            of it is not legal; says which line.
    """
    rows = list(_rows(file, most))
    boards = _decoded(decode_position_ids, [row["position"] for row in rows], file)
    states = _decoded(decode_match_ids, [row["match_id"] for row in rows], file)
    dice = _dice(rows, states, file)
    finals, lengths = plays(boards, dice)
    played = _found(boards, finals, lengths, [row["played"] for row in rows], None, file)
    listed = [(at, play) for at, row in enumerate(rows) for play in row["analysis"]]
    which = np.array([at for at, _ in listed], np.int64)
    places = _found(boards, finals, lengths, [play[1] for _, play in listed], which, file)
    equities = np.full(len(finals), np.nan, np.float32)
    plies = np.full(len(finals), NOT_LISTED, np.int8)
    at_play = (np.cumsum(lengths) - lengths)[which] + places
    equities[at_play] = [play[2] for _, play in listed]
    plies[at_play] = [play[0] for _, play in listed]
    _, first = np.unique(which, return_index=True)
    matches = tuple(dict.fromkeys(row["match"] for row in rows))
    number = {name: at for at, name in enumerate(matches)}
    every = HumanDecisions(
        decisions=Decisions(
            before=boards,
            dice=dice,
            finals=finals,
            lengths=lengths.astype(np.int32),
            chosen=played.astype(np.int32),
            equities=equities,
            plies=plies,
            game=np.array([number[row["match"]] for row in rows], np.int32),
        ),
        best=places[first].astype(np.int32),
        player=np.array([row["player"] for row in rows], np.int32),
        category=board.categories(boards),
        states=states,
        matches=matches,
        forced=int((lengths == 1).sum()),
    )
    return every.part(lengths > 1) if every.forced else every


KEYS = {
    "match": str,
    "player": int,
    "position": str,
    "match_id": str,
    "dice": str,
    "played": str,
    "analysis": list,
}
"""What a line holds, and of what kind it is."""


def _rows(file: Path, most: int | None) -> Iterator[dict[str, Any]]:
    unpack = lzma.open if file.suffix == ".xz" else open
    with unpack(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if most is not None and number > most:
                return
            try:
                row = json.loads(line)
                wrong = [key for key, kind in KEYS.items() if not isinstance(row[key], kind)]
                if wrong or not row["analysis"]:
                    raise ValueError(f"{wrong or 'analysis'} is empty or of another kind")
                [(int(depth), str(text), float(value)) for depth, text, value in row["analysis"]]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {file} is no human decision ({error!r}): {line[:80]!r}; it "
                    f"must be a JSON object with {', '.join(KEYS)}"
                ) from error
            yield row


def _decoded(decode: Callable[[list[str]], T], texts: list[str], file: Path) -> T:
    try:
        return decode(texts)
    except ValueError:
        for number, text in enumerate(texts, start=1):
            try:
                decode([text])
            except ValueError as error:
                raise ValueError(f"line {number} of {file}: {error}") from None
        raise


def _dice(rows: Sequence[dict[str, Any]], states: MatchStates, file: Path) -> np.ndarray:
    """The dice, which a match id must confirm: a line about the cube would have others."""
    texts = [row["dice"] for row in rows]
    for number, text in enumerate(texts, start=1):
        if len(text) != 2 or not set(text) <= set("123456"):
            raise ValueError(
                f"line {number} of {file} has the dice {text!r}; two digits from 1 to 6"
            )
    dice = np.array([[int(one) for one in text] for text in texts], np.int8).reshape(-1, 2)
    differ = np.flatnonzero((np.sort(dice, axis=1) != np.sort(states.dice, axis=1)).any(axis=1))
    if len(differ):
        at = int(differ[0])
        raise ValueError(
            f"line {at + 1} of {file} has the dice {texts[at]!r}, but its match id "
            f"{rows[at]['match_id']!r} says {states.dice[at].tolist()}"
        )
    return dice


def _found(
    boards: Int8[np.ndarray, "n 2 25"],
    finals: Int8[np.ndarray, "m 2 25"],
    lengths: Int[np.ndarray, " n"],
    texts: list[str],
    which: Int[np.ndarray, " t"] | None,
    file: Path,
) -> Int[np.ndarray, " t"]:
    """The legal play of each text."""
    places = match_texts(boards, finals, lengths, texts, which)
    missing = np.flatnonzero(places < 0)
    if len(missing):
        at = int(missing[0])
        line = (at if which is None else int(which[at])) + 1
        raise ValueError(
            f"{len(missing)} of {len(texts)} plays of {file} are not legal; the first is "
            f"{texts[at]!r} in line {line}"
        )
    return places


def _part_of_states(states: MatchStates, kept: np.ndarray) -> MatchStates:
    return MatchStates(
        **{field.name: getattr(states, field.name)[kept] for field in fields(MatchStates)}
    )


def _fraction(name: str) -> float:
    """A number from 0 to 1 that depends on the name only, evenly spread."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48


__all__ = ["NOT_LISTED", "HumanDecisions", "read_human"]
