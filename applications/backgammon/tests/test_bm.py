"""Benchmark files: read, written, and refused with the number of the line."""

import bz2

import numpy as np
import pytest

from moefold_backgammon.bm import Benchmark, read_bm, write_bm
from moefold_backgammon.board import start, swapped
from moefold_backgammon.decisions import Decisions, join
from moefold_backgammon.notation import find_play
from moefold_backgammon.plays import plays
from moefold_backgammon.position_id import encode_keys

FINALS = plays(start()[None], np.array([[3, 1]]))[0]


def key_after(text):
    """The key of the start after a play, as the next player sees it."""
    return encode_keys(swapped(FINALS[find_play(start(), FINALS, text)])[None])[0]


KEY = encode_keys(start()[None])[0]
BEST, SECOND, THIRD = (key_after(text) for text in ("8/5 6/5", "24/23 13/10", "13/10 6/5"))
LINE = f"m {KEY} 3 1 {BEST} {SECOND} 0.16 {THIRD} 0.2\n"


def written(tmp_path, text):
    file = tmp_path / "some.bm"
    file.write_text(text)
    return file


def test_a_file_by_hand(tmp_path):
    text = f"s 0 1\no {KEY} 0.5 0.1 0 0.1 0\n{LINE}\nm {KEY} 1 3 {BEST}\n"
    read = read_bm(written(tmp_path, text))
    assert len(read) == 2
    assert (read.before == start()).all()
    assert read.dice.tolist() == [[3, 1], [1, 3]]
    assert read.lengths.tolist() == [3, 1]
    assert read.losses == pytest.approx([0, 0.16, 0.2, 0])
    made = [find_play(start(), read.finals[at : at + 1], "8/5 6/5") for at in (0, 3)]
    assert made == [0, 0]
    assert find_play(start(), read.finals[:3], "24/23 13/10") == 1


def test_what_plays_lose(tmp_path):
    read = read_bm(written(tmp_path, LINE * 4))
    texts = ["8/5 6/5", "24/23 13/10", "13/10 6/5", "13/9"]
    made = np.stack([FINALS[find_play(start(), FINALS, text)] for text in texts])
    losses, listed = read.losses_of(made)
    assert losses == pytest.approx([0, 0.16, 0.2, 0.2])  # the last is charged as the worst listed
    assert listed.tolist() == [True, True, True, False]


def test_compressed(tmp_path):
    file = tmp_path / "some.bm.bz2"
    file.write_bytes(bz2.compress(LINE.encode()))
    assert read_bm(file).lengths.tolist() == [3]


def test_what_is_written_is_read_back(tmp_path):
    read = read_bm(written(tmp_path, LINE * 2))
    file = tmp_path / "again.bm"
    write_bm(file, read)
    again = read_bm(file)
    for name in Benchmark.__slots__:
        assert (getattr(again, name) == getattr(read, name)).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.bm", "some.bm"]


def test_from_an_experts_decisions():
    finals = np.zeros((6, 2, 25), np.int8)
    finals[:, 1, 0] = np.arange(6)
    some = Decisions(
        before=np.zeros((2, 2, 25), np.int8),
        dice=np.ones((2, 2), np.int8),
        finals=finals,
        lengths=np.array([4, 2], np.int32),
        chosen=np.array([1, 0], np.int32),
        equities=np.array([0.5, 1.0, 3.0, 0.75, -1.0, -1.5], np.float32),
        plies=np.array([2, 2, 0, 2, 0, 0], np.int8),  # 3.0 was not looked at closely
        game=np.zeros(2, np.int32),
    )
    made = Benchmark.of(some)
    assert made.finals[:, 1, 0].tolist() == [1, 3, 0, 4, 5]
    assert made.lengths.tolist() == [3, 2]
    assert made.losses.tolist() == [0, 0.25, 0.5, 0, 0.5]
    assert Benchmark.of(some, top=1).finals[:, 1, 0].tolist() == [1, 4]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (LINE[:-1], "line 2 of .*some.bm, the last, is cut off: .* does not end with"),
        (f"m {KEY} 3 1 {BEST} {SECOND}\n", "line 2 of .*some.bm is cut off: after m it has 5"),
        (f"m {KEY} 3\n", "line 2 of .* is cut off: after m it has 2 words"),
        (f"m {KEY} 3 1 {BEST[:-1]}\n", r"line 2 of .* the key '\w{19}'"),
        (f"m {KEY} 3 7 {BEST}\n", "line 2 of .* the dice 3 and 7"),
        (f"m {KEY} 3 1 {BEST} {SECOND} -0.1\n", r"line 2 of .* a loss .*\['-0.1'\]"),
        (f"m {KEY} 3 1 {BEST} {SECOND} much\n", r"line 2 of .* a loss .*\['much'\]"),
        (f"m {KEY} 3 1 {'P' * 20}\n", r"line 2 of .*some.bm: 'PPPP.* \[80, 0\] men"),
    ],
)
def test_a_line_that_is_wrong_is_refused(tmp_path, line, says):
    with pytest.raises(ValueError, match=says):
        read_bm(written(tmp_path, LINE + line))


def test_a_file_without_plays_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no line that begins with m"):
        read_bm(written(tmp_path, f"o {KEY} 0.5 0 0 0 0\n"))


def test_gnubg_nn_reads_what_is_written(tmp_path):
    pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    from gnubg_nn.training.referr import benchmark_error

    from moefold_backgammon.gnubg_nn_expert import LabelConfig, play_game

    labels = join([play_game(LabelConfig(games=1), number) for number in range(2)])
    benchmark = Benchmark.of(labels)
    file = tmp_path / "own.bm"
    write_bm(file, benchmark)
    # Its own plays lose nothing.
    assert benchmark_error(str(file)).move_error == 0
    # With the best play said to be the second, they lose what is written: so it reads our keys.
    starts = np.cumsum(benchmark.lengths) - benchmark.lengths
    clear = benchmark.lengths > 1
    clear[clear] = benchmark.losses[starts[clear] + 1] > 0.001  # of equals it may take either
    starts = starts[clear]
    finals, losses = benchmark.finals.copy(), benchmark.losses.copy()
    finals[[starts, starts + 1]] = benchmark.finals[[starts + 1, starts]]
    losses[starts + 1] = 0.125
    wrong = Benchmark(
        before=benchmark.before,
        dice=benchmark.dice,
        finals=finals,
        lengths=benchmark.lengths,
        losses=losses,
    )
    write_bm(file, wrong)
    assert benchmark_error(str(file)).move_error == pytest.approx(0.125 * clear.mean())
