"""What a net is worth: agreement and regret on games it never saw, points, and its experts' phases.

Shapes: `categories experts` for loads.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Int, Int8
from moefold_backgammon.board import CATEGORIES, categories
from moefold_backgammon.judging import judge_by_people
from moefold_backgammon.match import MatchConfig, play_match
from moefold_backgammon.match_record import MatchResult
from moefold_backgammon.net import groups_of, load_net, player_of
from moefold_backgammon.players import GnubgNNPlayer, Player, PubEvalPlayer, best_of_each

from moefold import record_routing
from moefold.preference import Groups, PreferenceModel, agreement, by_category, regret
from studies.backgammon.data import held_out, people
from studies.backgammon.settings import ARMS, Run, Settings
from studies.backgammon.training import WEIGHTS, place
from studies.files import write_json

VERDICT, STRENGTH = "verdict.json", "strength.json"
DICE = 11
"""Seed of the dice of every match, which no label has."""


@final
class PlayerWhoRemembers:
    """A net that is shown the position before the play too.

    Args:
        model: what values plays.
        name: what it is called in results.
    """

    def __init__(self, model: PreferenceModel, name: str = "net") -> None:
        self.name = name
        self._model = model

    def choose(
        self,
        before: Int8[np.ndarray, "n 2 25"],
        dice: Int8[np.ndarray, "n 2"],
        finals: Int8[np.ndarray, "m 2 25"],
        lengths: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " n"]:
        """The play with the highest value, the first of equals."""
        groups = Groups(
            candidates=torch.from_numpy(np.ascontiguousarray(finals)).flatten(1),
            lengths=torch.from_numpy(lengths.astype(np.int64)),
            context=torch.from_numpy(np.ascontiguousarray(before)).flatten(1),
        )
        return best_of_each(self._model.values(groups).numpy(), lengths)


def judge(settings: Settings, output: Path, run: Run, people_file: Path) -> None:
    """Judges one net and writes what was found."""
    arm, model = ARMS[run.arm], load_net(place(output, run) / WEIGHTS)
    player: Player = PlayerWhoRemembers(model) if arm.sees_before else player_of(model)
    test = held_out(output, "test")
    groups = groups_of(test, by_equity=True, with_before=arm.sees_before)
    values = model.values(groups)
    hits, lost = agreement(values, groups), regret(values, groups)
    match = play_match(player, PubEvalPlayer(), MatchConfig(pairs=settings.pairs, seed=DICE))
    found: dict[str, Any] = {
        "agreement": by_game(hits.numpy(), test.game),
        "regret": by_game(lost.numpy(), test.game),
        "by_category": {k: v["mean"] for k, v in by_category(hits, groups).items()},
        "points": match.points.mean(1).tolist(),
        "won": float((match.points > 0).mean()),
    }
    if not run.games:
        human, _ = people(people_file, settings)
        found["people"] = judge_by_people(player, human, held_out=settings.people[0]).to_dict()
    if "num_experts" in arm.net:
        found["phases"] = phases(model, groups, categories(test.before))
    write_json(place(output, run) / VERDICT, found)


def judge_strength(settings: Settings, output: Path, run: Run) -> None:
    """More games of the strongest net, against PubEval and gnubg's nets, and theirs."""
    net = player_of(load_net(place(output, run) / WEIGHTS))
    config = MatchConfig(pairs=settings.last_pairs, seed=DICE + 1)
    folder = place(output, run)
    players: dict[str, tuple[Player, Player]] = {
        "net against PubEval": (net, PubEvalPlayer()),
        "net against gnubg-nn 0-ply": (net, GnubgNNPlayer()),
        "gnubg-nn 0-ply against PubEval": (GnubgNNPlayer(), PubEvalPlayer()),
    }
    found = {
        name: told(
            play_match(one, other, config, results=folder / f"{name.replace(' ', '-')}.jsonl")
        )
        for name, (one, other) in players.items()
    }
    write_json(folder / STRENGTH, found)


def by_game(values: np.ndarray, game: np.ndarray) -> list[float]:
    """A number for each game, whose mean is that of the decisions.

    Decisions of one game are not independent of each other; games are.
    """
    _, place = np.unique(game, return_inverse=True)
    sums = np.bincount(place, values)
    return (sums * len(sums) / len(values)).tolist()


def told(match: MatchResult) -> dict[str, Any]:
    """A match as plain data."""
    return {
        "games": match.games,
        "points": asdict(match.points_per_game),
        "won": asdict(match.wins),
    }


def phases(model: PreferenceModel, groups: Groups, kinds: Int8[np.ndarray, " n"]) -> dict[str, Any]:
    """Which experts are chosen in which kind of position, and how much the choice says of it.

    Args:
        model: with experts in it.
        groups: decisions.
        kinds: of each decision, an index into `CATEGORIES`.

    Returns:
        `load`: for each kind of position the share of plays that each expert has; `information`:
        what the expert says of the kind, as a share of what there is to know.
    """
    rows = {}
    for number, name in enumerate(CATEGORIES):
        mask = torch.from_numpy(kinds == number)
        if not mask.any():
            continue
        with record_routing(model) as record:
            model.values(groups.take(mask))
        routings = [routing for site in record for routing in record[site]]
        counted: Any = sum(routing.rows_per_expert for routing in routings)
        rows[name] = counted.numpy().astype(float)
    table = np.array(list(rows.values()))
    return {
        "load": {name: (row / row.sum()).tolist() for name, row in rows.items()},
        "positions": {name: int(row.sum()) for name, row in rows.items()},
        "information": information(table),
    }


def information(table: np.ndarray) -> float:
    """Mutual information of rows and columns as a share of the entropy of rows.

    Args:
        table: counts, `[categories, experts]`.
    """
    joint = table / table.sum()
    row, column = joint.sum(1), joint.sum(0)
    there = joint > 0
    shared = float((joint[there] * np.log(joint[there] / np.outer(row, column)[there])).sum())
    entropy = -float((row[row > 0] * np.log(row[row > 0])).sum())
    return shared / entropy if entropy else math.nan
