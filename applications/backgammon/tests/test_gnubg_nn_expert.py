"""Labels from gnubg's nets."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from moefold_backgammon.board import start, swapped, winner_points
from moefold_backgammon.decisions import read_decisions
from moefold_backgammon.dice import game_dice
from moefold_backgammon.gnubg_nn_expert import LabelConfig, label_games, play_game, rank
from moefold_backgammon.plays import plays

gnubg_nn = pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")


@pytest.fixture(scope="module")
def game():
    return play_game(LabelConfig(games=1), 0)


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in one.__slots__)


def test_every_legal_play_is_there_once(game):
    finals, lengths = plays(game.before, game.dice)
    assert lengths.tolist() == game.lengths.tolist()
    for at, length in zip(game.starts, game.lengths, strict=True):
        ours = {board.tobytes() for board in finals[at : at + length]}
        theirs = {board.tobytes() for board in game.finals[at : at + length]}
        assert ours == theirs
        assert len(theirs) == length


def test_the_chosen_play_has_the_highest_equity(game):
    best = np.maximum.reduceat(game.equities, game.starts)
    assert game.equities[game.starts + game.chosen].tolist() == best.tolist()
    assert (game.lengths >= 2).all()


def test_equities_are_the_movers(game):
    # Asked for each position by itself, of the player who is on roll next.
    for at in range(0, len(game.finals), 7):
        turned = swapped(game.finals[at][None])[0].tolist()
        win, gammon, backgammon, lose_gammon, lose_backgammon = gnubg_nn.probabilities(turned, 0)
        theirs = 2 * win - 1 + gammon + backgammon - lose_gammon - lose_backgammon
        assert game.equities[at] == pytest.approx(-theirs, abs=1e-5)  # float32, five terms


def test_the_place_of_a_play_says_nothing_about_its_value():
    some = [play_game(LabelConfig(games=1), number) for number in range(1, 9)]
    place = np.concatenate([one.chosen / (one.lengths - 1) for one in some])
    # Best first would give 0. The standard error of a mean of 350 even draws is 0.02; the order of
    # keys is not even, but far from either end.
    assert 0.25 < place.mean() < 0.75


def test_the_game_can_be_played_again_from_its_dice_and_decisions():
    # Decisions leave out forced plays; with the dice of the game they can all be filled in.
    quiet = play_game(LabelConfig(games=1, random_share=0, seed=4), 0)
    board, decision = start(), 0
    for dice in np.concatenate([game_dice(4, 0), game_dice(4, 0, 1)]):
        finals, lengths = plays(board[None], dice[None])
        if lengths[0] > 1:
            assert (quiet.before[decision] == board).all()
            assert (quiet.dice[decision] == dice).all()
            board = quiet.finals[quiet.starts[decision] + quiet.chosen[decision]]
            decision += 1
        elif lengths[0] == 1:
            board = finals[0]
        if winner_points(board[None])[0]:
            break
        board = swapped(board[None])[0]
    assert decision == len(quiet)
    assert winner_points(board[None])[0] > 0


def test_some_plays_are_drawn_at_random_but_not_the_labels():
    wild = play_game(LabelConfig(games=1, random_share=1), 0)
    best = np.maximum.reduceat(wild.equities, wild.starts)
    assert wild.equities[wild.starts + wild.chosen].tolist() == best.tolist()
    made = wild.finals[wild.starts + wild.chosen]
    follows = (swapped(made)[:-1] == wild.before[1:]).all(axis=(1, 2))
    assert follows.mean() < 0.4


def test_deeper_values_come_first_and_decide(game):
    # Ahead or behind by half a point, so that the value of the wrong side would be far off.
    best = abs(game.equities[game.starts + game.chosen])
    at = int(np.argmin(abs(best - 0.5) + (game.lengths < 6)))
    dice = (int(game.dice[at, 0]), int(game.dice[at, 1]))
    flat = {key: equity for key, equity, _ in rank(game.before[at], dice)}
    deep = rank(game.before[at], dice, plies=1, top=3)
    assert [depth for *_, depth in deep] == [1, 1, 1] + [0] * (len(flat) - 3)
    assert {key for key, *_ in deep} == flat.keys()
    assert deep[0][1] >= deep[1][1] >= deep[2][1]
    moved = [abs(equity - flat[key]) for key, equity, _ in deep[:3]]
    assert best[at] == pytest.approx(0.5, abs=0.2)
    assert 0 < max(moved) < 0.3  # one more ply moves an equity by 0.03 on average
    assert all(equity == flat[key] for key, equity, _ in deep[3:])


def test_an_interrupted_run_makes_what_is_missing(tmp_path):
    config = LabelConfig(games=5, games_per_shard=2)
    told = []
    label_games(tmp_path, config, watch=lambda *all_: told.append(all_))
    assert [done for done, _, _ in told] == [0, 1, 2, 3]
    whole = read_decisions(tmp_path)
    assert told[-1] == (3, 3, len(whole))
    assert sorted(set(whole.game.tolist())) == [0, 1, 2, 3, 4]
    kept = tmp_path / "games-00000.safetensors"
    kept_at = kept.stat().st_mtime_ns
    (tmp_path / "games-00001.safetensors").unlink()
    (tmp_path / "games-00001.safetensors.77.part").write_bytes(b"half a file")
    label_games(tmp_path, config)
    assert same(whole, read_decisions(tmp_path))
    assert kept.stat().st_mtime_ns == kept_at


def test_more_games_are_added_to_full_files_only(tmp_path):
    label_games(tmp_path, LabelConfig(games=2, games_per_shard=2))
    label_games(tmp_path, LabelConfig(games=3, games_per_shard=2))
    assert sorted(set(read_decisions(tmp_path).game.tolist())) == [0, 1, 2]
    with pytest.raises(ValueError, match="games 3 instead of 4"):
        label_games(tmp_path, LabelConfig(games=4, games_per_shard=2))


def test_a_folder_of_other_labels_is_refused(tmp_path):
    config = LabelConfig(games=1)
    label_games(tmp_path, config)
    with pytest.raises(
        ValueError, match=r"another config: random_share 0\.05 instead of 0\.1, seed"
    ):
        label_games(tmp_path, replace(config, random_share=0.1, seed=3))
    assert json.loads((tmp_path / "labels.json").read_text())["seed"] == 0


def test_several_processes_make_the_same_labels(tmp_path):
    config = LabelConfig(games=4, games_per_shard=2)
    label_games(tmp_path / "one", config)
    label_games(tmp_path / "two", config, processes=2)
    assert same(read_decisions(tmp_path / "one"), read_decisions(tmp_path / "two"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"games": 0}, "0 games in shards of 250: both must be positive"),
        ({"random_share": 5}, "random_share 5 is a share: from 0 to 1"),
        ({"plies": 3}, "plies 3: 0, 1 or 2"),
        ({"top": 8}, "top 8 at 0 plies"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        LabelConfig(**settings)


def test_a_forced_play_has_no_value(game):
    with pytest.raises(ValueError, match="dice 6 and 6 leave 0 plays"):
        rank(np.array([[2] * 6 + [3] + [0] * 18, [14, *[0] * 23, 1]]), (6, 6))


def test_without_gnubg_nn_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gnubg_nn", None)
    with pytest.raises(RuntimeError, match="pip install gnubg-nn"):
        label_games(tmp_path, LabelConfig(games=1))
