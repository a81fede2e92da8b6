"""Plays as people write them: `8/5 6/5`, `13/9*/3`, `bar/22`, `6/off(2)`.

A word is the way of a man from point to point. A star says that a man is hit there, a number in
brackets how many men go that way.

    8/4*(2)      two men go, one is hit
    13/9*/3      one man goes, and hits on the way

What a text does is taken as a whole: men leave the first point of each word and stand on the last;
the points between matter only for what is hit there.

Shapes: `2 25` men by side and point, [opponent, mover]; `n` positions with `m` plays in all.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int, Int8

from moefold_backgammon.board import BAR, POINTS
from moefold_backgammon.plays import plays_with_moves

OFF = -1
"""The place of men that are borne off: below the ace point."""

NOT_FOUND = -1
"""In place of a play: no legal play is like the text."""

SEVERAL = -2
"""In place of a play: several are like the text, and differ in what they hit."""

_NAMES = {"bar": BAR, "25": BAR, "off": OFF, "0": OFF} | {
    str(point): point - 1 for point in range(1, POINTS + 1)
}
_WORD = re.compile(r"([a-z\d]+\*?(?:/[a-z\d]+\*?)+)(?:\(([1-4])\))?")
_AT_ONCE = 20_000
"""Texts that are compared with their legal plays at a time, which bounds the memory."""


@dataclass(frozen=True, slots=True)
class Way:
    """A word of a text.

    Attributes:
        points: where the man stands and lands, as indices of the mover's places.
        starred: those of them where a man is said to be hit.
        men: how many go that way.
    """

    points: tuple[int, ...]
    starred: tuple[int, ...]
    men: int


def find_play(
    before: Int8[np.ndarray, "2 25"], finals: Int8[np.ndarray, "k 2 25"], text: str
) -> int:
    """The place of the play that a text means among the legal plays.

    Neither the order of the words matters, nor whether a man's way is written as one word or as
    two. A star may be left out where only one play brings the men there.

    Args:
        before: the position, [opponent, mover].
        finals: the positions after each legal play.
        text: what was written.

    Raises:
        ValueError: the text is not understood, or not one legal play is like it.
    """
    found = int(match_texts(before[None], finals, np.array([len(finals)]), [text])[0])
    if found == SEVERAL:
        raise ValueError(f"{text!r} can be several plays; put a star where a man is hit")
    if found == NOT_FOUND:
        raise ValueError(f"{text!r} is not like any of the {len(finals)} legal plays")
    return found


def match_texts(
    before: Int8[np.ndarray, "n 2 25"],
    finals: Int8[np.ndarray, "m 2 25"],
    lengths: Int[np.ndarray, " n"],
    texts: Sequence[str],
    position: Int[np.ndarray, " t"] | None = None,
) -> Int[np.ndarray, " t"]:
    """Finds many texts among the legal plays of their positions, as `find_play` does.

    Args:
        before: the positions, [opponent, mover].
        finals: the positions after each legal play; those of a position stand together.
        lengths: plays of each position.
        texts: what was written.
        position: the position that each text belongs to; one text for each if not said.

    Returns:
        The place of each text's play among those of its position; `NOT_FOUND` or `SEVERAL`.

    Raises:
        ValueError: a text is not understood.
    """
    at = np.arange(len(texts)) if position is None else position
    found = np.full(len(texts), NOT_FOUND)
    for begin in range(0, len(texts), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        written, sensible = _written(before[at[part]], texts[part])
        found[part] = np.where(sensible, _like(written, finals, lengths, at[part]), NOT_FOUND)
    return found


def play_text(
    before: Int8[np.ndarray, "2 25"], final: Int8[np.ndarray, "2 25"], dice: tuple[int, int]
) -> str:
    """A text for the play that leads to a position.

    Args:
        before: the position, [opponent, mover].
        final: the position after the play, [opponent, mover].
        dice: what was rolled.

    Raises:
        ValueError: no legal play leads there.
    """
    legal = plays_with_moves(before[None], np.array([dice], np.int8))
    like = np.flatnonzero((legal.finals == final).all(axis=(1, 2)))
    if not len(like):
        raise ValueError(
            f"no play with {dice[0]} and {dice[1]} leads from {before.tolist()} to {final.tolist()}"
        )
    sources, used = legal.sources[like[0]].tolist(), legal.dice[like[0]].tolist()
    moves = sorted(zip(sources, used, strict=True), reverse=True)
    ways: list[list[int]] = []
    for source, die in moves:
        if source >= 0:
            way = next((way for way in ways if way[-1] == source), None)
            if way is None:
                ways.append(way := [source])
            way.append(max(source - die, OFF))
    blots = np.flatnonzero(before[0, POINTS - 1 :: -1] == 1)
    return _spelled(ways, set(blots.tolist()))


@lru_cache(maxsize=100_000)
def read_text(text: str) -> tuple[Way, ...]:
    """The words of a text.

    Raises:
        ValueError: it is not understood.
    """
    ways = []
    for word in text.split():
        read = _WORD.fullmatch(word.lower())
        names = read[1].split("/") if read else []
        points = [_NAMES.get(name.rstrip("*")) for name in names]
        known = tuple(point for point in points if point is not None)
        if not read or known != tuple(points) or OFF in known[:-1] or BAR in known[1:]:
            raise ValueError(
                f"{word!r} in {text!r} is not understood; write from/to for each man, as in "
                f"13/9 6/5, bar/22, 6/off or 8/4(2)"
            )
        starred = tuple(at for at, name in zip(known, names, strict=True) if name.endswith("*"))
        ways.append(Way(known, starred, int(read[2] or 1)))
    return tuple(ways)


def _written(
    before: Int8[np.ndarray, "t 2 25"], texts: Sequence[str]
) -> tuple[Int8[np.ndarray, "t 2 25"], np.ndarray]:
    """The positions that texts lead to, and whether a man can be hit wherever they have a star."""
    goes: list[tuple[int, int, int, int]] = []  # text, from, to, men
    lands: list[tuple[int, int, bool]] = []  # text, point, starred
    for row, text in enumerate(texts):
        for way in read_text(text):
            goes.append((row, way.points[0], way.points[-1], way.men))
            lands += [(row, at, at in way.starred) for at in way.points[1:] if at != OFF]
    row, source, target, men = np.array(goes, np.int64).reshape(-1, 4).T
    after = before.astype(np.int16)
    np.subtract.at(after[:, 1], (row, source), men)
    stays = target != OFF
    np.add.at(after[:, 1], (row[stays], target[stays]), men[stays])
    row, point, starred = np.array(lands, np.int64).reshape(-1, 3).T
    blot = before[row, 0, POINTS - 1 - point] == 1
    sensible = np.ones(len(texts), bool)
    sensible[row[(starred == 1) & ~blot]] = False
    after[row[blot], 0, POINTS - 1 - point[blot]] = 0
    hit = before[:, 0, :POINTS] - after[:, 0, :POINTS]  # once, though two men may land on it
    after[:, 0, BAR] += hit.sum(axis=1)
    return after.clip(-1, 127).astype(np.int8), sensible


def _like(
    wanted: Int8[np.ndarray, "t 2 25"],
    finals: Int8[np.ndarray, "m 2 25"],
    lengths: Int[np.ndarray, " n"],
    position: Int[np.ndarray, " t"],
) -> Int[np.ndarray, " t"]:
    """The play of its position that leads to each board, or else the only one that is like it.

    Like it is a play with the same own men at the end that hits no less.
    """
    counts = lengths[position]
    text = np.repeat(np.arange(len(wanted)), counts)
    place = np.arange(len(text)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = (np.cumsum(lengths) - lengths)[position]
    alike = np.flatnonzero((finals[begins[text] + place, 1] == wanted[text, 1]).all(axis=1))
    text, place = text[alike], place[alike]
    after, theirs = finals[begins[text] + place, 0], wanted[text, 0]
    equal = (after == theirs).all(axis=1)
    hits_no_less = (after[:, :POINTS] <= theirs[:, :POINTS]).all(axis=1)
    found = np.full(len(wanted), NOT_FOUND)
    found[text[hits_no_less]] = place[hits_no_less]
    found[np.bincount(text[hits_no_less], minlength=len(wanted)) > 1] = SEVERAL
    found[text[equal]] = place[equal]
    return found


def _spelled(ways: list[list[int]], blots: set[int]) -> str:
    """Ways as text, with the points between only where a man is hit."""
    shown = Counter(
        tuple(at for place, at in enumerate(way) if place in (0, len(way) - 1) or at in blots)
        for way in ways
    )
    hit: set[int] = set()
    words = []
    for way, men in sorted(shown.items(), reverse=True):
        stars = {at for at in way[1:] if at in blots and at not in hit}
        hit |= stars
        word = "/".join(_name(at) + ("*" if at in stars else "") for at in way)
        words.append(word + (f"({men})" if men > 1 else ""))
    return " ".join(words)


def _name(place: int) -> str:
    return {BAR: "bar", OFF: "off"}.get(place, str(place + 1))


__all__ = [
    "NOT_FOUND",
    "OFF",
    "SEVERAL",
    "Way",
    "find_play",
    "match_texts",
    "play_text",
    "read_text",
]
