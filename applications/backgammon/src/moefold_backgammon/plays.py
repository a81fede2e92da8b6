"""All legal plays of many positions at once.

A *move* brings one man as far as one die says; a *play* is all moves of a turn. Whether a man may
move depends on three things only: a side has a man there, the opponent does not hold the point
where it lands, and the side's rearmost man (on the bar it must enter first; not at home nobody
bears off; with too high a number only the rearmost bears off). So one table and one comparison per
point answer it for any number of positions.

Each final position comes out once, by construction and without comparing boards:

- *doublets*: the order of the moves never matters, so only plays whose moves come from ever lower
  points are made. The mover's men at the end then tell how many moves began at each point.
- *two different dice*: a play is a pair, from where the higher die is played and from where the
  lower; both orders give the same position. Only two kinds of pairs share their end: two men borne
  off with the dice exchanged, and one man who goes the whole way over either of two points, if
  nothing is hit on them.

Shapes: `n` positions, `m` plays in all; `2 25` men by side and point, [opponent, mover].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Int8

from moefold_backgammon.board import BAR, HOME, POINTS, rearmost

AT_ONCE = 2048
"""Positions that are worked on at a time, so that what is built of them stays in the cache."""

SOURCES = 25
"""Places a man can move from."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plays:
    """Legal plays, those of one position after those of the other.

    Attributes:
        finals: the positions after each play, [opponent, mover].
        position: the position that each play belongs to, in rising order.
        sources: the places each play moves from; -1 where there is no such move.
        dice: the number that each of these moves is played with.
    """

    finals: Int8[np.ndarray, "m 2 25"]
    position: Int[np.ndarray, " m"]
    sources: Int8[np.ndarray, "m 4"]
    dice: Int8[np.ndarray, "m 4"]


def plays(
    boards: Int8[np.ndarray, "n 2 25"], dice: Int[np.ndarray, "n 2"]
) -> tuple[Int8[np.ndarray, "m 2 25"], Int[np.ndarray, " n"]]:
    """The positions after every legal play, each position once.

    As many dice must be played as can be; if either can but not both, the higher.

    Args:
        boards: [opponent, player on roll].
        dice: what was rolled; their order does not matter.

    Returns:
        finals: after each play, still [opponent, mover]; those of a position stand together.
        lengths: number of plays of each position; 0 if no man can move.

    Raises:
        ValueError: a shape is another, or a die shows something else than 1 to 6.
    """
    found = plays_with_moves(boards, dice)
    return found.finals, np.bincount(found.position, minlength=len(boards))


def plays_with_moves(boards: Int8[np.ndarray, "n 2 25"], dice: Int[np.ndarray, "n 2"]) -> Plays:
    """As `plays`, with the moves that each play is made of.

    Where several plays lead to the same position, the moves are those of one of them.

    Raises:
        ValueError: a shape is another, or a die shows something else than 1 to 6.
    """
    _check(boards, dice)
    parts = list(_parts(boards, dice.astype(np.int8)))
    position, sources, dice_used = (
        np.concatenate([part[at] for part in parts]) if parts else empty
        for at, empty in enumerate((_NO_PLACES, _NO_MOVES, _NO_MOVES))
    )
    order = np.argsort(position, kind="stable")
    position, sources, dice_used = position[order], sources[order], dice_used[order]
    finals = _played(boards, position, sources, dice_used)
    return Plays(finals=finals, position=position, sources=sources, dice=dice_used)


_NO_PLACES = np.zeros(0, np.int64)
_NO_MOVES = np.zeros((0, 4), np.int8)

_Part = tuple[Int[np.ndarray, " m"], Int8[np.ndarray, "m 4"], Int8[np.ndarray, "m 4"]]
"""Plays as position, sources, dice."""


