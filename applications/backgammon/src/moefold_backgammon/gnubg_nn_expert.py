"""gnubg's nets, in process, as an expert without end: games against itself, every play valued.

The nets come from the package `gnubg-nn` (GPL, optional). What has to be known of it:

- a board is [opponent, player on roll]; after a play its keys are already turned for the *next*
  player, while the equity beside them is the *mover's*;
- with a single legal play that equity is uninitialised memory, so a forced play is never read;
- it looks deeper only at the plays it likes at 0 plies; for labels each play is valued by itself.

A share of the plays is drawn at random, so that the games also visit what an expert avoids; the
label is the expert's play all the same.

Plays are stored in the order of their keys and not from best to worst: a model that breaks ties by
the first place would otherwise look as good as the expert.

Shapes: `n 2 25` men by decision, side and point, [opponent, mover].
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int8

from moefold_backgammon.board import start
from moefold_backgammon.decisions import Decisions
from moefold_backgammon.dice import game_dice
from moefold_backgammon.position_id import decode_keys
from moefold_backgammon.processes import workers

LABELS = "labels.json"
"""The file that says how the labels of a folder were made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelConfig:
    """Games to play and how to value them.

    Attributes:
        games: how many.
        games_per_shard: games of a file; an interrupted run begins again at the first file that
            is missing.
        random_share: share of the plays that is drawn at random.
        plies: how deep the plays are valued; 2 takes 0.4 s for a decision.
        top: value only so many plays that deep, the best by 0 plies; all if not said.
        seed: of dice and random plays.
    """

    games: int = 4000
    games_per_shard: int = 250
    random_share: float = 0.05
    plies: int = 0
    top: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.games < 1 or self.games_per_shard < 1:
            raise ValueError(
                f"{self.games} games in shards of {self.games_per_shard}: both must be positive"
            )
        if not 0 <= self.random_share <= 1:
            raise ValueError(f"random_share {self.random_share} is a share: from 0 to 1")
        if not 0 <= self.plies <= 2:
            raise ValueError(f"plies {self.plies}: 0, 1 or 2; deeper takes minutes for a decision")
        if self.top is not None and (self.top < 2 or self.plies == 0):
            raise ValueError(
                f"top {self.top} at {self.plies} plies: top says how many plays, at least 2, are "
                f"valued at 1 or 2 plies"
            )

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.games // self.games_per_shard)


Watch = Callable[[int, int, int], None]
"""Told of progress: shards done, shards in all, decisions in them."""


def label_games(
    folder: Path, config: LabelConfig, *, processes: int = 1, watch: Watch | None = None
) -> Path:
    """Plays games and writes their decisions to a folder, one file for so many games.

    Files that are there already are kept, so that an interrupted run goes on where it stopped. A
    game depends on the seed and its number only, not on who plays it. `read_decisions` reads the
    folder.

    Args:
        folder: where to write.
        config: what to play.
        processes: how many work at a time.
        watch: told of progress.

    Returns:
        The folder.

    Raises:
        RuntimeError: gnubg-nn is not installed.
        ValueError: the folder holds labels of another config.
    """
    import_gnubg_nn()
    _claim(folder, config)
    counts = {
        shard: _count(folder, shard)
        for shard in range(config.shards)
        if _file(folder, shard).is_file()
    }
    tell = watch or (lambda *_: None)
    tell(len(counts), config.shards, sum(counts.values()))
    missing = [shard for shard in range(config.shards) if shard not in counts]
    for shard, decisions in _each(missing, folder, config, processes):
        counts[shard] = decisions
        tell(len(counts), config.shards, sum(counts.values()))
    return folder


def play_game(config: LabelConfig, game: int) -> Decisions:
    """One game, with its decisions; those of a game without a choice are none.

    Args:
        config: what to play.
        game: its number, from 0.

    Raises:
        RuntimeError: gnubg-nn is not installed.
    """
    return _gather(_decide(config, game))


