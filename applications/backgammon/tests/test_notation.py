"""Plays as text: what is read, what is written, and that both fit."""

import numpy as np
import pytest

from moefold_backgammon.board import start
from moefold_backgammon.notation import (
    NOT_FOUND,
    SEVERAL,
    find_play,
    match_texts,
    play_text,
    read_text,
)
from moefold_backgammon.plays import plays
from random_positions import dice, from_play, placed


def side(**points):
    men = np.zeros(25, np.int8)
    for name, count in points.items():
        men[24 if name == "bar" else int(name[1:]) - 1] = count
    return men


def legal(board, roll):
    return plays(board[None], np.array([roll]))[0]


def made(board, roll, text):
    """The final board of a text, [opponent, mover], as {point: men} with the bar as 25."""
    finals = legal(board, roll)
    final = finals[find_play(board, finals, text)]
    return [{int(at) + 1: int(men[at]) for at in np.flatnonzero(men)} for men in final]


def test_a_text_is_what_the_men_do():
    assert made(start(), (3, 1), "8/5 6/5")[1] == {5: 2, 6: 4, 8: 2, 13: 5, 24: 2}
    assert made(start(), (1, 1), "8/7(2) 6/5(2)")[1] == {5: 2, 6: 3, 7: 2, 8: 1, 13: 5, 24: 2}
    assert made(start(), (6, 5), "24/13")[1] == {6: 5, 8: 3, 13: 6, 24: 1}


@pytest.mark.parametrize("text", ["24/18 18/13", "18/13 24/18", "24/18/13", " 24/13 ", "24/13(1)"])
def test_one_way_may_be_written_in_many(text):
    assert made(start(), (6, 5), text)[1] == {6: 5, 8: 3, 13: 6, 24: 1}


def test_bar_and_off_by_name_and_by_number():
    board = np.stack([side(p6=2), side(p3=2, bar=1)])
    assert made(board, (4, 5), "BAR/16") == made(board, (5, 4), "25/20/16")
    home = np.stack([side(p1=2), side(p5=1, p3=2)])
    assert made(home, (6, 3), "5/off 3/off") == made(home, (6, 3), "5/0 3/Off")


HIT = np.stack([side(p16=1, p21=1, p1=2), side(p13=1, p8=2)])  # single men on my 9 and 4


def test_hits():
    # 13/7 over 9, where a man is hit, or over 11.
    assert made(HIT, (4, 2), "13/9*/7")[0] == {1: 2, 21: 1, 25: 1}
    assert made(HIT, (4, 2), "13/7")[0] == {1: 2, 16: 1, 21: 1}
    # Two men land on one: it is hit once, wherever the star stands.
    twice = [made(HIT, (4, 4), text) for text in ("13/9*/5 8/4*(2)", "13/9/5 8/4 8/4")]
    assert twice[0] == twice[1]
    assert twice[0][0] == {1: 2, 25: 2}


def test_a_star_may_be_missing_where_it_goes_without_saying():
    # With 11 held, 13/7 is possible over 9 only.
    held = HIT.copy()
    held[0, 13] = 2
    assert made(held, (4, 2), "13/7") == made(held, (4, 2), "13/9*/7")
    both = HIT.copy()
    both[0, 13] = 1
    finals = legal(both, (4, 2))
    assert len(finals[finals[:, 1, 6] == 1]) == 2
    with pytest.raises(ValueError, match="'13/7' can be several plays; put a star"):
        find_play(both, finals, "13/7")
    assert match_texts(both[None], finals, np.array([len(finals)]), ["13/7"]) == [SEVERAL]
    assert made(both, (4, 2), "13/11*/7")[0] == {1: 2, 16: 1, 21: 1, 25: 1}


def test_what_is_said_to_be_hit_must_be():
    # A single man stands on 10, but 6 and 4 do not lead over it.
    board = np.stack([side(p15=1, p1=2), side(p13=1)])
    assert made(board, (6, 4), "13/3")[0] == {1: 2, 15: 1}
    with pytest.raises(ValueError, match="not like any of the"):
        made(board, (6, 4), "13/10*/3")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("13/3", "'13/3' is not like any of the 16 legal plays"),
        ("8/5", "not like any"),
        ("8/5* 6/5", "not like any"),
        ("5/8 6/5", "not like any"),
        ("", "not like any"),
        ("8/5 6-5", r"'6-5' in '8/5 6-5' is not understood; write from/to"),
        ("8", "'8' in '8' is not understood"),
        ("8/26", "'8/26'"),
        ("off/5", "'off/5'"),
        ("8/bar", "'8/bar'"),
        ("8/5(5)", "not understood"),
        ("hint", "not understood"),
    ],
)
def test_what_is_no_play_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        find_play(start(), legal(start(), (3, 1)), text)


def test_the_words_of_a_text():
    (first, second) = read_text("Bar/20*/16 6/off(2)")
    assert (first.points, first.starred, first.men) == ((24, 19, 15), (19,), 1)
    assert (second.points, second.starred, second.men) == ((5, -1), (), 2)


@pytest.mark.parametrize(
    ("board", "roll", "text"),
    [
        (start(), (3, 1), "8/5 6/5"),
        (start(), (6, 5), "24/13"),
        (start(), (1, 1), "8/7(2) 6/5(2)"),
        (HIT, (4, 2), "13/9*/7"),
        (HIT, (4, 2), "13/7"),
        (HIT, (4, 4), "13/9*/5 8/4*(2)"),
        (np.stack([side(p5=1, p6=1), side(p3=2, bar=2)]), (5, 4), "bar/21 bar/20*"),
        (np.stack([side(p21=1, p1=2), side(p6=1, p5=1)]), (2, 1), "6/4* 5/4"),
        (np.stack([side(p1=2), side(p5=1, p3=2)]), (6, 3), "5/off 3/off"),
        (np.stack([side(p1=2), side(p3=4)]), (3, 3), "3/off(4)"),
    ],
)
def test_a_play_is_written_as_people_do(board, roll, text):
    finals = legal(board, roll)
    written = play_text(board, finals[find_play(board, finals, text)], roll)
    assert written == text


@pytest.mark.parametrize("kind", [from_play, placed])
def test_every_play_is_read_as_it_is_written(kind):
    boards, rolls = kind(60, 1), dice(60, 2)
    finals, lengths = plays(boards, rolls)
    owner = np.repeat(np.arange(60), lengths)
    texts = [
        play_text(boards[at], final, tuple(rolls[at].tolist()))
        for at, final in zip(owner, finals, strict=True)
    ]
    found = match_texts(boards, finals, lengths, texts, owner)
    places = np.arange(len(finals)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    assert found.tolist() == places.tolist()


def test_a_text_for_each_position_or_for_those_that_are_named():
    boards = np.stack([start()] * 3)
    finals, lengths = plays(boards, np.array([[3, 1], [6, 5], [4, 2]]))
    texts = ["8/5 6/5", "24/13", "8/4 6/4"]
    found = match_texts(boards, finals, lengths, texts)
    alone = match_texts(boards, finals, lengths, texts[::-1], np.array([2, 1, 0]))
    assert found.tolist() == alone.tolist()[::-1]
    assert (found >= 0).all()
    elsewhere = match_texts(boards, finals, lengths, texts, np.array([1, 2, 0]))
    assert elsewhere.tolist() == [NOT_FOUND] * 3


def test_a_position_that_no_play_leads_to_has_no_text():
    with pytest.raises(ValueError, match="no play with 6 and 5 leads from"):
        play_text(start(), start(), (6, 5))
