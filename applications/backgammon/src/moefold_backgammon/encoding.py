"""Positions as numbers for a net.

- `unary`: 196 inputs; both sides, so that what a play does to the opponent's men is there.
- `pubeval_inputs`: the 122 inputs of PubEval, which see less: neither the mover's men on the bar,
  nor the points the opponent holds, nor the opponent's men off.

Both are of the position after a play, and of the mover's view.

Shapes: `m 2 25` men by side and point, [opponent, mover].
"""

import numpy as np
from jaxtyping import Float32, Int8

from moefold_backgammon.board import BAR, MEN, POINTS, men_off

UNARY = 2 * (4 * POINTS + 2)
"""Inputs of `unary`: 196."""

PUBEVAL = 5 * POINTS + 2
"""Inputs of `pubeval_inputs`: 122."""


def unary(boards: Int8[np.ndarray, "m 2 25"]) -> Float32[np.ndarray, "m 196"]:
    """Truncated unary inputs of Tesauro's nets, without those for the side to move.

    For the opponent and then for the mover, each from its own view: four inputs for each of the 24
    points, with `n` men on it: n >= 1, n >= 2, n >= 3, (n - 3) / 2 above 3; men on the bar / 2; men
    off / 15.

    Source: the 198 inputs of TD-Gammon less two; Sutton and Barto, *Reinforcement Learning*, 2nd
    edition, section 16.1.
    """
    inputs = np.empty((len(boards), 2, UNARY // 2), np.float32)
    points = _UNARY_OF_MEN[boards[:, :, :POINTS]]
    inputs[:, :, : 4 * POINTS] = points.reshape(len(boards), 2, 4 * POINTS)
    inputs[:, :, -2] = boards[:, :, BAR] / np.float32(2)
    inputs[:, :, -1] = men_off(boards) / np.float32(MEN)
    return inputs.reshape(len(boards), UNARY)


def pubeval_inputs(boards: Int8[np.ndarray, "m 2 25"]) -> Float32[np.ndarray, "m 122"]:
    """The inputs of PubEval.

    For the mover's points from 24 to 1, five inputs each, with `n` men of the mover (less than 0:
    of the opponent): n = -1, n = 1, n >= 2, n = 3, (n - 3) / 2 from 4 on; then the opponent's men
    on the bar / 2 and the mover's men off / 15.

    Source: G. Tesauro, pubeval.c; see `moefold_backgammon.pubeval`.
    """
    men = boards[:, 1, POINTS - 1 :: -1] - boards[:, 0, :POINTS]  # 24 is the opponent's ace point
    inputs = np.empty((len(boards), PUBEVAL), np.float32)
    inputs[:, : 5 * POINTS] = _PUBEVAL_OF_MEN[men + MEN].reshape(len(boards), 5 * POINTS)
    inputs[:, -2] = boards[:, 0, BAR] / np.float32(2)
    inputs[:, -1] = men_off(boards)[:, 1] / np.float32(MEN)
    return inputs


def _unary_of_men() -> Float32[np.ndarray, "16 4"]:
    men = np.arange(MEN + 1)
    return np.stack([men >= 1, men >= 2, men >= 3, np.maximum(men - 3, 0) / 2], axis=1).astype(
        np.float32
    )


def _pubeval_of_men() -> Float32[np.ndarray, "31 5"]:
    men = np.arange(-MEN, MEN + 1)
    return np.stack(
        [men == -1, men == 1, men >= 2, men == 3, np.maximum(men - 3, 0) / 2], axis=1
    ).astype(np.float32)


_UNARY_OF_MEN = _unary_of_men()
_PUBEVAL_OF_MEN = _pubeval_of_men()

__all__ = ["PUBEVAL", "UNARY", "pubeval_inputs", "unary"]
