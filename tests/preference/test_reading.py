"""Decisions from files: every form gives the same groups, and every fault names its line."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moefold.preference import Groups, read, read_all

ROWS: list[dict[str, Any]] = [
    {"candidates": [[0.5, 2], [0.25, 1], [0, 5]], "chosen": 2, "split": "m1", "category": "race"},
    {"candidates": [[1, 1], [2, 2]], "chosen": 0, "split": "m2", "category": "contact"},
    {"candidates": [[3, 0], [0, 3], [1, 2]], "chosen": 1, "split": "m1", "category": "race"},
]


def lines(rows: list[Any]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def write_parquet(file: Path, rows: list[Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


FORMS: dict[str, Callable[[Path, list[Any]], Any]] = {
    "d.jsonl": lambda file, rows: file.write_bytes(lines(rows)),
    "d.jsonl.xz": lambda file, rows: file.write_bytes(lzma.compress(lines(rows))),
    "d.jsonl.gz": lambda file, rows: file.write_bytes(gzip.compress(lines(rows))),
    "d.parquet": write_parquet,
}


def same(one: Groups, other: Groups) -> bool:
    a, b = one.as_inputs(), other.as_inputs()
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        for name in a
    )


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_groups(name, tmp_path):
    FORMS[name](tmp_path / name, ROWS)
    groups = read_all(tmp_path / name)
    assert groups.lengths.tolist() == [3, 2, 3]
    assert isinstance(groups.candidates, torch.Tensor)
    assert groups.candidates.dtype == torch.float32
    assert groups.candidates[:4].tolist() == [[0.5, 2], [0.25, 1], [0, 5], [1, 1]]
    assert groups.chosen is not None
    assert groups.chosen.tolist() == [2, 0, 1]
    assert groups.split == ["m1", "m2", "m1"]
    assert groups.category == ["race", "contact", "race"]


@pytest.mark.parametrize("name", FORMS)
def test_pieces_are_the_whole_in_order(name, tmp_path):
    FORMS[name](tmp_path / name, ROWS)
    told: list[tuple[int, int]] = []
    pieces = list(read(tmp_path / name, at_once=2, advance=lambda *at: told.append(at)))
    assert [len(piece) for piece in pieces] == [2, 1]
    assert same(Groups.concatenate(pieces), read_all(tmp_path / name))
    assert told[-1][0] == told[-1][1] > 0
    assert told == sorted(told)


def test_what_else_may_be_known(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_bytes(
        lines(
            [
                {"candidates": ["a\u2028b", "c"], "ranking": [1], "context": "why?", "weight": 2},
                {"candidates": ["d", "e"], "ranking": [[0, 1]], "context": "how?", "weight": 0.5},
            ]
        )
        # An empty line, and what is null, are as if they were not there.
        + b'\n{"candidates": ["f", "g"], "ranking": [0, 1], "context": "", "weight": 1, '
        + b'"chosen": null}\n'
    )
    groups = read_all(file)
    assert groups.candidates == ["a\u2028b", "c", "d", "e", "f", "g"]
    assert groups.context == ["why?", "how?", ""]
    assert groups.ranks is not None
    assert groups.ranks.tolist() == [-1, 0, 0, 0, 0, 1]
    assert groups.weights is not None
    assert groups.weights.tolist() == [2, 0.5, 1]
    assert groups.chosen is None


def test_numbers_may_stand_alone_and_contexts_be_vectors(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines([{"candidates": [3, 4], "utilities": [0.1, 0.2], "context": [1, 2]}]))
    groups = read_all(file)
    assert isinstance(groups.candidates, torch.Tensor)
    assert isinstance(groups.context, torch.Tensor)
    assert groups.candidates.tolist() == [[3.0], [4.0]]
    assert groups.context.tolist() == [[1.0, 2.0]]
    assert groups.utilities is not None
    torch.testing.assert_close(groups.utilities, torch.tensor([0.1, 0.2]))


def test_a_lone_candidate(tmp_path):
    file = tmp_path / "d.jsonl"
    rows: list[Any] = [{"candidates": [[7, 7]], "chosen": 0}, *({**ROWS[1]},)]
    rows = [{name: row[name] for name in ("candidates", "chosen")} for row in rows]
    file.write_bytes(lines(rows))
    with pytest.raises(ValueError, match=r"d\.jsonl: line 1 has 1 candidates; a choice needs two"):
        read_all(file)
    assert read_all(file, forced="drop").lengths.tolist() == [2]
    kept = read_all(file, forced="keep")
    assert kept.lengths.tolist() == [1, 2]
    assert isinstance(kept.candidates, torch.Tensor)
    assert kept.candidates.tolist() == [[7, 7], [1, 1], [2, 2]]
    assert kept.chosen is not None
    assert kept.chosen.tolist() == [0, 0]
    file.write_bytes(lines([{"candidates": ["a"], "utilities": [0.5]}]))
    alone = read_all(file, forced="keep")
    assert alone.candidates == ["a"]
    assert alone.utilities is not None
    assert alone.utilities.tolist() == [0.5]
    with pytest.raises(ValueError, match="forced is 'skip'; allowed: 'error', 'drop', 'keep'"):
        read_all(file, forced="skip")


GOOD = {"candidates": [[0, 1], [1, 0]], "chosen": 0}
FAULTS: dict[str, tuple[Any, str]] = {
    "no object": ([1, 2], r"line 3 is no decision; write .*, not \[1, 2\]"),
    "no candidates": ({"chosen": 0}, "line 3 has no 'candidates'"),
    "no list": ({**GOOD, "candidates": 7}, "line 3 has candidates 7; it must be a list"),
    "ragged": ({**GOOD, "candidates": [[0, 1], [1]]}, "line 3 has candidates that are no texts"),
    "mixed": ({**GOOD, "candidates": ["a", 1]}, "line 3 has candidates of which some are texts"),
    "width": (
        {**GOOD, "candidates": [[0], [1]]},
        "line 3 has candidates of 1 numbers, those of line 1 are 2 numbers",
    ),
    "texts": ({**GOOD, "candidates": ["a", "b"]}, "line 3 has candidates of text, those of line 1"),
    "choice": ({**GOOD, "chosen": 2}, "line 3 chooses candidate 2 of 2; they are counted from 0"),
    "infinite": (
        {**GOOD, "candidates": [[0, 1], [1, float("inf")]]},
        "line 3 has features that are NaN or infinite",
    ),
    "lacking": ({"candidates": [[0, 1], [1, 0]]}, "line 3 lacks 'chosen', which line 1 has"),
    "more": ({**GOOD, "weight": 1}, "line 3 has 'weight', which line 1 lacks; all must be alike"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_its_line(fault, tmp_path):
    row, words = FAULTS[fault]
    (tmp_path / "d.jsonl").write_bytes(lines([GOOD]) + b"\n" + lines([row]))
    with pytest.raises(ValueError, match=f"d\\.jsonl: {words}"):
        read_all(tmp_path / "d.jsonl")


def test_all_faults_of_a_piece_are_told_at_once(tmp_path):
    bad = {**GOOD, "chosen": 5}
    (tmp_path / "d.jsonl").write_bytes(lines([bad, GOOD, bad]))
    with pytest.raises(ValueError, match=r"line 1 chooses candidate 5 .*; line 3 chooses cand"):
        read_all(tmp_path / "d.jsonl")
    rows = [GOOD, *({"chosen": 0} for _ in range(8))]
    (tmp_path / "d.jsonl").write_bytes(lines(rows))
    with pytest.raises(ValueError, match=r"line 2 has no 'candidates'; .*; and 3 more$"):
        read_all(tmp_path / "d.jsonl")
    write_parquet(tmp_path / "d.parquet", [GOOD, bad])
    with pytest.raises(ValueError, match=r"d\.parquet: row 2 chooses candidate 5 of 2"):
        read_all(tmp_path / "d.parquet")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"no file at .*nowhere\.jsonl; give decisions as \.jsonl"):
        read_all(tmp_path / "nowhere.jsonl")
    file = tmp_path / "d.jsonl"
    file.write_text('{"candidates": [[0], [1]], "chosen": 0}\n{"candidates":')
    with pytest.raises(ValueError, match=r"d\.jsonl, line 2 is no JSON \(.*; write one decision a"):
        read_all(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"d\.jsonl holds no decisions; write one a line"):
        read_all(file)
    file.write_text('{"candidates": [[0], [1]], "choosen": 0}\n')
    with pytest.raises(ValueError, match="line 1 has 'choosen'; did you mean 'chosen'"):
        read_all(file)
    whole = lzma.compress(lines(ROWS * 100))
    (tmp_path / "d.jsonl.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"d\.jsonl\.xz cannot be unpacked after line \d+ \("):
        read_all(tmp_path / "d.jsonl.xz")
    (tmp_path / "d.jsonl.gz").write_bytes(lines(ROWS))
    with pytest.raises(ValueError, match=r"d\.jsonl\.gz cannot be unpacked after line 0 \("):
        read_all(tmp_path / "d.jsonl.gz")
    (tmp_path / "d.parquet").write_bytes(lines(ROWS))
    with pytest.raises(ValueError, match=r"d\.parquet cannot be read as Parquet \("):
        read_all(tmp_path / "d.parquet")
    with pytest.raises(ValueError, match="at_once is 0; it must be 1 or more"):
        next(read(file, at_once=0))
