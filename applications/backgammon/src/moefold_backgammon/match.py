"""Matches of many games side by side, every dice sequence played twice with the sides swapped.

All games of a batch take their turn together, so that a net values the plays of a thousand games at
once. Money play without the cube: 1 point for a win, 2 for a gammon, 3 for a backgammon.

Both games of a pair have the same dice, so that each player gets the luck of the other once and the
luck of the dice cancels in part. The interval is over pairs, which are independent.

Shapes: `games 2 25` men by game, side and point, [opponent, player on roll].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int8

from moefold_backgammon.board import start, swapped, winner_points
from moefold_backgammon.dice import BLOCK, game_dice
from moefold_backgammon.match_record import MatchFile, MatchResult
from moefold_backgammon.players import Player
from moefold_backgammon.plays import plays


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchConfig:
    """How long to play.

    Attributes:
        pairs: pairs of games with the same dice.
        pairs_at_once: how many are played side by side. Many for players that answer quickly; few
            for a slow one, since an interruption loses the games that are not over.
        seed: of the dice.
    """

    pairs: int
    pairs_at_once: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.pairs_at_once < 1:
            raise ValueError(
                f"{self.pairs} pairs, {self.pairs_at_once} at once: both must be positive"
            )


def play_match(
    first: Player,
    second: Player,
    config: MatchConfig,
    *,
    results: Path | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> MatchResult:
    """Plays a match, or what is missing of it.

    Args:
        first: the player whose points are counted.
        second: its opponent.
        config: how long.
        results: a .jsonl file of the finished pairs; if it is there the match goes on from it.
        watch: told how many pairs are finished, and of how many.

    Raises:
        ValueError: the file is of other players or another seed.
        RuntimeError: somebody else is writing to it.
    """
    match = {"first": first.name, "second": second.name, "seed": config.seed}
    tell = watch or (lambda *_: None)
    with MatchFile(results, match) as record:
        missing = [pair for pair in range(config.pairs) if pair not in record.points]
        tell(config.pairs - len(missing), config.pairs)
        left = len(missing)
        for at in range(0, len(missing), config.pairs_at_once):
            batch = missing[at : at + config.pairs_at_once]
            for finished in play_pairs(first, second, batch, seed=config.seed):
                record.add(finished)
                left -= len(finished)
                tell(config.pairs - left, config.pairs)
        points = [record.points[pair] for pair in range(config.pairs)]
    return MatchResult(first=first.name, second=second.name, points=np.array(points, np.int8))


def play_pairs(
    first: Player, second: Player, pairs: list[int], *, seed: int = 0
) -> Iterator[dict[int, tuple[int, int]]]:
    """Plays pairs of games side by side.

    Args:
        first: the player whose points are counted.
        second: its opponent.
        pairs: their numbers, which with the seed decide the dice.
        seed: of the dice.

    Yields:
        The pairs that a turn has finished: the points of `first` in the game it began, and in the
        other.
    """
    points = np.zeros((len(pairs), 2), np.int8)
    pair = np.repeat(np.arange(len(pairs)), 2)
    begins = np.tile([True, False], len(pairs))  # whether `first` does, in each game
    boards = np.tile(start(), (2 * len(pairs), 1, 1))
    for turn, dice in enumerate(_dice(pairs, seed)):
        is_first = begins == (turn % 2 == 0)
        boards = _turn(first, second, boards, dice[pair], is_first)
        won = winner_points(boards)
        over = won > 0
        points[pair[over], np.where(begins[over], 0, 1)] = np.where(is_first, won, -won)[over]
        ended = np.setdiff1d(pair[over], pair[~over])
        if len(ended):
            yield {pairs[at]: (int(points[at, 0]), int(points[at, 1])) for at in ended}
        boards, pair, begins = swapped(boards[~over]), pair[~over], begins[~over]
        if not len(pair):
            return


def _turn(
    first: Player,
    second: Player,
    boards: Int8[np.ndarray, "games 2 25"],
    dice: Int8[np.ndarray, "games 2"],
    is_first: np.ndarray,
) -> Int8[np.ndarray, "games 2 25"]:
    """The boards after a turn, still as the mover sees them; each player is asked once at most.

    Raises:
        RuntimeError: a player chooses a play that there is not.
    """
    finals, lengths = plays(boards, dice)
    starts = np.cumsum(lengths) - lengths
    chosen = np.zeros(len(boards), np.int64)
    for player, mine in ((first, is_first), (second, ~is_first)):
        asked = mine & (lengths > 1)  # a forced play is nobody's choice
        if asked.any():
            taken = player.choose(
                boards[asked], dice[asked], finals[np.repeat(asked, lengths)], lengths[asked]
            )
            wrong = np.flatnonzero((taken < 0) | (taken >= lengths[asked]))
            if len(wrong):
                raise RuntimeError(
                    f"{player.name} chose play {taken[wrong[0]]} of {lengths[asked][wrong[0]]}; "
                    f"plays are counted from 0 within a decision"
                )
            chosen[asked] = taken
    after = boards.copy()
    moves = lengths > 0
    after[moves] = finals[(starts + chosen)[moves]]
    return after


def _dice(pairs: list[int], seed: int) -> Iterator[Int8[np.ndarray, "pairs 2"]]:
    """The dice of every pair, turn after turn, without end."""
    block = 0
    while True:
        rolled = np.stack([game_dice(seed, pair, block) for pair in pairs])
        for turn in range(BLOCK):
            yield rolled[:, turn]
        block += 1


__all__ = ["MatchConfig", "play_match", "play_pairs"]
