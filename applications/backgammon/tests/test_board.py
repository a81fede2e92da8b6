"""The board: turning it, points won, what is refused, the kinds of positions."""

import numpy as np
import pytest

from moefold_backgammon.board import (
    BEAR_OFF,
    CONTACT,
    CRASHED,
    OVER,
    RACE,
    categories,
    check,
    in_contact,
    men_off,
    rearmost,
    start,
    swapped,
    winner_points,
)
from random_positions import from_play, placed


def side(**points):
    """Men by own point: `side(p6=5, bar=1)`."""
    men = np.zeros(25, np.int8)
    for name, count in points.items():
        men[24 if name == "bar" else int(name[1:]) - 1] = count
    return men


def board(opponent, player):
    return np.stack([opponent, player])


ALL_HOME = side(p6=3, p5=3, p4=3, p3=2, p2=2, p1=2)


def test_the_game_begins_with_167_pips_for_each():
    pips = start() @ np.arange(1, 26)
    assert pips.tolist() == [167, 167]
    assert start().sum(axis=1).tolist() == [15, 15]


def test_turning_twice_changes_nothing():
    boards = placed(50, 0)
    assert (swapped(boards)[:, 0] == boards[:, 1]).all()
    assert (swapped(swapped(boards)) == boards).all()
    assert (swapped(boards[3]) == swapped(boards)[3]).all()


def test_men_off_and_the_rearmost():
    one = board(side(p6=3, bar=1), side(p3=2, p20=1))
    assert men_off(one).tolist() == [11, 12]
    assert rearmost(one).tolist() == [24, 19]
    assert rearmost(board(side(p1=1), side())).tolist() == [0, 24]


@pytest.mark.parametrize(
    ("opponent", "points"),
    [
        (side(p1=14), 1),
        (side(p1=15), 2),
        (side(p18=15), 2),  # the winner's 7 point: not yet its home
        (side(p1=14, p19=1), 3),  # the winner's 6 point
        (side(p1=14, bar=1), 3),
        (side(p1=13, p24=1), 1),  # one is off: no gammon, and so no backgammon
    ],
)
def test_points_of_the_winner(opponent, points):
    none = np.zeros(25, np.int8)
    assert winner_points(board(opponent, none)[None]).tolist() == [points]
    assert winner_points(board(opponent, side(p1=1))[None]).tolist() == [0]


@pytest.mark.parametrize(
    ("opponent", "player", "says"),
    [
        (side(p6=15), side(p6=16), r"more than the 15 men .*\{6:16\} = 16 men for the player"),
        (side(p6=9, bar=9), side(p6=5), r"more than the 15 men .*\{6:9, bar:9\} = 18 men"),
        (side(p6=5), side(p19=1), "men of both sides on one point"),
        (side(p6=-1), side(p6=1), "less than no men on a point"),
        (side(), side(), "no men; one side must have some left"),
    ],
)
def test_what_no_game_can_show_is_refused(opponent, player, says):
    good = start()
    with pytest.raises(ValueError, match=f"board 1 has {says}"):
        check(np.stack([good, board(opponent, player)]))


def test_what_games_show_is_not_refused():
    check(from_play(4000, 1))
    check(board(side(bar=2), side(bar=3))[None])  # both on the bar
    check(board(side(), side(p1=1))[None])


@pytest.mark.parametrize(
    ("opponent", "player", "kind"),
    [
        (start()[0], start()[1], CONTACT),
        (ALL_HOME, ALL_HOME, BEAR_OFF),
        (ALL_HOME, side(p7=1), RACE),
        (side(), ALL_HOME, OVER),
        # Mine on my 13, his on his 11, my 14: he is past me by a point, or not.
        (side(p11=7), side(p13=7), RACE),
        (side(p12=7), side(p13=7), CONTACT),
        (side(p12=7), side(p13=6), CRASHED),
        # Buried: 2 on the ace point, then one of 2 on the 2 point; 6 of 9 are left.
        (side(p12=7), side(p13=5, p2=2, p1=2), CRASHED),
        (side(p12=7), side(p13=6, p2=2, p1=2), CONTACT),
        (side(p12=7), side(p13=5, p2=1, p1=1), CONTACT),  # none is buried
    ],
)
def test_kinds_of_positions(opponent, player, kind):
    both = np.stack([board(opponent, player), board(player, opponent)])
    assert categories(both).tolist() == [kind, kind]
    assert in_contact(both).tolist() == [kind in (CONTACT, CRASHED)] * 2


def test_kinds_are_those_of_gnubg():
    gnubg_nn = pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    boards = np.concatenate([from_play(2000, 2), placed(2000, 3)])
    theirs = np.array([gnubg_nn.classify(one) for one in boards.tolist()])
    # 1 and 2 are its two tables of bear-offs: of both sides, of one.
    names = {0: OVER, 1: BEAR_OFF, 2: BEAR_OFF, 3: RACE, 4: CRASHED, 5: CONTACT}
    assert categories(boards).tolist() == [names[kind] for kind in theirs.tolist()]
    assert set(theirs) >= {2, 3, 4, 5}
