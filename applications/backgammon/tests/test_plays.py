"""Legal plays: by hand, against a slow twin, and against gnubg."""

import time
from functools import partial

import numpy as np
import pytest

from moefold_backgammon.board import check, start
from moefold_backgammon.plays import plays, plays_with_moves
from moefold_backgammon.position_id import decode_keys
from random_positions import dice, from_play, placed


def side(**points):
    men = np.zeros(25, np.int8)
    for name, count in points.items():
        men[24 if name == "bar" else int(name[1:]) - 1] = count
    return men


def after(opponent, player, roll):
    """The mover's men after each play, as {point: men}, with the bar as 25."""
    finals, lengths = plays(np.stack([opponent, player])[None], np.array([roll]))
    assert lengths.tolist() == [len(finals)]
    return [{int(at) + 1: int(men[at]) for at in np.flatnonzero(men)} for men in finals[:, 1]]


def slow_twin(board, roll):
    """Every sequence of moves, one by one; the final boards of the longest."""
    sequences = [(roll[0],) * 4] if roll[0] == roll[1] else [tuple(roll), tuple(roll[::-1])]
    ends = {}  # board -> (moves, the highest die of a single move)
    for sequence in sequences:
        for number, final in _tried(board, sequence, 0):
            rank = (number, sequence[0] if number == 1 else 0)
            ends[final] = max(ends.get(final, (0, 0)), rank)
    best = max(ends.values())
    return {final for final, rank in ends.items() if rank == best} if best[0] else set()


def _tried(board, sequence, number):
    moved = False
    for final in _one_move(board, sequence[number]) if number < len(sequence) else ():
        moved = True
        yield from _tried(final, sequence, number + 1)
    if not moved:
        yield number, board


def _one_move(board, die):
    opponent, own = board
    held = [at for at in range(25) if own[at]]
    for source in [24] if own[24] else held:
        to = source - die
        men, theirs = list(own), list(opponent)
        men[source] -= 1
        if to < 0:
            if held[-1] > 5 or (to < -1 and held[-1] != source):
                continue
        elif opponent[23 - to] > 1:
            continue
        else:
            men[to] += 1
            theirs[24] += theirs[23 - to]
            theirs[23 - to] = 0
        yield tuple(theirs), tuple(men)


def as_set(finals):
    return {(tuple(theirs), tuple(own)) for theirs, own in finals.tolist()}


def test_an_opening_has_its_known_number_of_plays():
    rolls = [(3, 1), (6, 5), (2, 1), (1, 1)]
    _, lengths = plays(np.stack([start()] * 4), np.array(rolls))
    # 8/5 6/5 and 15 others; the numbers are those of gnubg's list of plays.
    gnubg_nn = pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    board = start().tolist()
    assert lengths.tolist() == [len(gnubg_nn.moves(board, *roll)) for roll in rolls]
    assert lengths[0] == 16


NOBODY = side(p1=2)  # of the opponent: his ace point is the mover's 24 point


def test_both_dice_must_be_played_if_they_can():
    # The mover's 4 is held, so that 10/4 cannot be. 10/9 9/3 can: 10/9 alone is no play.
    held = side(p21=2, p1=2)
    assert after(held, side(p10=1), (6, 1)) == [{3: 1}]


def test_the_higher_die_if_only_one_can_be_played():
    # 10/4 and 10/9 can be, but from 4 the 1 and from 9 the 6 meets a held point: 3.
    held = side(p22=2, p1=2)
    assert after(held, side(p10=1), (6, 1)) == [{4: 1}]


def test_the_lower_die_if_the_higher_cannot_be_played():
    held = side(p21=2, p22=2, p1=2)  # the mover's 4 and 3
    assert after(held, side(p10=1), (6, 1)) == [{9: 1}]


def test_a_man_on_the_bar_comes_first_and_may_have_no_way_in():
    player = side(p6=2, bar=2)
    closed = side(p6=2, p5=2, p4=2, p3=2, p2=2, p1=2)
    assert after(closed, player, (6, 5)) == []
    # Only the 3 enters, one of two men: the 6 may not be played elsewhere.
    assert after(side(p6=2, p5=2), player, (6, 3)) == [{6: 2, 22: 1, 25: 1}]
    assert after(side(p6=2, p5=2), player, (5, 2)) == [{6: 2, 23: 1, 25: 1}]


def test_bearing_off():
    # The 6 takes the rearmost, from 5, as nobody is further, and the 3 one from 3; or first 5/2,
    # and then the 6 takes one from 3.
    assert after(NOBODY, side(p5=1, p3=2), (6, 3)) == [{2: 1, 3: 1}, {3: 1}]
    # Not all are at home until the man on 7 has moved: 7/6 6/off, or 7/1 6/5.
    assert after(NOBODY, side(p7=1, p6=1), (6, 1)) == [{6: 1}, {1: 1, 5: 1}]
    # A 4 is no way off from 3 while a man stands on 6, or on 5.
    assert after(NOBODY, side(p6=1, p3=1), (4, 1)) == [{1: 1, 3: 1}, {2: 2}]
    assert after(NOBODY, side(p6=1, p3=1), (4, 4)) == [{}]


