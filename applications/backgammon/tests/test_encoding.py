"""Inputs for nets, by hand."""

import numpy as np
import pytest

from moefold_backgammon.board import start, swapped
from moefold_backgammon.encoding import PUBEVAL, UNARY, pubeval_inputs, unary
from random_positions import placed


def side(**points):
    men = np.zeros(25, np.int8)
    for name, count in points.items():
        men[24 if name == "bar" else int(name[1:]) - 1] = count
    return men


def nonzero(inputs):
    return {int(at): float(inputs[at]) for at in np.flatnonzero(inputs)}


def test_unary_by_hand():
    board = np.stack([side(p1=1, bar=3), side(p2=2, p24=6)])
    assert nonzero(unary(board[None])[0]) == {
        0: 1.0,  # the opponent's ace point
        96: 1.5,  # his bar
        97: pytest.approx(11 / 15),
        98 + 4: 1.0,
        98 + 5: 1.0,  # the mover's 2 point, two men
        98 + 92: 1.0,
        98 + 93: 1.0,
        98 + 94: 1.0,
        98 + 95: 1.5,  # 24 point, six men
        195: pytest.approx(7 / 15),
    }


def test_pubeval_by_hand():
    # From the mover's 24 point down: five inputs each.
    board = np.stack([side(p3=1, p10=2, bar=1), side(p24=1, p6=3, p5=2, p1=5, bar=2)])
    assert nonzero(pubeval_inputs(board[None])[0]) == {
        1: 1.0,  # one man on 24
        5 * 2 + 0: 1.0,  # the opponent's 3 point is the mover's 22 point; his 10 point is not seen
        5 * 18 + 2: 1.0,
        5 * 18 + 3: 1.0,  # 6 point, three men
        5 * 19 + 2: 1.0,  # 5 point, two men
        5 * 23 + 2: 1.0,
        5 * 23 + 4: 1.0,  # ace point, five men
        120: 0.5,  # the opponent's man on the bar; the mover's are not seen
        121: pytest.approx(2 / 15),
    }


def test_turning_the_board_exchanges_the_halves():
    boards = placed(100, 0)
    halves = unary(boards).reshape(100, 2, UNARY // 2)
    assert (unary(swapped(boards)).reshape(100, 2, -1) == halves[:, ::-1]).all()


def test_different_positions_have_different_inputs():
    boards = np.unique(placed(2000, 1), axis=0)
    assert len(np.unique(unary(boards), axis=0)) == len(boards)


def test_the_kind_of_numbers():
    for encode, inputs in ((unary, UNARY), (pubeval_inputs, PUBEVAL)):
        assert encode(start()[None]).dtype == np.float32
        assert encode(np.zeros((0, 2, 25), np.int8)).shape == (0, inputs)
    assert (UNARY, PUBEVAL) == (196, 122)
