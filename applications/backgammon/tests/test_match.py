"""Matches: the same dice for both sides, nothing lost and nothing counted twice."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moefold_backgammon.board import start, swapped, winner_points
from moefold_backgammon.dice import BLOCK, game_dice
from moefold_backgammon.match import MatchConfig, play_match
from moefold_backgammon.match_record import MatchFile, MatchResult
from moefold_backgammon.players import NetPlayer, RandomPlayer
from moefold_backgammon.plays import plays

HEAD = '{"match": {"first": "careful", "second": "runner", "seed": 0}}\n'
PAIR = '{"pair": 0, "points": [1, -1]}\n'

HOME_FIRST = np.append(-np.arange(1.0, 25), -40)


def runner():
    """Brings its men home and takes no care."""
    return NetPlayer(lambda boards: boards[:, 1] @ HOME_FIRST, name="runner")


def careful():
    """Dislikes single men, and sends men of the other side back."""

    def value(boards):
        single = (boards[:, 1, :24] == 1).sum(1)
        return boards[:, 1] @ HOME_FIRST - 6 * single + 30.0 * boards[:, 0, 24]

    return NetPlayer(value, name="careful")


class Interrupted:
    """A player that is stopped after so many questions."""

    def __init__(self, player, questions):
        self.name = player.name
        self.player = player
        self.left = questions

    def choose(self, *asked):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.player.choose(*asked)


def one_game(players, seed, pair):
    """A game played turn by turn: the slow twin; points of `players[0]`, who begins."""
    board = start()
    for turn in range(1000):
        dice = game_dice(seed, pair, turn // BLOCK)[turn % BLOCK]
        finals, lengths = plays(board[None], dice[None])
        if len(finals):
            board = finals[players[turn % 2].choose(board[None], dice[None], finals, lengths)[0]]
        points = int(winner_points(board[None])[0])
        if points:
            return points if turn % 2 == 0 else -points
        board = swapped(board[None])[0]
    raise AssertionError


def test_games_side_by_side_are_the_games_one_by_one():
    first, second = careful(), runner()
    result = play_match(first, second, MatchConfig(pairs=6, pairs_at_once=4, seed=5))
    slow = [
        [one_game((first, second), 5, pair), -one_game((second, first), 5, pair)]
        for pair in range(6)
    ]
    assert result.points.tolist() == slow


def test_a_player_against_itself_gets_nothing_in_every_pair():
    # The same dice and the same play, once from either side.
    result = play_match(careful(), careful(), MatchConfig(pairs=40))
    assert (result.points.sum(axis=1) == 0).all()
    assert result.points_per_game.mean == 0
    assert result.standard_error == 0
    assert (result.points != 0).all()


def test_the_sides_swapped_give_the_opposite():
    one = play_match(careful(), runner(), MatchConfig(pairs=40))
    other = play_match(runner(), careful(), MatchConfig(pairs=40))
    assert (one.points == -other.points[:, ::-1]).all()
    assert one.points_per_game.mean > 0.2


def test_care_beats_chance_often_by_a_gammon():
    result = play_match(careful(), RandomPlayer(), MatchConfig(pairs=50))
    assert result.wins.mean > 0.9
    assert set(np.unique(abs(result.points))) == {1, 2, 3}
    assert result.points_per_game.mean > 1.5


def test_points_and_interval_by_hand():
    # Means of the pairs: 1.5, -1, 0.5, 0; together 0.25, with squared distances 1.5625, 1.5625,
    # 0.0625, 0.0625, so a variance of 3.25 / 3 and a standard error of sqrt(3.25 / 12).
    points = np.array([[2, 1], [-1, -1], [-1, 2], [3, -3]], np.int8)
    result = MatchResult(first="a", second="b", points=points)
    assert result.games == 8
    error = math.sqrt(3.25 / 12)
    assert result.standard_error == pytest.approx(error)
    interval = result.points_per_game
    assert interval.mean == 0.25
    assert interval.high - interval.mean == pytest.approx(1.959964 * error)
    assert result.wins.mean == 0.5
    assert result.gammons.mean == 3 / 8
    assert str(result) == (
        "a against b: +0.250 points per game (-0.770 to +1.270), 50.0 % of 8 games won"
    )


def test_one_pair_has_no_interval():
    result = MatchResult(first="a", second="b", points=np.array([[1, 1]], np.int8))
    assert result.points_per_game.low == -math.inf


@pytest.mark.parametrize("letters", [0, 1, 20, len(HEAD) - 1, len(HEAD), len(HEAD) + 9])
def test_a_file_that_was_cut_off_anywhere_is_taken_up(tmp_path, letters):
    file = tmp_path / "match.jsonl"
    file.write_text((HEAD + PAIR)[:letters])
    play_match(careful(), runner(), MatchConfig(pairs=1), results=file)
    assert len(file.read_text().splitlines()) == 2
    assert file.read_text().startswith(HEAD)


@pytest.mark.parametrize("questions", [0, 30, 90, 150])
def test_an_interrupted_match_goes_on_and_ends_as_if_it_had_not_been(tmp_path, questions):
    config = MatchConfig(pairs=12, pairs_at_once=5, seed=2)
    whole = play_match(careful(), runner(), config)
    file = tmp_path / "match.jsonl"
    with pytest.raises(KeyboardInterrupt):
        play_match(Interrupted(careful(), questions), runner(), config, results=file)
    before = file.read_bytes()
    told = []
    result = play_match(
        careful(), runner(), config, results=file, watch=lambda done, of: told.append((done, of))
    )
    assert (result.points == whole.points).all()
    assert file.read_bytes().startswith(before)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["pair"] for line in lines[1:]) == list(range(12))
    assert told[0] == (len(before.splitlines()) - 1, 12)
    assert told[-1] == (12, 12)


def test_a_finished_match_is_not_played_again_and_can_be_made_longer(tmp_path):
    file = tmp_path / "match.jsonl"
    play_match(careful(), runner(), MatchConfig(pairs=3), results=file)
    written = file.read_bytes()
    again = play_match(Interrupted(careful(), 0), runner(), MatchConfig(pairs=3), results=file)
    assert file.read_bytes() == written
    longer = play_match(careful(), runner(), MatchConfig(pairs=5), results=file)
    assert (longer.points[:3] == again.points).all()
    assert (longer.points == play_match(careful(), runner(), MatchConfig(pairs=5)).points).all()


def test_a_line_that_was_cut_off_is_played_again(tmp_path):
    file = tmp_path / "match.jsonl"
    whole = play_match(careful(), runner(), MatchConfig(pairs=4), results=file)
    file.write_bytes(file.read_bytes()[:-6])
    result = play_match(careful(), runner(), MatchConfig(pairs=4), results=file)
    assert (result.points == whole.points).all()
    assert len(file.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (
            HEAD.replace('"seed": 0', '"seed": 7'),
            'of another match: .*"seed": 7.* instead of .*: 0',
        ),
        (HEAD.replace("runner", "pubeval"), '"second": "pubeval".* instead of .*"runner"'),
        (HEAD + PAIR + PAIR, "line 3 of .* holds pair 0 a second time"),
        (HEAD + "points\n" + PAIR, "line 2 of .* is not of a match: b'points'"),
        (HEAD + PAIR.replace("-1]", "-1, 2]"), "line 2 of .* is not of a match"),
        ("{}\n", "line 1 of .* is not of a match"),
        ("a letter to my mother", "line 1 of .* is not of a match: b'a letter"),
        ('{"name": 3}\nwithout end', "line 1 of .* is not of a match"),
    ],
)
def test_a_file_that_is_not_of_this_match_is_refused_and_left(tmp_path, written, says):
    file = tmp_path / "match.jsonl"
    file.write_text(written)
    with pytest.raises(ValueError, match=says):
        play_match(careful(), runner(), MatchConfig(pairs=1), results=file)
    assert file.read_text() == written


def test_two_matches_do_not_write_to_one_file(tmp_path):
    file = tmp_path / "match.jsonl"
    match = {"first": "careful", "second": "runner", "seed": 0}
    with (
        MatchFile(file, match),
        pytest.raises(RuntimeError, match=r"another match is being written to .*match\.jsonl"),
    ):
        play_match(careful(), runner(), MatchConfig(pairs=1), results=file)


def test_a_pair_is_not_counted_twice():
    with MatchFile(None, {}) as record:
        record.add({3: (1, 1)})
        with pytest.raises(ValueError, match="pair 3 has been counted before"):
            record.add({2: (1, 1), 3: (-1, -1)})
        assert record.points == {3: (1, 1)}


def test_a_play_that_there_is_not_is_refused():
    class Beyond:
        name = "beyond"

        def choose(self, before, dice, finals, lengths):
            return lengths

    with pytest.raises(RuntimeError, match=r"beyond chose play (\d+) of \1"):
        play_match(Beyond(), runner(), MatchConfig(pairs=1))


def test_no_games_are_no_match():
    with pytest.raises(ValueError, match="0 pairs, 1024 at once"):
        MatchConfig(pairs=0)


def test_dice_are_fair_and_no_doublet_opens():
    rolls = np.stack([game_dice(0, game) for game in range(600)])
    assert rolls.shape == (600, BLOCK, 2)
    assert (rolls[:, 0, 0] != rolls[:, 0, 1]).all()
    faces = np.bincount(rolls[:, 1:].ravel(), minlength=7)[1:] / rolls[:, 1:].size
    # 152,400 dice: the standard error of a share of a sixth is 0.00095; five of them.
    assert abs(faces - 1 / 6).max() < 0.005
    doublets = (rolls[:, 1:, 0] == rolls[:, 1:, 1]).mean()
    assert abs(doublets - 1 / 6) < 0.007  # 76,200 rolls
    opening = {tuple(roll) for roll in rolls[:, 0].tolist()}
    assert len(opening) == 30  # 600 draws miss one of 30 once in 20 million times


def test_blocks_and_games_have_dice_of_their_own():
    some = [game_dice(0, 0), game_dice(0, 0, 1), game_dice(0, 1), game_dice(1, 0)]
    for at, one in enumerate(some):
        assert (game_dice(0, 0) == some[0]).all()
        # Two unrelated blocks agree in one roll of 36.
        assert all((one == other).all(axis=1).mean() < 0.15 for other in some[at + 1 :])


@pytest.mark.slow
def test_gnubgs_nets_against_pubeval(tmp_path: Path):
    pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    from moefold_backgammon.players import GnubgNNPlayer, PubEvalPlayer

    result = play_match(GnubgNNPlayer(), PubEvalPlayer(), MatchConfig(pairs=2000))
    # Published: +0.63 of 40,000 games; measured with gnubg's own move generator: +0.645, standard
    # error 0.021. Three standard errors of the difference.
    assert abs(result.points_per_game.mean - 0.645) < 3 * math.hypot(0.021, result.standard_error)