def rank(
    board: Int8[np.ndarray, "2 25"] | list[list[int]],
    dice: tuple[int, int],
    *,
    plies: int = 0,
    top: int | None = None,
) -> list[tuple[str, float, int]]:
    """Every legal play of a decision with at least two, best first: key, equity and depth.

    The key is turned for the next player; `position_id.decode_keys` reads it. Those looked at
    deeper come first.

    Args:
        board: [opponent, mover].
        dice: what the mover rolled.
        plies: how deep to look.
        top: look that deep only at so many plays, the best by 0 plies; all if not said.

    Raises:
        RuntimeError: gnubg-nn is not installed.
        ValueError: there is no choice, whose value gnubg-nn does not give.
    """
    nn = import_gnubg_nn()
    rows = nn.best_move(_lists(board), *dice, 0, b"X", 0, 0, 1)[1]
    if len(rows) < 2:
        raise ValueError(
            f"dice {dice[0]} and {dice[1]} leave {len(rows)} plays; gnubg-nn values only a choice"
        )
    if plies == 0:
        return [(key, equity, 0) for key, _, _, equity in rows]
    deep = []
    for key, *_ in rows[:top]:
        win, gammon, backgammon, lose_gammon, lose_backgammon = nn.probabilities(
            [list(side) for side in nn.board_from_position_key(key)], plies
        )  # of the next player
        equity = 1 - 2 * win - gammon - backgammon + lose_gammon + lose_backgammon
        deep.append((key, equity, plies))
    deep.sort(key=lambda play: -play[1])
    return deep + [(key, equity, 0) for key, _, _, equity in rows[len(deep) :]]


def best_final(
    board: Int8[np.ndarray, "2 25"], dice: tuple[int, int], *, plies: int = 0
) -> Int8[np.ndarray, "2 25"]:
    """The position after gnubg's play, still [opponent, mover].

    At 1 and 2 plies it looks deeper only at the plays it likes at 0 plies, as gnubg plays.

    Args:
        board: [opponent, mover].
        dice: what the mover rolled.
        plies: how deep to look.

    Raises:
        RuntimeError: gnubg-nn is not installed.
    """
    nn = import_gnubg_nn()
    key = nn.best_move(_lists(board), *dice, plies, b"X", 1, 0, 0)[1]
    mover, opponent = nn.board_from_position_key(key)
    return np.array([opponent, mover], dtype=np.int8)


def import_gnubg_nn() -> Any:
    """The package gnubg-nn.

    Raises:
        RuntimeError: it is not installed; says how to.
    """
    try:
        import gnubg_nn
    except ImportError as error:
        raise RuntimeError(
            "gnubg's nets are not installed; pip install gnubg-nn (GPL, optional), or take another "
            "expert, such as a file of human decisions"
        ) from error
    return gnubg_nn


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decision:
    """A decision by keys, each [opponent, player on roll] of who is on roll in it."""

    game: int
    before: str
    dice: tuple[int, int]
    plays: list[tuple[str, float, int]]


def _decide(config: LabelConfig, game: int) -> list[_Decision]:
    """Plays one game and keeps the decisions that were none by force."""
    nn = import_gnubg_nn()
    # Of their own, so that the dice do not change with the share of random plays.
    random = np.random.default_rng([config.seed, game, 2**31])
    board = _lists(start())
    key = nn.key_of_board(board)
    decisions: list[_Decision] = []
    for dice in _rolls(config.seed, game):
        legal = nn.moves(board, *dice)
        if len(legal) >= 2:
            plays = rank(board, dice, plies=config.plies, top=config.top)
            decisions.append(_Decision(game=game, before=key, dice=dice, plays=plays))
            wild = random.random() < config.random_share
            key = plays[random.integers(len(plays)) if wild else 0][0]
        else:  # `legal` holds a key of the mover's view, and nothing if no man can move
            opponent, mover = nn.board_from_position_key(legal[0]) if legal else board
            key = nn.key_of_board([list(mover), list(opponent)])
        board = [list(side) for side in nn.board_from_position_key(key)]
        if not any(board[0]):
            return decisions
    raise AssertionError("a game has no last turn")


