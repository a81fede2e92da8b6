"""A benchmark of our own: what is in it, and that it is made once and only once."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moefold_backgammon import own_benchmark
from moefold_backgammon.bm import read_bm
from moefold_backgammon.gnubg_nn_expert import LabelConfig, play_game, rank
from moefold_backgammon.own_benchmark import BenchmarkConfig, decide, make_benchmark
from moefold_backgammon.plays import plays
from moefold_backgammon.position_id import decode_keys

pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")

CONFIG = BenchmarkConfig(decisions=5, plies=1)  # a tenth of the time of two plies


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    file = tmp_path_factory.mktemp("made") / "own.bm"
    make_benchmark(file, CONFIG)
    return file


def test_it_lists_the_best_plays_by_the_deeper_look(made):
    found = read_bm(made)
    assert len(found) == 5
    finals, lengths = plays(found.before, found.dice)
    assert found.lengths.tolist() == np.minimum(lengths, 8).tolist()
    starts = np.cumsum(found.lengths) - found.lengths
    for at, start in enumerate(starts):
        dice = (int(found.dice[at, 0]), int(found.dice[at, 1]))
        deep = [play for play in rank(found.before[at], dice, plies=1, top=8) if play[2] == 1]
        listed = slice(start, start + found.lengths[at])
        keys = decode_keys([key for key, _, _ in deep])[:, ::-1]
        assert (found.finals[listed] == keys).all()
        lost = [deep[0][1] - equity for _, equity, _ in deep]
        assert found.losses[listed] == pytest.approx(lost, abs=1e-6)  # six digits are written
        legal = {final.tobytes() for final in finals[lengths[:at].sum() :][: lengths[at]]}
        assert {final.tobytes() for final in found.finals[listed]} <= legal


def test_each_decision_is_of_a_game_of_its_own_and_not_always_the_same_turn(made):
    found = read_bm(made)
    turns = []
    for number in range(5):
        game = play_game(LabelConfig(games=1, seed=CONFIG.seed), number)
        same = (game.before == found.before[number]).all(axis=(1, 2))
        same &= (game.dice == found.dice[number]).all(axis=1)
        turns += np.flatnonzero(same).tolist()
    assert len(turns) == 5
    assert len(set(turns)) > 2


def test_it_says_how_it_was_made(made):
    head = made.read_text().splitlines()[0]
    assert head.startswith('# {"gnubg_nn": ')
    assert head.endswith('"plies": 1, "top": 8, "random_share": 0.05, "seed": 1988}')


@pytest.mark.parametrize("letters", [0, 20, 90, 300, 700, None])
def test_one_that_was_cut_off_anywhere_goes_on(tmp_path, made, letters, monkeypatch):
    whole = made.read_bytes()
    file = tmp_path / "own.bm"
    (tmp_path / "own.bm.part").write_bytes(whole[:letters])
    there = max(whole[:letters].count(b"\n") - 1, 0)
    asked = []

    def counted(config, number):
        asked.append(number)
        return decide(config, number)

    monkeypatch.setattr(own_benchmark, "decide", counted)
    told, kept = [], []

    def watch(done, of):
        told.append((done, of))
        kept.append((tmp_path / "own.bm.part").read_bytes().count(b"\n") - 1)

    make_benchmark(file, CONFIG, watch=watch)
    assert file.read_bytes() == whole
    assert asked == list(range(there, 5))
    assert told == [(done, 5) for done in range(there, 6)]
    assert kept[1:] == list(range(there + 1, 6))  # each is in the file before it is told
    assert [path.name for path in tmp_path.iterdir()] == ["own.bm"]


def test_it_is_not_made_again_but_made_longer(tmp_path, made, monkeypatch):
    file = tmp_path / "own.bm"
    file.write_bytes(made.read_bytes())
    longer = make_benchmark(file, replace(CONFIG, decisions=6))
    assert len(longer) == 6
    assert file.read_bytes().startswith(made.read_bytes())
    monkeypatch.delattr(own_benchmark, "decide")
    assert len(make_benchmark(file, CONFIG)) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["own.bm"]


def test_two_processes_make_the_same(tmp_path, made):
    make_benchmark(tmp_path / "two.bm", CONFIG, processes=2)
    assert (tmp_path / "two.bm").read_bytes() == made.read_bytes()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_behind_and_what_was_done_stays(tmp_path, made, how):
    script = (
        "import signal; from pathlib import Path\n"
        # What runs in the background is started deaf to the keyboard.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from moefold_backgammon.own_benchmark import *\n"
        "config = BenchmarkConfig(decisions=2000, plies=1)\n"
        "make_benchmark(Path('own.bm'), config, processes=2)"
    )
    unfinished = tmp_path / "own.bm.part"
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as ours:
        _wait(lambda: unfinished.is_file() and unfinished.read_bytes().count(b"\n") > 6)
        if how == signal.SIGINT:
            os.killpg(ours.pid, how)  # as the keyboard does
        else:
            ours.kill()
    _wait(lambda: not _session(ours.pid))
    assert unfinished.read_bytes().startswith(made.read_bytes())


def _wait(until, seconds=60):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)


def _session(leader):
    """Processes that are left of a session."""
    left = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = file.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == leader and state != "Z":
            left.append(file.parent.name)
    return left


@pytest.mark.parametrize("name", ["own.bm", "own.bm.part"])
def test_one_that_was_made_otherwise_is_refused_and_left(tmp_path, made, name):
    (tmp_path / name).write_bytes(made.read_bytes())
    with pytest.raises(ValueError, match=rf'{name} is there .* "seed": 1988.* "seed": 3'):
        make_benchmark(tmp_path / "own.bm", replace(CONFIG, seed=3))
    assert (tmp_path / name).read_bytes() == made.read_bytes()


def test_two_do_not_write_one_file(tmp_path):
    with (tmp_path / "own.bm.part").open("wb") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match=r"another benchmark is being written to .*own\.bm"):
            make_benchmark(tmp_path / "own.bm", CONFIG)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"decisions": 0}, "0 decisions: there must be at least one"),
        ({"plies": 0}, "plies 0: 1 or 2"),
        ({"top": 1}, "top 1: at least two"),
        ({"random_share": 5}, "random_share 5 is a share"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        BenchmarkConfig(**settings)


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"own\.bm\.xz does not end in \.bm"):
        make_benchmark(tmp_path / "own.bm.xz", CONFIG)
    assert not os.listdir(tmp_path)  # noqa: PTH208 - a list to look at


def test_without_gnubg_nn_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gnubg_nn", None)
    with pytest.raises(RuntimeError, match="pip install gnubg-nn"):
        make_benchmark(tmp_path / "own.bm", CONFIG)
