"""Data told apart by name; what is missing, cut off or of something else is refused."""

import lzma

import numpy as np
import pytest
import torch

from human_lines import human_lines
from moefold_backgammon.bm import Benchmark
from moefold_backgammon.board import start, swapped
from moefold_backgammon.data import groups_of_choices, open_data
from moefold_backgammon.human import HumanDecisions
from moefold_backgammon.plays import plays
from moefold_backgammon.position_id import encode_keys

LINES = human_lines(["one", "two"])


def test_human_decisions_compressed_or_not(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(LINES.encode()))
    one, other = open_data(tmp_path / "a.jsonl"), open_data(tmp_path / "a.jsonl.xz")
    assert isinstance(one, HumanDecisions)
    assert isinstance(other, HumanDecisions)
    assert (one.decisions.finals == other.decisions.finals).all()


def test_a_benchmark(tmp_path):
    finals = plays(start()[None], np.array([[3, 1]]))[0]
    line = f"m {encode_keys(start()[None])[0]} 3 1 {encode_keys(swapped(finals[:1]))[0]}\n"
    (tmp_path / "a.bm").write_text(line)
    assert isinstance(open_data(tmp_path / "a.bm"), Benchmark)


def test_choices_are_groups_without_equities(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    human = open_data(tmp_path / "a.jsonl")
    assert isinstance(human, HumanDecisions)
    assert np.isnan(human.decisions.equities).any()
    groups = groups_of_choices(human).check()
    assert groups.utilities is None
    assert groups.chosen is not None
    assert torch.equal(groups.chosen, torch.from_numpy(human.decisions.chosen).long())
    assert groups.split is not None
    assert set(groups.split) == {"0", "1"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("nowhere.bm", None, "nowhere.bm cannot be read as decisions: there is no such file"),
        ("some.txt", b"", r"some.txt is of no kind .* give a folder that label wrote, a \.bm file"),
        ("a.jsonl.bz2", b"", "a.jsonl.bz2 is of no kind"),
        ("a.jsonl.xz", lzma.compress(LINES.encode())[:-9], "a.jsonl.xz is cut off"),
        ("a.jsonl.xz", b"not packed at all", "a.jsonl.xz is cut off, or is not compressed"),
        ("a.bm.bz2", b"not packed at all", "a.bm.bz2 is not compressed"),
        ("a.jsonl", b"\xff\xfe\0", "a.jsonl is no text"),
        ("a.safetensors", b"short", "a.safetensors cannot be read as decisions"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        open_data(tmp_path / name)
