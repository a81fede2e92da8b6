"""Our players as external players of gnubg."""

import os
import socket
import subprocess
from itertools import pairwise

import numpy as np
import pytest

from moefold_backgammon import external_player
from moefold_backgammon.board import start, swapped
from moefold_backgammon.external_player import ExternalPlayer, answer
from moefold_backgammon.fibs_board import read_line, write_line
from moefold_backgammon.gnubg_socket import find_gnubg
from moefold_backgammon.notation import find_play
from moefold_backgammon.players import NetPlayer
from moefold_backgammon.plays import plays

CLOSED = np.array([[2] * 6 + [3] + [0] * 18, [*[2] * 7, *[0] * 17, 1]], np.int8)


def runner():
    """Brings its rearmost men home first."""
    return NetPlayer(lambda boards: boards[:, 1] @ -(np.arange(1.0, 26) ** 2), name="runner")


def test_the_play_is_that_of_the_player():
    # 24/13 is the play that takes most from the sum of squares.
    assert answer(write_line(start(), (6, 5)), runner()).replace("24/18 18/13", "24/13") == "24/13"


def test_there_is_no_play_when_no_man_can_move():
    assert answer(write_line(CLOSED, (6, 6)), runner()) == ""


def test_it_rolls_and_takes():
    line = write_line(start())
    assert answer(line, runner()) == "roll"
    fields = line.split(":")
    fields[40] = "1"
    assert answer(":".join(fields), runner()) == "take"


def test_what_cannot_be_answered_is_an_error_that_gnubg_shows():
    assert answer("hello", runner()).startswith("Error: 'hello' is not understood")
    assert answer("board:a:b", runner()).startswith("Error: 'board:a:b' has 3 fields")
    wrong = NetPlayer(lambda boards: np.full(len(boards), np.nan), name="mine")
    assert answer(write_line(start(), (3, 1)), wrong).startswith("Error: mine gave")


def test_a_conversation_with_the_zero_bytes_of_gnubg():
    question = write_line(start(), (6, 5)).encode()
    with ExternalPlayer(runner()) as served:
        host, _, port = served.address.partition(":")
        assert host == "127.0.0.1"
        with (
            socket.create_connection((host, int(port)), timeout=10) as connection,
            connection.makefile("rb") as said,
        ):
            for _ in range(2):
                connection.sendall(question[:30])
                connection.sendall(question[30:] + b"\n\0")
                assert b"24/" in said.readline()
            # A second connection, while the first is open: gnubg may have us on both sides.
            with (
                socket.create_connection((host, int(port)), timeout=10) as other,
                other.makefile("rb") as heard,
            ):
                other.sendall(question + b"\n\0")
                assert b"24/" in heard.readline()
            connection.sendall(b"exit\n")
            assert said.readline() == b""


def gnubg_plays(first, second, *, length):
    """A match of gnubg between two players, each as gnubg names it; what it prints."""
    commands = (
        "set automatic game on\nset automatic roll on\nset automatic move on\n"
        "set confirm new off\nset jacoby off\nset cube use off\nset display off\n"
        f"set player 0 {first}\nset player 1 {second}\nset rng mersenne\nset seed 1\n"
        f"new match {length}\nshow score\n"
    )
    done = subprocess.run(
        [find_gnubg(), "-t", "-q", "-r"],
        input=commands,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ},
    )
    return done.stdout


@pytest.mark.parametrize("side", [0, 1])
def test_gnubg_plays_a_match_against_it_and_makes_every_play_it_answers(
    side, monkeypatch, tmp_path
):
    try:
        find_gnubg()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    monkeypatch.setenv("HOME", str(tmp_path))
    talk = []

    def listening(line, player):
        talk.append((line, answer(line, player)))
        return talk[-1][1]

    monkeypatch.setattr(external_player, "answer", listening)
    with ExternalPlayer(runner()) as served:
        players = ["gnubg", f"external {served.address}"]
        if side == 0:
            players.reverse()
        printed = gnubg_plays(*players, length=5)
    assert "has won the match" in printed
    assert "rror" not in printed
    assert len(talk) > 20
    assert all(not said.startswith("Error") for _, said in talk)
    assert _taken_over(talk) > 20


def _taken_over(talk):
    """Counts the plays after which gnubg shows a board that can follow from them.

    gnubg takes a play that it does not understand for none, without a word. So what it shows next
    must be our board after the play, and one turn of the other side with some dice.
    """
    counted = 0
    for (line, said), (later, _) in pairwise(talk):
        asked, shown = read_line(line), read_line(later)
        if shown.board.sum() > asked.board.sum() or (shown.board == start()).all(axis=-1).any():
            continue  # another game
        board, dice = asked.board, asked.dice
        assert dice is not None
        finals, _ = plays(board[None], np.array([dice], np.int8))
        if said:
            board = finals[find_play(board, finals, said)]
        replies = np.array(
            [(one, two) for one in range(1, 7) for two in range(1, one + 1)], np.int8
        )
        turned = np.repeat(swapped(board[None]), len(replies), axis=0)
        answers, lengths = plays(turned, replies)
        possible = np.concatenate([answers, turned[lengths == 0]])
        assert (swapped(possible) == shown.board).all(axis=(1, 2)).any()
        counted += 1
    return counted
