"""Debian's gnubg as a judge; skipped where it is not installed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from moefold_backgammon import gnubg_socket
from moefold_backgammon.board import start
from moefold_backgammon.gnubg_socket import Gnubg, GnubgDied, GnubgPlayer, find_gnubg
from moefold_backgammon.match import MatchConfig, play_match
from moefold_backgammon.players import NetPlayer, RandomPlayer
from moefold_backgammon.plays import plays

try:
    find_gnubg()
except RuntimeError as reason:
    MISSING = str(reason)
else:
    MISSING = ""

needs_gnubg = pytest.mark.skipif(bool(MISSING), reason=MISSING or "gnubg is there")

# A man on the bar, men off, and nothing alike on both sides.
LOPSIDED = np.array(
    [[0, 2, 0, 0, 0, 0, 4, *[0] * 18], [0, 0, 0, 0, 3, 4, *[0] * 17, 1, 1]], np.int8
)


@pytest.fixture(scope="module")
def gnubg():
    if MISSING:
        pytest.skip(MISSING)
    with Gnubg() as running:
        yield running


def runner():
    return NetPlayer(lambda boards: boards[:, 1] @ -np.arange(1.0, 26), name="runner")


def test_it_opens_as_everybody_does(gnubg):
    assert gnubg.best_play(start(), (3, 1)) == "8/5 6/5"
    assert gnubg.best_play(start(), (6, 1)) == "13/7 8/7"


@pytest.mark.parametrize(
    "board", [start(), LOPSIDED, LOPSIDED[::-1]], ids=["start", "one", "other"]
)
def test_its_values_are_those_of_its_nets_in_process(gnubg, board):
    nn = pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    found = gnubg.evaluate(board)
    theirs = nn.probabilities(np.asarray(board).tolist(), 0)
    # Other weights files and bear-off tables: 0.0075 was the largest difference seen.
    assert found.probabilities == pytest.approx(theirs, abs=0.01)
    win, gammon, backgammon, lose_gammon, lose_backgammon = found.probabilities
    points = 2 * win - 1 + gammon + backgammon - lose_gammon - lose_backgammon
    assert found.equity == pytest.approx(points, abs=1e-5)  # six decimals are sent


def test_it_looks_as_deep_as_it_is_told(gnubg):
    flat, deep = gnubg.evaluate(LOPSIDED), gnubg.evaluate(LOPSIDED, plies=1)
    assert flat.probabilities[0] != deep.probabilities[0]
    assert abs(flat.equity - deep.equity) < 0.3


def test_the_player_plays_what_it_says(gnubg):
    boards = np.stack([start(), LOPSIDED, start()])
    dice = np.array([[3, 1], [6, 5], [4, 2]], np.int8)
    finals, lengths = plays(boards, dice)
    chosen = GnubgPlayer(gnubg).choose(boards, dice, finals, lengths)
    made = finals[np.cumsum(lengths) - lengths + chosen]
    assert made[0, 1, [4, 5, 7]].tolist() == [2, 4, 2]  # 8/5 6/5
    assert made[1, 1, 24] == 0  # it enters, as it must
    assert made[2, 1, [3, 5, 7]].tolist() == [2, 4, 2]  # 8/4 6/4


def test_a_play_that_is_not_offered_is_an_error(gnubg):
    boards, dice = start()[None], np.array([[3, 1]], np.int8)
    finals, _ = plays(boards, dice)
    others = finals[finals[:, 1, 4] != 2]
    with pytest.raises(RuntimeError, match="gnubg played '8/5 6/5' with 3 and 1"):
        GnubgPlayer(gnubg).choose(boards, dice, others, np.array([len(others)]))


def test_a_question_it_refuses_is_an_error_and_it_goes_on(gnubg, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(gnubg_socket, "write_line", lambda *_: "board:no:position")
        with pytest.raises(RuntimeError, match="gnubg refuses 'board:no:position': Error: syntax"):
            gnubg.best_play(start(), (3, 1))
    assert gnubg.best_play(start(), (3, 1)) == "8/5 6/5"


def test_a_depth_to_which_it_would_say_nothing_is_refused(gnubg):
    with pytest.raises(ValueError, match="gnubg looks 0 to 7 plies deep, not -1"):
        gnubg.evaluate(start(), plies=-1)
    with pytest.raises(ValueError, match="not 8"):
        Gnubg(plies=8)


@needs_gnubg
def test_a_gnubg_that_does_not_answer_counts_as_dead():
    with Gnubg(timeout=0.2) as mine:
        assert mine.pid is not None
        os.kill(mine.pid, signal.SIGSTOP)
        with pytest.raises(GnubgDied, match="timed out"):
            mine.evaluate(start())
        mine.start()
        assert mine.evaluate(start()).probabilities[0] > 0.5


@needs_gnubg
def test_a_gnubg_that_died_is_started_again():
    with Gnubg() as mine:
        first = mine.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        with pytest.raises(GnubgDied, match="did not answer 'board:"):
            mine.best_play(start(), (3, 1))
        boards, dice = start()[None], np.array([[3, 1]], np.int8)
        finals, lengths = plays(boards, dice)
        chosen = GnubgPlayer(mine).choose(boards, dice, finals, lengths)
        assert finals[chosen[0], 1, 4] == 2
        assert mine.pid not in (None, first)


class Killing:
    """A player that kills gnubg before one of its questions."""

    def __init__(self, gnubg, *, questions, restarts):
        self.inner = GnubgPlayer(gnubg, restarts=restarts)
        self.name = self.inner.name
        self.gnubg = gnubg
        self.left = questions

    def choose(self, *asked):
        self.left -= 1
        if self.left == 0:
            os.kill(self.gnubg.pid, signal.SIGKILL)
        return self.inner.choose(*asked)


def test_a_match_in_which_gnubg_is_killed_is_the_match_in_which_it_is_not(gnubg, tmp_path):
    config = MatchConfig(pairs=4, pairs_at_once=2)
    whole = play_match(GnubgPlayer(gnubg), runner(), config)
    with Gnubg() as mine:
        killed = play_match(Killing(mine, questions=40, restarts=1), runner(), config)
        assert (killed.points == whole.points).all()
        # Without a restart the match stops, and goes on from its file with another gnubg.
        file = tmp_path / "match.jsonl"
        with pytest.raises(GnubgDied):
            play_match(
                Killing(mine, questions=100, restarts=0),
                runner(),
                replace(config, pairs_at_once=1),
                results=file,
            )
    done = len(file.read_text().splitlines()) - 1
    assert 0 < done < 4
    again = play_match(GnubgPlayer(gnubg), runner(), config, results=file)
    assert (again.points == whole.points).all()
    assert len(file.read_text().splitlines()) == 5


def test_it_beats_chance(gnubg):
    result = play_match(GnubgPlayer(gnubg), RandomPlayer(), MatchConfig(pairs=5))
    assert result.wins.mean == 1  # it loses one game in 70


@needs_gnubg
def test_no_gnubg_is_left_behind_when_we_are_killed():
    script = (
        "import time; from moefold_backgammon.gnubg_socket import Gnubg; g = Gnubg();"
        "print(g.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as ours:
        assert ours.stdout is not None
        pid = int(ours.stdout.readline())
        assert _there(pid)
        ours.kill()
    for _ in range(100):
        if not _there(pid):
            return
        time.sleep(0.05)
    pytest.fail(f"gnubg, process {pid}, is still there")


def _there(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - it may vanish while it is read
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_program_that_is_not_there_is_named():
    with pytest.raises(RuntimeError, match=r"no program /no/gnubg; .*apt-get install gnubg"):
        Gnubg(program="/no/gnubg")


def test_a_program_that_does_not_listen_is_told_from_one_that_does():
    with pytest.raises(GnubgDied, match="/true does not listen on port"):
        Gnubg(program="/bin/true")
