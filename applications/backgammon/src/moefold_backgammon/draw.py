"""A board for the terminal, seen by the player on roll, who moves from 24 down to 1.

Shapes: `2 25` men by side and point, [opponent, player on roll].
"""

import numpy as np
from jaxtyping import Int8

from moefold_backgammon.board import BAR, POINTS, men_off

HEIGHT = 5
"""Men of a point that are drawn; a number takes the place of the last where there are more."""

PLAYER, OPPONENT = "X", "O"


def draw(board: Int8[np.ndarray, "2 25"]) -> str:
    """Draws a board: X for the player on roll, at home at the lower right, and O for the opponent.

    Args:
        board: [opponent, player on roll].
    """
    opponent, player = board.astype(int)
    off = men_off(board)
    points = [int(player[at]) - int(opponent[POINTS - 1 - at]) for at in range(POINTS)]
    rule = "+" + "-" * 18 + "+---+" + "-" * 18 + "+"
    upper = _half(points[12:18], points[18:], -int(opponent[BAR]))
    lower = _half(points[11:5:-1], points[5::-1], int(player[BAR]))
    return "\n".join(
        [
            _numbers(range(13, 19), range(19, 25)),
            rule,
            f"{upper[0]}  {OPPONENT} {off[0]:>2} off",
            *upper[1:],
            "|" + " " * 18 + "|bar|" + " " * 18 + "|",
            *lower[:0:-1],
            f"{lower[0]}  {PLAYER} {off[1]:>2} off",
            rule,
            _numbers(range(12, 6, -1), range(6, 0, -1)),
        ]
    )


def _half(outer: list[int], home: list[int], bar: int) -> list[str]:
    """The lines of an upper or lower half, from the edge inwards."""
    return [
        "|"
        + "|".join("".join(_man(men, depth) for men in points) for points in (outer, [bar], home))
        + "|"
        for depth in range(HEIGHT)
    ]


def _man(men: int, depth: int) -> str:
    """What stands on a point at a depth: a man, how many there are, or nothing."""
    if depth == HEIGHT - 1 and abs(men) > HEIGHT:
        return f"{abs(men):^3}"
    return f" {PLAYER if men > 0 else OPPONENT} " if abs(men) > depth else "   "


def _numbers(outer: range, home: range) -> str:
    left, right = ("".join(f"{point:^3}" for point in points) for points in (outer, home))
    return f" {left}     {right}".rstrip()


__all__ = ["draw"]
