"""The net: its inputs, that it learns, is saved, plays; and the command line around it."""

from typing import Any

import numpy as np
import pytest
import torch

from moefold.preference import FitConfig, PreferenceConfig, agreement, fit
from moefold_backgammon.board import start
from moefold_backgammon.cli import main
from moefold_backgammon.decisions import Decisions
from moefold_backgammon.encoding import unary
from moefold_backgammon.net import (
    BoardScorer,
    groups_of,
    inputs,
    load_net,
    new_model,
    player_of,
    save_net,
)
from moefold_backgammon.players import best_of_each
from moefold_backgammon.plays import plays
from moefold_backgammon.pubeval import pubeval_scores


def decisions(games: int = 12, *, seed: int = 0) -> Decisions:
    """Games of PubEval against itself, whose choice is the label: no GPL tool is needed."""
    draw = np.random.default_rng(seed)
    boards = np.tile(start(), (games, 1, 1))
    parts = []
    for _ in range(30):
        dice = draw.integers(1, 7, (games, 2)).astype(np.int8)
        moves = plays(boards, dice)[1] > 0
        finals, lengths = plays(boards[moves], dice[moves])
        scores = pubeval_scores(boards[moves], finals, lengths)
        chosen = best_of_each(scores, lengths)
        kept = lengths > 1
        plays_kept = np.repeat(kept, lengths)
        part = [boards[moves][kept], dice[moves][kept], finals[plays_kept], lengths[kept]]
        parts.append([*part, chosen[kept], scores[plays_kept], np.flatnonzero(moves)[kept]])
        boards[moves] = finals[np.cumsum(lengths) - lengths + chosen]
        boards = np.ascontiguousarray(boards[:, ::-1])
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    names = ("before", "dice", "finals", "lengths", "chosen", "equities", "game")
    kinds = (np.int8, np.int8, np.int8, np.int32, np.int32, np.float32, np.int32)
    arrays = {n: c.astype(k) for n, c, k in zip(names, joined, kinds, strict=True)}
    return Decisions(**arrays, plies=np.zeros(len(arrays["finals"]), np.int8))


@pytest.fixture(scope="module")
def told() -> Decisions:
    return decisions()


def test_the_net_sees_the_unary_inputs(told):
    found = inputs(torch.from_numpy(told.finals).flatten(1)).numpy()
    assert np.array_equal(found, unary(told.finals))


def test_decisions_are_groups_with_games_and_phases(told):
    groups: Any = groups_of(told)
    assert len(groups) == len(told)
    assert set(groups.category) <= {"contact", "crashed", "race", "bear-off"}
    assert groups.split[0] == str(told.game[0])
    # PubEval takes the play it values most, so that its equities say what its choices say.
    by_equity = groups_of(told, by_equity=True)
    assert bool((by_equity.best | ~groups.best).all())


def test_it_learns_to_choose_as_its_expert(told, tmp_path):
    model, groups = new_model(16), groups_of(told)
    before = float(agreement(model.values(groups), groups).mean())
    fit(model, groups, FitConfig(epochs=12, batch_size=16, learning_rate=5e-3))
    after = float(agreement(model.values(groups), groups).mean())
    assert after > 0.6 > before + 0.2
    save_net(model, tmp_path / "net")
    again = load_net(tmp_path / "net")
    assert torch.equal(again.values(groups), model.values(groups))
    wanted = model.best(groups).numpy()
    chosen = player_of(again).choose(told.before, told.dice, told.finals, told.lengths)
    assert np.array_equal(chosen, wanted)


def test_the_command_line_trains_measures_and_plays(told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels").mkdir()
    told.save(tmp_path / "labels" / "0.safetensors")
    assert main(["train", "labels", "--output", "net", "--hidden", "4", "--epochs", "1"]) == 0
    assert f"learnt from {len(told):,} decisions; wrote net" in capsys.readouterr().out
    assert main(["evaluate", "net", "labels", "--results", "results.json"]) == 0
    assert f"in {len(told):,} decisions, regret" in capsys.readouterr().out
    assert (tmp_path / "results.json").is_file()
    match = ["match", "net", "random", "--pairs", "5", "--results", "match.jsonl"]
    assert main(match) == 0
    first = capsys.readouterr().out
    assert "net against random: " in first
    assert "of 10 games won" in first
    assert main(match) == 0  # nothing is played again
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["match", "nobody", "random"], "no player 'nobody': give a folder that train wrote"),
        (["evaluate", "nowhere", "labels"], "labels cannot be read as decisions"),
        (["train", "nowhere", "--output", "net"], "nowhere"),
        (["match", "random", "random", "--pairs", "0"], "0 pairs"),
    ],
)
def test_what_is_wrong_is_said(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_experts_and_the_position_before_are_kept_in_the_folder(told, tmp_path):
    groups: Any = groups_of(told, with_before=True)
    model = new_model(6, seed=3, sees_before=True, num_experts=3, over="context", bias=True)
    save_net(model, tmp_path / "net")
    again = load_net(tmp_path / "net")
    assert torch.equal(again.values(groups), model.values(groups))
    with pytest.raises(ValueError, match="is shown the position before the play, and this player"):
        player_of(again)
    with pytest.raises(ValueError, match="'board' has no setting 'depth'; it has hidden, num_exp"):
        new_model(6, depth=2)
    with pytest.raises(ValueError, match="boards of 49 numbers and contexts of 0: a board has 50"):
        BoardScorer(49)


def test_a_folder_of_another_model_is_no_net(tmp_path):
    save_net(PreferenceConfig(features=50).build(), tmp_path / "other")
    with pytest.raises(ValueError, match="holds a model that scores no boards; give a folder that"):
        load_net(tmp_path / "other")
    with pytest.raises(ValueError, match="holds no net of this package"):
        load_net(tmp_path)
