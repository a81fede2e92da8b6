"""Players: the highest value is chosen, within the decision."""

import numpy as np
import pytest

from moefold_backgammon.board import start
from moefold_backgammon.players import GnubgNNPlayer, NetPlayer, RandomPlayer, best_of_each
from moefold_backgammon.plays import plays

NOWHERE = np.zeros((2, 2, 25), np.int8)
NO_DICE = np.ones((2, 2), np.int8)


def test_the_best_is_found_within_each_decision_and_the_first_of_equals():
    #                  0    1    2  |  0  |  0    1    2
    scores = np.array([1.0, 3.0, 3.0, -9.0, 0.5, 0.2, 0.9])
    assert best_of_each(scores, np.array([3, 1, 3])).tolist() == [1, 0, 2]
    assert best_of_each(scores[:0], np.zeros(0, int)).tolist() == []


def test_a_net_chooses_what_it_values_most_however_many_at_a_time():
    finals = np.zeros((7, 2, 25), np.int8)
    finals[:, 1, 0] = [4, 9, 1, 7, 3, 2, 8]
    lengths = np.array([4, 3])
    for at_once in (1, 3, 100):
        asked = []

        def scorer(boards, asked=asked):
            asked.append(len(boards))
            return boards[:, 1, 0].astype(np.float32)

        player = NetPlayer(scorer, at_once=at_once)
        assert player.choose(NOWHERE, NO_DICE, finals, lengths).tolist() == [1, 2]
        assert max(asked) <= at_once
        assert sum(asked) == 7


def test_values_that_cannot_be_compared_are_refused():
    finals = np.zeros((4, 2, 25), np.int8)
    wrong = NetPlayer(lambda boards: np.full(len(boards), np.nan), name="mine")
    with pytest.raises(ValueError, match="mine gave 4 of 4 positions a value that is no finite"):
        wrong.scores(finals)
    column = NetPlayer(lambda boards: np.zeros((len(boards), 1)), name="mine")
    with pytest.raises(ValueError, match=r"shape \(4, 1\) to 4 positions"):
        column.scores(finals)


def test_chance_takes_every_play_as_often():
    lengths = np.tile([4, 1], 4000)
    chosen = RandomPlayer(1).choose(NOWHERE, NO_DICE, NOWHERE, lengths)
    assert (chosen[1::2] == 0).all()
    counts = np.bincount(chosen[::2], minlength=4)
    # 1,000 each are expected, with a standard deviation of 27; five of those never happen.
    assert abs(counts - 1000).max() < 137


def test_gnubgs_nets_open_as_everybody_does():
    pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    boards = np.stack([start()] * 2)
    dice = np.array([[3, 1], [6, 1]], np.int8)
    finals, lengths = plays(boards, dice)
    chosen = GnubgNNPlayer().choose(boards, dice, finals, lengths)
    made = finals[np.cumsum(lengths) - lengths + chosen]
    # 8/5 6/5 makes the 5 point, 13/7 8/7 the bar point.
    assert made[0, 1, [4, 5, 7]].tolist() == [2, 4, 2]
    assert made[1, 1, [6, 7, 12]].tolist() == [2, 2, 4]


def test_gnubgs_nets_say_when_their_play_is_not_offered():
    pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    boards, dice = start()[None], np.array([[3, 1]], np.int8)
    finals, _ = plays(boards, dice)
    others = finals[finals[:, 1, 4] != 2]
    with pytest.raises(RuntimeError, match=r"with \[3, 1\] on .* is not one of 15 plays"):
        GnubgNNPlayer().choose(boards, dice, others, np.array([len(others)]))


def test_without_gnubg_nn_the_player_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gnubg_nn", None)
    with pytest.raises(RuntimeError, match="pip install gnubg-nn"):
        GnubgNNPlayer()
