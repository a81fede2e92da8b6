"""The board in the terminal."""

import numpy as np

from moefold_backgammon.board import start
from moefold_backgammon.draw import draw


def test_the_start():
    assert draw(start()) == (
        " 13 14 15 16 17 18      19 20 21 22 23 24\n"
        "+------------------+---+------------------+\n"
        "| X           O    |   | O              X |  O  0 off\n"
        "| X           O    |   | O              X |\n"
        "| X           O    |   | O                |\n"
        "| X                |   | O                |\n"
        "| X                |   | O                |\n"
        "|                  |bar|                  |\n"
        "| O                |   | X                |\n"
        "| O                |   | X                |\n"
        "| O           X    |   | X                |\n"
        "| O           X    |   | X              O |\n"
        "| O           X    |   | X              O |  X  0 off\n"
        "+------------------+---+------------------+\n"
        " 12 11 10  9  8  7       6  5  4  3  2  1"
    )


def test_more_men_than_there_is_room_for_and_the_bar():
    board = np.zeros((2, 25), np.int8)
    board[1, 0], board[1, 24] = 7, 2  # X: seven on the ace point, two on the bar
    board[0, 0], board[0, 24] = 11, 1  # O: eleven on my 24 point
    lines = draw(board).splitlines()
    assert lines[2] == "|                  | O |                O |  O  3 off"
    assert lines[6] == "|                  |   |               11 |"
    assert lines[8] == "|                  |   |                7 |"
    assert [line[20:23] for line in lines[8:13]] == ["   ", "   ", "   ", " X ", " X "]
    assert lines[12] == "|                  | X |                X |  X  6 off"