def _parts(boards: np.ndarray, dice: np.ndarray) -> Iterator[_Part]:
    doublet = dice[:, 0] == dice[:, 1]
    for which, played in ((np.flatnonzero(~doublet), _two), (np.flatnonzero(doublet), _four)):
        for at in range(0, len(which), AT_ONCE):
            some = which[at : at + AT_ONCE]
            position, sources, dice_used = played(boards[some], dice[some])
            yield some[position], sources, dice_used


def _two(boards: np.ndarray, dice: np.ndarray) -> _Part:
    """Plays with two different dice."""
    own, free = boards[:, 1], _free(boards)
    high, low = dice.max(axis=1), dice.min(axis=1)
    pairs = np.zeros((len(boards), SOURCES, SOURCES), bool)  # by source of the high, of the low
    firsts = []
    for first, second, pair in ((high, low, pairs), (low, high, pairs.swapaxes(1, 2))):
        begun, source = np.nonzero(_movable(own, free, np.arange(len(boards)), first))
        after = _moved(own[begun], source, first[begun])
        row, then = np.nonzero(_movable(after, free, begun, second[begun]))
        pair[begun[row], source[row], then] = True
        firsts.append((begun, source))
    position, by_high, by_low = np.nonzero(_distinct(pairs, boards[:, 0], high, low))
    both = np.zeros(len(boards), bool)
    both[position] = True
    one_high, one_low = (_only(begun, source, both) for begun, source in firsts)
    both[one_high[0]] = True  # the lower alone only where not even the higher can be played
    one_low = _only(*one_low, both)
    none = np.full
    sources = np.concatenate(
        [
            np.stack([by_high, by_low], axis=1),
            np.stack([one_high[1], none(len(one_high[1]), -1)], axis=1),
            np.stack([none(len(one_low[1]), -1), one_low[1]], axis=1),
        ]
    ).astype(np.int8)
    where = np.concatenate([position, one_high[0], one_low[0]])
    nothing = none((len(where), 2), -1, np.int8)
    used = np.stack([high[where], low[where]], axis=1)
    return where, np.hstack([sources, nothing]), np.hstack([used, used])


