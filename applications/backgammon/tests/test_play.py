"""A person against a player, in the terminal."""

import numpy as np
import pytest

from moefold_backgammon.board import start
from moefold_backgammon.dice import game_dice
from moefold_backgammon.play import play_game, show_hint
from moefold_backgammon.players import NetPlayer
from moefold_backgammon.plays import plays

HOME = -(np.arange(1.0, 26) ** 2)
"""Brings the rearmost men home first."""


def net(sign=1):
    return NetPlayer(lambda boards: sign * boards[:, 1] @ HOME, name="runner")


class Person:
    """Types lines; after those, leaves, or asks for the plays and makes the first of them."""

    def __init__(self, *lines, then_play=False):
        self.lines = list(lines)
        self.then_play = then_play
        self.shown = []
        self.asked_at = None

    def write(self, text):
        self.shown += text.split("\n")

    def read(self, prompt):
        assert prompt == "> "
        if self.lines:
            return self.lines.pop(0)
        if not self.then_play:
            raise EOFError
        if self.asked_at is None:
            self.asked_at = len(self.shown)
            return "plays"
        first, self.asked_at = self.shown[self.asked_at], None
        return first


def opening_seed(dice):
    return next(seed for seed in range(500) if tuple(game_dice(seed, 0)[0]) == dice)


def play(person, **settings):
    settings = {"hints": net(), "seed": opening_seed((3, 1))} | settings
    return play_game(net(), read=person.read, write=person.write, **settings)


def test_an_illegal_play_is_refused_and_asked_again():
    person = Person("13/3", "8/5 6/5")
    assert play(person) is None
    roll = person.shown.index("your roll: 3 1")
    refused = person.shown[roll + 1]
    assert "13/3" in refused
    assert any("runner rolls" in line for line in person.shown[roll + 2 :])


def test_a_hint_orders_the_plays_by_the_net():
    boards, dice = start()[None], np.array([[3, 1]], np.int8)
    finals, _ = plays(boards, dice)
    values = net().scores(finals)
    lines = show_hint(start(), (3, 1), finals, net(), most=3)
    assert len(lines) == 3
    order = np.sort(values)[::-1]
    assert order[0] > order[1] > order[2]
    for place, line in enumerate(lines):
        assert line.split()[0] == str(place + 1)
        assert float(line.split()[-1]) == pytest.approx(order[place] - order[0], abs=0.005)
    person = Person("hint 3", "hint")
    play(person)
    assert person.shown[-8:-5] == lines  # then five more
    assert len(person.shown[-5:]) == 5


def test_without_a_net_there_is_no_hint():
    person = Person("hint")
    play(person, hints=None)
    assert "there is no net to ask for a hint" in person.shown[-1]


def test_help_says_what_can_be_typed_and_quit_leaves():
    person = Person("help", "", "board", "quit", "never read")
    assert play(person) is None
    assert person.lines == ["never read"]
    assert any("bar/22" in line for line in person.shown)


@pytest.mark.parametrize("game", [0, 1])
def test_a_whole_game_ends_with_its_points(game):
    person = Person(then_play=True)
    points = play(person, game=game, seed=3)
    assert points is not None
    assert points in {-3, -2, -1, 1, 2, 3}
    winner = "you win" if points > 0 else "runner wins"
    what = {1: "the game", 2: "a gammon", 3: "a backgammon"}[abs(points)]
    assert person.shown[-1] == f"{winner} {what}"
    first = next(line for line in person.shown if "roll" in line)
    assert first.startswith("your roll" if game == 0 else "runner rolls")


def test_both_sides_can_win():
    # The first play of a list is a poor one, but dice decide some games.
    games = (play(Person(then_play=True), game=game, seed=9) for game in range(40))
    signs = set()
    while len(signs) < 2:
        points = next(games)
        assert points is not None
        signs.add(points > 0)
