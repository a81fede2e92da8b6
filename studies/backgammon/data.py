"""The games of gnubg's nets that are learnt from and judged by, and people's decisions."""

from pathlib import Path

import numpy as np
from moefold_backgammon.decisions import Decisions, read_decisions
from moefold_backgammon.gnubg_nn_expert import LabelConfig, label_games
from moefold_backgammon.human import HumanDecisions, read_human

from studies.backgammon.settings import Run, Settings

SEEDS = {"labels": 0, "test": 1, "tuning": 2}
"""Of the dice: no game is both learnt from and judged by."""


def prepare(settings: Settings, output: Path, processes: int) -> None:
    """Plays the games that are not there yet."""
    held_out = {"test": settings.test, "tuning": settings.tuning[2]}
    for name, games in {**held_out, "labels": settings.most_games}.items():
        config = LabelConfig(
            games=games,
            games_per_shard=min(250, min(n for n, _ in settings.games)),
            random_share=settings.random_share,
            seed=SEEDS[name],
        )
        label_games(
            output / name,
            config,
            processes=processes,
            watch=lambda done, of, n, name=name: print(
                f"{name}: {done} of {of} files, {n:,} decisions", flush=True
            ),
        )


def to_learn_from(settings: Settings, output: Path, games: int, seed: int) -> Decisions:
    """So many games; of another seed other ones, as long as there are enough."""
    first = seed * games if (seed + 1) * games <= settings.most_games else 0
    return games_of(output / "labels", first, games)


def games_of(folder: Path, first: int, games: int) -> Decisions:
    """Games by their numbers, of which only the files are read that hold them."""
    files = sorted(folder.glob("*.safetensors"))
    whole = read_decisions(files[:1])
    shard = int(whole.game.max()) + 1 - int(whole.game.min())
    wanted = files[first // shard : -(-(first + games) // shard)]
    found = read_decisions(wanted)
    return found.part((found.game >= first) & (found.game < first + games))


def held_out(output: Path, name: str) -> Decisions:
    """The games to judge by: "test" or "tuning"."""
    return read_decisions(output / name)


def people(file: Path, settings: Settings) -> tuple[HumanDecisions, np.ndarray]:
    """All decisions of the file, and which of them are held out."""
    human = read_human(file)
    return human, human.held_out(settings.people[0])


def decisions_of(run: Run, settings: Settings, output: Path) -> Decisions:
    """What a run learns from, if it is gnubg's nets."""
    return to_learn_from(settings, output, run.games, run.seed)
