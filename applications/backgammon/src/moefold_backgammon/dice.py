"""Dice that depend on a seed, the number of a game and the turn, and on nothing else.

Two players can so be given the same luck, and a match that was interrupted rolls what it would have
rolled. The first roll is no doublet: each player throws one die, the higher begins with both.

Shapes: `turns 2` dice.
"""

import numpy as np
from jaxtyping import Int8

BLOCK = 128
"""Turns that are rolled at once; few games last longer."""


def game_dice(seed: int, game: int, block: int = 0) -> Int8[np.ndarray, "turns 2"]:
    """The dice of a block of `BLOCK` turns of a game; those of block 0 begin it.

    Args:
        seed: of the match.
        game: number of the game.
        block: which block of turns, from 0.
    """
    draw = np.random.default_rng([seed, game, block])
    dice = draw.integers(1, 7, size=(BLOCK, 2), dtype=np.int8)
    if block == 0:
        first, step = int(draw.integers(1, 7)), int(draw.integers(1, 6))
        dice[0] = first, (first - 1 + step) % 6 + 1  # of the 30 rolls of two different dice
    return dice


__all__ = ["BLOCK", "game_dice"]
