"""The board line of FIBS: what gnubg sends and expects."""

import numpy as np
import pytest

from moefold_backgammon.board import start, swapped
from moefold_backgammon.fibs_board import read_line, write_line

# Player 1 of gnubg ("you", +) has a man on the bar, 3 on his 6 point, 1 on his 24 and 10 off; the
# other (-) has 2 on his ace point (your 24 would be his 1), 4 on his bar point (your 18), 9 off.
#
#          bar 1 2 3 4 5 6 7 8 ...                         18 ...               23 24 bar
PLACES = "0:0:0:0:0:0:3:0:0:0:0:0:0:0:0:0:0:0:-4:0:0:0:0:-2:1:1"
TAIL = "1:1:1:0:1:-1:0:25:10:9:0:0:0:0:0:1"


def a_line(turn=1, dice="3:1:3:1", places=PLACES, tail=TAIL):
    return f"board:gnubg:root:0:0:0:{places}:{turn}:{dice}:{tail}\n"


YOU = [0, 0, 0, 0, 0, 3, *[0] * 17, 1, 1]
HIM = [0, 2, 0, 0, 0, 0, 4, *[0] * 18]  # your 23 is his 2, your 18 is his 7


def test_a_line_is_read_from_the_view_of_the_player_on_roll():
    read = read_line(a_line())
    assert read.board.tolist() == [HIM, YOU]
    assert read.dice == (3, 1)
    assert not read.doubled


def test_turn_minus_one_is_the_other_player():
    assert read_line(a_line(turn=-1)).board.tolist() == [YOU, HIM]


def test_the_same_position_with_the_other_colour_and_direction():
    # FIBS lets "you" be the men below zero, moving up from 1 to 24, with the bar at place 0.
    places = PLACES.split(":")
    mirrored = ":".join(str(-int(men)) for men in reversed(places))
    tail = TAIL.replace("1:1:1:0:1:-1:", "1:1:1:0:-1:1:")
    other = read_line(a_line(turn=-1, places=mirrored, tail=tail))
    assert other.board.tolist() == [HIM, YOU]


def test_what_is_written_is_read_back():
    draw = np.random.default_rng(0)
    for _ in range(200):
        points = draw.permutation(24)
        board = np.zeros((2, 25), np.int8)
        for side, own in enumerate((points[:12], points[12:])):
            places = own if side else 23 - own  # a point is held by one side only
            for _ in range(draw.integers(1, 16)):
                board[side, draw.choice([*places, 24])] += 1
        dice = (int(draw.integers(1, 7)), int(draw.integers(1, 7)))
        read = read_line(write_line(board, dice))
        assert (read.board == board).all()
        assert read.dice == dice


def test_the_line_fits_what_gnubg_reads_at_once():
    # Every point held, two digits where there can be some.
    board = np.zeros((2, 25), np.int8)
    board[0, :12], board[1, :12], board[:, 24] = 1, 1, 3
    question = f"evaluation fibsboard {write_line(board, (6, 6))} plies 2 cubeless"
    assert len(question) < 255


def test_before_the_roll_and_after_a_double():
    assert read_line(a_line(dice="0:0:0:0")).dice is None
    doubled = read_line(a_line(dice="0:0:0:0", tail=TAIL.replace("1:1:1:0:", "1:1:1:1:")))
    assert doubled.doubled
    # The turn is the doubler's; who has to answer is the other.
    assert doubled.board.tolist() == [YOU, HIM]


def test_dice_of_either_player_count():
    assert read_line(a_line(dice="0:0:5:2")).dice == (5, 2)


def test_the_start_is_the_same_from_both_sides():
    line = write_line(start(), (3, 1))
    assert ":0:-2:0:0:0:0:5:0:3:0:0:0:-5:5:0:0:0:-3:0:-5:0:0:0:0:2:0:1:3:1:3:1:" in line
    assert (read_line(line).board == swapped(start()[None])[0]).all()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("board:a:b", "3 fields; a position is a line .* at least 43 fields"),
        (a_line(dice="3:x:3:1"), "not a number: .*'x'"),
        (a_line(turn=0), "turn 0, colour 1 and direction -1 must each be 1 or -1"),
        (a_line(dice="3:7:3:7"), "dice 3 and 7 are no roll"),
        (a_line(places=PLACES.replace(":3:", ":14:", 1)), "16 and 6 men; a side has 15 at most"),
    ],
)
def test_a_line_that_is_wrong_is_refused(line, says):
    with pytest.raises(ValueError, match=says):
        read_line(line)
