"""The `board:` line of FIBS, in which gnubg asks about a position and is asked about one.

FIBS, the First Internet Backgammon Server, sends a game as one line of fields between colons
(its "boardstyle 3"). gnubg speaks it on both ends of its external interface:

    board:YOU:HIM:length:your score:his score:26 places:turn:your dice 2:his dice 2:cube:
    you may double:he may double:doubled:colour:direction:...:off 2:...

A place holds a positive number for men of the colour that is +1. `turn` is the colour on roll and
`direction` -1 if *you* move from 24 to 1; then your bar is place 25 and his bar place 0. gnubg
writes every line from the view of its player 1, with turn -1 when player 0 is on roll.

Shapes: `2 25` men by side and point: [opponent, player on roll], each from its own view, the own
ace point first, the bar last.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int8

PLACES = slice(6, 32)
"""Where the 26 places of the board stand among the fields."""

TURN, DICE, CUBE, MAY_DOUBLE, DOUBLED, COLOUR, DIRECTION = 32, 33, 37, 38, 40, 41, 42
FIELDS = 43
"""How many fields are read; those that follow say again what these say."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FibsBoard:
    """What a `board:` line says.

    Attributes:
        board: the position of the player who has to act: [opponent, player].
        dice: what that player rolled; None before the roll.
        doubled: whether that player has been doubled and must take or drop.
        match_length: points of the match; 0 for money.
    """

    board: Int8[np.ndarray, "2 25"]
    dice: tuple[int, int] | None
    doubled: bool
    match_length: int


def write_line(
    board: Int8[np.ndarray, "2 25"], dice: tuple[int, int] | None = None, *, name: str = "moefold"
) -> str:
    """The line for a money game with the cube in the middle, without the end of the line.

    Args:
        board: [opponent, player on roll]; the player on roll is "you".
        dice: what the player rolled; None before the roll.
        name: letters, digits and underscores, for the first player.
    """
    him, you = (side.astype(int) for side in board)
    points = [int(you[at]) or -int(him[23 - at]) for at in range(24)]
    places = [-int(him[24]), *points, int(you[24])]
    first, second = dice or (0, 0)
    off = (15 - int(you.sum()), 15 - int(him.sum()))
    fields = [name, "opponent", 0, 0, 0, *places, 1, first, second, first, second]
    fields += [1, 1, 1, 0, 1, -1, 0, 25, *off, 0, 0, 0, 0, 0, 0]
    return ":".join(["board", *map(str, fields)])


def read_line(line: str) -> FibsBoard:
    """Reads a `board:` line.

    Raises:
        ValueError: a field is missing or is no number, a side has more than 15 men, or the line
            does not say whose turn it is.
    """
    fields = line.strip().split(":")
    if fields[0] != "board" or len(fields) < FIELDS:
        raise ValueError(
            f"{line.strip()[:60]!r} has {len(fields)} fields; a position is a line "
            f"'board:name:name:...' of at least {FIELDS} fields between colons"
        )
    try:
        numbers = [0, 0, 0, *(int(field) for field in fields[3:FIELDS])]
    except ValueError as error:
        raise ValueError(f"a field of the board line is not a number: {error}") from None
    colour, direction, turn = numbers[COLOUR], numbers[DIRECTION], numbers[TURN]
    if {abs(colour), abs(direction), abs(turn)} != {1}:
        raise ValueError(
            f"turn {turn}, colour {colour} and direction {direction} must each be 1 or -1; "
            f"0 is a game that is over"
        )
    yours = turn == colour
    doubled = numbers[DOUBLED] != 0
    you, him = _sides(np.array(numbers[PLACES]) * colour, direction)
    if doubled:  # the turn is still that of the player who doubled
        yours = not yours
    board = np.stack([him, you] if yours else [you, him])
    return FibsBoard(
        board=board.astype(np.int8),
        dice=_dice(numbers),
        doubled=doubled,
        match_length=0 if numbers[3] == 9999 else numbers[3],
    )


def _sides(places: np.ndarray, direction: int) -> tuple[np.ndarray, np.ndarray]:
    """Your men and his, each from the own view; `places` is positive for your men."""
    upward = places if direction < 0 else places[::-1]
    you = np.append(upward[1:25].clip(0), abs(upward[25]))
    him = np.append((-upward[24:0:-1]).clip(0), abs(upward[0]))
    if max(you.sum(), him.sum()) > 15:
        raise ValueError(
            f"the board line has {you.sum()} and {him.sum()} men; a side has 15 at most"
        )
    return you, him


def _dice(numbers: list[int]) -> tuple[int, int] | None:
    """Either player's dice: only the one on roll has some."""
    dice = [tuple(numbers[at : at + 2]) for at in (DICE, DICE + 2)]
    first, second = next((pair for pair in dice if pair[0]), (0, 0))
    if first == second == 0:
        return None
    if not (1 <= first <= 6 and 1 <= second <= 6):
        raise ValueError(f"the dice {first} and {second} are no roll; a die shows 1 to 6")
    return first, second


__all__ = ["FibsBoard", "read_line", "write_line"]
