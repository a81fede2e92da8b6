"""The board: 25 places for each side, from that side's own view.

A board is [opponent, player on roll]. Index 0 is a side's own ace point, 23 its 24 point and 24 its
bar; index `p` of one side is the same point as index `23 - p` of the other. Men that are not on the
board have been borne off. After a play the board stays [opponent, mover], so that plays can be
compared; `swapped` turns it for the next player.

    index      0   1   2   3   4   5  ...  22  23   24
    own point  1   2   3   4   5   6  ...  23  24  bar

Shapes: `... 2 25` men by side and point; a leading `n` where many boards are needed.
"""

import numpy as np
from jaxtyping import Bool, Int, Int8

MEN = 15
"""Men of a side."""

POINTS, BAR = 24, 24
"""Points of the board, and the place of the bar, which comes after them."""

HOME = 6
"""Points of the home board: indices 0 to 5."""

OVER, BEAR_OFF, RACE, CRASHED, CONTACT = range(5)
CATEGORIES = ("over", "bear-off", "race", "crashed", "contact")
"""Names of the categories, by their numbers."""

_ALIVE = 6
"""A side with no more men than this, dead ones not counted, is crashed."""


def start() -> Int8[np.ndarray, "2 25"]:
    """The position every game begins with."""
    side = np.zeros(25, np.int8)
    side[[5, 7, 12, 23]] = 5, 3, 5, 2
    return np.stack([side, side])


def swapped(boards: Int8[np.ndarray, "... 2 25"]) -> Int8[np.ndarray, "... 2 25"]:
    """The boards as the other player sees them.

    Args:
        boards: [opponent, player] or, after a play, [next player, mover].
    """
    return np.ascontiguousarray(boards[..., ::-1, :])


def men_off(boards: Int8[np.ndarray, "... 2 25"]) -> Int8[np.ndarray, "... 2"]:
    """Men that each side has borne off."""
    return (MEN - boards.sum(axis=-1)).astype(np.int8)


def winner_points(boards: Int8[np.ndarray, "n 2 25"]) -> Int8[np.ndarray, " n"]:
    """What the mover has won: 0 while men are left, 1 for a game, 2 a gammon, 3 a backgammon.

    A gammon is won if the opponent has borne off no man, a backgammon if it also has one on the bar
    or in the winner's home board.

    Args:
        boards: after a play, [opponent, mover].
    """
    opponent, mover = boards[:, 0], boards[:, 1]
    gammon = opponent.sum(axis=1) == MEN
    backgammon = gammon & opponent[:, POINTS - HOME :].any(axis=1)
    return np.where(mover.any(axis=1), 0, 1 + gammon + backgammon).astype(np.int8)


def rearmost(sides: Int8[np.ndarray, "... 25"]) -> Int[np.ndarray, "..."]:
    """The index of the man that has furthest to go; 24, as on the bar, if there is none."""
    return BAR - (sides[..., ::-1] > 0).argmax(axis=-1)


def in_contact(boards: Int8[np.ndarray, "n 2 25"]) -> Bool[np.ndarray, " n"]:
    """Whether a man of one side still has to pass one of the other; not if a side has no men."""
    both = rearmost(boards).sum(axis=1)
    return (both > POINTS - 2) & boards.any(axis=2).all(axis=-1)


def categories(boards: Int8[np.ndarray, "n 2 25"]) -> Int8[np.ndarray, " n"]:
    """The kind of each position, as gnubg divides them: an index into `CATEGORIES`.

    - over: a side has borne off all men
    - bear-off: no contact, and all men of both sides are at home
    - race: no contact
    - crashed: contact, and a side has hardly a man left to play with: 6 at most, not counting those
      that are buried on its two lowest points
    - contact: any other

    The order of the sides does not matter.
    """
    contact = in_contact(boards)
    home = ~boards[:, :, HOME:].any(axis=(1, 2))
    crashed = contact & (_alive(boards) <= _ALIVE).any(axis=1)
    kinds = np.where(contact, CONTACT, np.where(home, BEAR_OFF, RACE))
    kinds = np.where(crashed, CRASHED, kinds)
    return np.where(boards.any(axis=2).all(axis=-1), kinds, OVER).astype(np.int8)


def check(boards: Int8[np.ndarray, "n 2 25"]) -> None:
    """Refuses what no game can show.

    Raises:
        ValueError: a side has less than no men on a point or more than 15 in all, both sides are on
            one point, or both have borne off all men.
    """
    men = boards.sum(axis=2, dtype=np.int64)
    met = (boards[:, 0, POINTS - 1 :: -1] > 0) & (boards[:, 1, :POINTS] > 0)
    for wrong, says in (
        (boards.min(axis=(1, 2), initial=0) < 0, "has less than no men on a point"),
        (men.max(axis=1, initial=0) > MEN, f"has more than the {MEN} men of a side"),
        (met.any(axis=1), "has men of both sides on one point"),
        (~men.any(axis=1), "has no men; one side must have some left"),
    ):
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(
                f"board {at} {says}: {_places(boards[at, 0])} for the opponent, "
                f"{_places(boards[at, 1])} for the player on roll, by own point"
            )


def _alive(boards: Int8[np.ndarray, "n 2 25"]) -> Int[np.ndarray, "n 2"]:
    """Men of each side that are not buried.

    Buried are all on the ace point if there are two or more, and all but one on the 2 point.
    """
    ace, deuce = boards[:, :, 0], boards[:, :, 1]
    buried = np.where(ace > 1, ace, 0) + np.maximum(deuce - 1, 0)
    return boards.sum(axis=2, dtype=np.int64) - buried


def _places(side: Int8[np.ndarray, " 25"]) -> str:
    held = np.flatnonzero(side)
    names = [f"{'bar' if at == BAR else at + 1}:{side[at]}" for at in held]
    return "{" + ", ".join(names) + f"}} = {int(side.sum(dtype=np.int64))} men"


__all__ = [
    "BAR",
    "BEAR_OFF",
    "CATEGORIES",
    "CONTACT",
    "CRASHED",
    "HOME",
    "MEN",
    "OVER",
    "POINTS",
    "RACE",
    "categories",
    "check",
    "in_contact",
    "men_off",
    "rearmost",
    "start",
    "swapped",
    "winner_points",
]