def test_two_ways_of_a_man_are_two_plays_if_one_hits():
    # 13/7 with 4 and 2 over 9 or over 11; the opponent has a single man on the mover's 9.
    boards = np.stack([side(p16=1, p1=2), side(p13=1)])[None]
    finals, _ = plays(boards, np.array([[4, 2]]))
    assert finals[:, 1].argmax(axis=1).tolist() == [6, 6]
    assert sorted(finals[:, 0, 24].tolist()) == [0, 1]
    quiet = np.stack([side(p1=2), side(p13=1)])[None]
    assert plays(quiet, np.array([[4, 2]]))[1].tolist() == [1]


def test_a_man_is_hit_once_however_many_land_on_it():
    finals, _ = plays(np.stack([side(p21=1), side(p8=4)])[None], np.array([[4, 4]]))
    assert finals[:, 1, 3].tolist() == [4]
    assert finals[:, 0, 24].tolist() == [1]
    assert finals[:, 0, 20].tolist() == [0]


def test_nobody_plays_after_the_end():
    assert after(side(p1=3), side(), (3, 3)) == []


@pytest.mark.parametrize("kind", [from_play, placed])
def test_the_same_as_the_slow_twin(kind):
    boards, rolls = kind(500, 11), dice(500, 12)
    finals, lengths = plays(boards, rolls)
    ends = np.cumsum(lengths)
    for board, roll, end, length in zip(boards, rolls.tolist(), ends, lengths, strict=True):
        ours = finals[end - length : end]
        assert as_set(ours) == slow_twin(tuple(map(tuple, board.tolist())), roll)
        assert len(as_set(ours)) == length


def test_neither_the_order_of_dice_nor_the_company_matters():
    boards, rolls = from_play(300, 4), dice(300, 5)
    finals, lengths = plays(boards, rolls)
    assert (plays(boards, rolls[:, ::-1])[0] == finals).all()
    alone = [plays(boards[at : at + 1], rolls[at : at + 1])[0] for at in range(300)]
    assert [len(one) for one in alone] == lengths.tolist()
    assert (np.concatenate(alone) == finals).all()


def test_plays_lead_to_positions_that_can_be():
    boards, rolls = placed(1000, 6), dice(1000, 7)
    before = boards.copy()
    finals, lengths = plays(boards, rolls)
    check(finals)
    assert (boards == before).all()
    # No man of the opponent is lost, and none of the mover's put anywhere but off.
    assert (finals[:, 0].sum(axis=1) == np.repeat(boards[:, 0].sum(axis=1), lengths)).all()
    assert finals.dtype == np.int8


def test_moves_make_the_pips_of_the_play():
    boards, rolls = from_play(1000, 8), dice(1000, 9)
    found = plays_with_moves(boards, rolls)
    made = (found.sources >= 0).sum(axis=1)
    used = np.where(found.sources >= 0, found.dice, 0).sum(axis=1)
    pips = (boards[found.position, 1] - found.finals[:, 1]) @ np.arange(1, 26)
    exact = found.finals[:, 1].sum(axis=1) == boards[found.position, 1].sum(axis=1)
    assert (pips[exact] == used[exact]).all()  # men borne off may waste some
    assert (pips <= used).all()
    doublet = rolls[found.position, 0] == rolls[found.position, 1]
    assert made[doublet].max() == 4
    assert made[~doublet].max() == 2


def test_no_positions_have_no_plays():
    finals, lengths = plays(np.zeros((0, 2, 25), np.int8), np.zeros((0, 2), np.int8))
    assert finals.shape == (0, 2, 25)
    assert len(lengths) == 0


def test_what_cannot_be_played_is_refused():
    with pytest.raises(ValueError, match=r"dice of position 1 are \[0, 3\]"):
        plays(np.stack([start()] * 2), np.array([[1, 2], [0, 3]]))
    with pytest.raises(ValueError, match=r"shape \(2, 25\) with dice of shape \(1, 2\)"):
        plays(start(), np.array([[1, 2]]))


def agree_with_gnubg(boards, rolls):
    gnubg_nn = pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    finals, lengths = plays(boards, rolls)
    theirs = [
        gnubg_nn.moves(board, *roll)
        for board, roll in zip(boards.tolist(), rolls.tolist(), strict=True)
    ]
    assert lengths.tolist() == [len(keys) for keys in theirs]
    expected = decode_keys([key for keys in theirs for key in keys]).reshape(-1, 50)
    owner = np.repeat(np.arange(len(boards)), lengths)
    # Sorted by position and then by men, equal sets are equal arrays.
    one, other = (rows[np.lexsort((*rows.T, owner))] for rows in (finals.reshape(-1, 50), expected))
    assert (one == other).all()


@pytest.mark.parametrize("kind", [from_play, placed])
def test_the_plays_of_gnubg(kind):
    agree_with_gnubg(kind(1000, 21), dice(1000, 22))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [partial(from_play, games=2000), placed], ids=["play", "placed"])
def test_the_plays_of_gnubg_on_many_positions(kind):
    for part in range(10):
        agree_with_gnubg(kind(5000, 100 + part), dice(5000, 200 + part))


@pytest.mark.slow
def test_speed():
    boards, rolls = from_play(20_000, 31), dice(20_000, 32)
    plays(boards[:1000], rolls[:1000])
    begun = time.process_time()
    plays(boards, rolls)
    # 50,000 to 70,000 were measured on one core.
    assert 20_000 / (time.process_time() - begun) > 20_000