def _rolls(seed: int, game: int) -> Iterator[tuple[int, int]]:
    for block in count():
        yield from map(tuple, game_dice(seed, game, block).tolist())


def _gather(decisions: list[_Decision]) -> Decisions:
    """Decisions as arrays, their plays in the order of keys."""
    ordered = [sorted(decision.plays) for decision in decisions]
    best = [
        [key for key, _, _ in plays].index(decision.plays[0][0])
        for plays, decision in zip(ordered, decisions, strict=True)
    ]
    plays = [play for every in ordered for play in every]
    keys = [key for key, _, _ in plays]
    return Decisions(
        before=_boards([decision.before for decision in decisions]),
        dice=np.array([decision.dice for decision in decisions], np.int8).reshape(-1, 2),
        finals=_boards(keys)[:, ::-1],  # back to the mover's view
        lengths=np.array([len(plays) for plays in ordered], np.int32),
        chosen=np.array(best, np.int32),
        equities=np.array([equity for _, equity, _ in plays], np.float32),
        plies=np.array([depth for _, _, depth in plays], np.int8),
        game=np.array([decision.game for decision in decisions], np.int32),
    )


def _each(
    shards: list[int], folder: Path, config: LabelConfig, processes: int
) -> Iterator[tuple[int, int]]:
    """Makes the shards, and says of each as it is done how many decisions it has."""
    if processes == 1 or len(shards) < 2:
        yield from ((shard, _make_shard(folder, config, shard)) for shard in shards)
        return
    with workers(min(processes, len(shards))) as pool:
        running = {pool.submit(_make_shard, folder, config, shard): shard for shard in shards}
        for done in as_completed(running):
            yield running[done], done.result()


def _make_shard(folder: Path, config: LabelConfig, shard: int) -> int:
    first = shard * config.games_per_shard
    games = range(first, min(first + config.games_per_shard, config.games))
    made = _gather([one for game in games for one in _decide(config, game)])
    made.save(_file(folder, shard), metadata={"labels": json.dumps(asdict(config))})
    return len(made)


def _claim(folder: Path, config: LabelConfig) -> None:
    """Makes the folder of this config, or refuses one of another."""
    folder.mkdir(parents=True, exist_ok=True)
    file, mine = folder / LABELS, asdict(config)
    if not file.is_file() and any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds .safetensors files but no {LABELS}; name an empty folder")
    theirs = json.loads(file.read_text()) if file.is_file() else mine
    differing = [name for name in mine if theirs.get(name) != mine[name]]
    # More games only add files, if those that are there are full.
    grown = differing == ["games"] and mine["games"] > theirs["games"]
    if differing and not (grown and theirs["games"] % config.games_per_shard == 0):
        said = ", ".join(f"{name} {theirs.get(name)} instead of {mine[name]}" for name in differing)
        raise ValueError(
            f"{folder} holds labels of another config: {said}; ask for the same, or name another "
            f"folder"
        )
    partial = file.with_name(f"{LABELS}.{os.getpid()}.part")
    partial.write_text(json.dumps(mine, indent=2) + "\n")
    partial.replace(file)


def _count(folder: Path, shard: int) -> int:
    from safetensors import safe_open

    with safe_open(_file(folder, shard), framework="numpy") as opened:
        return opened.get_slice("lengths").get_shape()[0]


def _file(folder: Path, shard: int) -> Path:
    return folder / f"games-{shard:05d}.safetensors"


def _boards(keys: list[str]) -> Int8[np.ndarray, "n 2 25"]:
    return decode_keys(keys) if keys else np.zeros((0, 2, 25), np.int8)


def _lists(board: Any) -> list[list[int]]:
    """A board as gnubg-nn takes it."""
    return np.asarray(board).tolist()


__all__ = ["LabelConfig", "best_final", "import_gnubg_nn", "label_games", "play_game", "rank"]