def _only(begun: np.ndarray, source: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First moves without those of the positions that are out."""
    kept = ~out[begun]
    return begun[kept], source[kept]


def _distinct(
    pairs: Bool[np.ndarray, "n 25 25"],
    opponent: Int8[np.ndarray, "n 25"],
    high: Int8[np.ndarray, " n"],
    low: Int8[np.ndarray, " n"],
) -> Bool[np.ndarray, "n 25 25"]:
    """The pairs without those that end where another one does."""
    # Two men borne off: of each pair and its mirror image, keep the one with the higher source
    # first.
    home = pairs[:, :HOME, :HOME]
    source = np.arange(HOME)
    off = (source < high[:, None])[:, :, None] & (source < low[:, None])[:, None, :]
    home &= ~(off & home.swapaxes(1, 2) & off.swapaxes(1, 2) & (source[:, None] < source))
    # One man: first the higher die, over `source - high`, or first the lower, over `source - low`.
    rows = np.arange(len(pairs))[:, None]
    source = np.arange(SOURCES)[None]
    over_high, over_low = source - high[:, None], source - low[:, None]
    inside = over_high >= 0
    hits = (opponent[rows, POINTS - 1 - over_high.clip(0)] == 1) | (
        opponent[rows, POINTS - 1 - over_low.clip(0)] == 1
    )
    same = inside & pairs[rows, source, over_high.clip(0)] & ~hits
    pairs[rows, over_low.clip(0), source] &= ~same
    return pairs


def _four(boards: np.ndarray, dice: np.ndarray) -> _Part:
    """Plays with a doublet, up to four moves from ever lower points."""
    free = _free(boards)
    position = np.arange(len(boards))
    own = boards[:, 1]
    sources = np.full((len(boards), 4), -1, np.int8)
    least = np.arange(SOURCES)
    last = np.full(len(boards), BAR)
    ended: list[tuple[np.ndarray, np.ndarray]] = []  # by number of moves: positions, sources
    for number in range(4):
        may = _movable(own, free, position, dice[position, 0]) & (least <= last[:, None])
        row, source = np.nonzero(may)
        position, sources = position[row], sources[row]
        own = _moved(own[row], source, dice[position, 0])
        sources[:, number] = source
        last = source
        ended.append((position, sources))
    kept, done = [], np.zeros(len(boards), bool)
    for position, sources in reversed(ended):
        longest = ~done[position]
        kept.append((position[longest], sources[longest]))
        done[position] = True
    position, sources = (np.concatenate(part) for part in zip(*kept, strict=True))
    return position, sources, np.repeat(dice[position, :1], 4, axis=1)


def _movable(
    own: Int8[np.ndarray, "k 25"],
    free: Bool[np.ndarray, "n 7 25"],
    position: Int[np.ndarray, " k"],
    die: Int8[np.ndarray, " k"],
) -> Bool[np.ndarray, "k 25"]:
    """Where a man can move from: `position` says which of `n` positions each of `k` belongs to."""
    return (own > 0) & free[position, die] & _ALLOWED[die, rearmost(own)]


def _moved(own: np.ndarray, source: np.ndarray, die: np.ndarray) -> np.ndarray:
    """The own men after a move; changes `own`."""
    rows = np.arange(len(own))
    own[rows, source] -= 1
    lands = source - die
    on_board = lands >= 0
    own[rows[on_board], lands[on_board]] += 1
    return own


def _free(boards: np.ndarray) -> Bool[np.ndarray, "n 7 25"]:
    """By die and source, whether the opponent leaves open where a man would land."""
    open_points = boards[:, 0, POINTS - 1 :: -1] < 2  # by the mover's points
    free = np.ones((len(boards), 7, SOURCES), bool)
    for die in range(1, 7):
        free[:, die, die:] = open_points[:, : SOURCES - die]
    return free


def _table() -> Bool[np.ndarray, "7 25 25"]:
    """By die, rearmost man and source, whether the rules let a man move that has a place to land.

    A man on the bar comes first. Off the board goes who is exactly as far as the die says, or the
    rearmost if none is further, once all are at home.
    """
    allowed = np.zeros((7, SOURCES, SOURCES), bool)
    for die in range(1, 7):
        for last in range(SOURCES):
            for source in [BAR] if last == BAR else range(last + 1):
                exact = source == die - 1 or source == last
                allowed[die, last, source] = source >= die or (last < HOME and exact)
    return allowed


_ALLOWED = _table()


def _played(
    boards: np.ndarray, position: np.ndarray, sources: np.ndarray, dice: np.ndarray
) -> Int8[np.ndarray, "m 2 25"]:
    """The positions after the moves."""
    finals = boards[position]
    opponent, own = finals[:, 0], finals[:, 1]
    for source, die in zip(sources.T, dice.T, strict=True):
        rows = np.flatnonzero(source >= 0)
        source = source[rows]
        own[rows, source] -= 1
        lands = source - die[rows]
        rows, lands = rows[lands >= 0], lands[lands >= 0]
        own[rows, lands] += 1
        facing = POINTS - 1 - lands
        hit = opponent[rows, facing] == 1
        rows, facing = rows[hit], facing[hit]
        opponent[rows, facing] = 0
        opponent[rows, BAR] += 1
    return finals


def _check(boards: np.ndarray, dice: np.ndarray) -> None:
    if boards.ndim != 3 or boards.shape[1:] != (2, 25) or dice.shape != (len(boards), 2):
        raise ValueError(
            f"boards of shape {boards.shape} with dice of shape {dice.shape}; boards must be "
            f"(n, 2, 25) and dice (n, 2)"
        )
    wrong = np.flatnonzero(((dice < 1) | (dice > 6)).any(axis=1))
    if len(wrong):
        raise ValueError(
            f"the dice of position {wrong[0]} are {dice[wrong[0]].tolist()}; a die shows 1 to 6"
        )


__all__ = ["Plays", "plays", "plays_with_moves"]
