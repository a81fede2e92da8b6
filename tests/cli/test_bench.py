"""`moefold bench`: its flags, its example, the page of files, and what is refused."""

import json
import re
from pathlib import Path

import pytest

from moefold.cli import main

FLAGS = sorted(
    [
        *("--parts", "--scaling", "--report", "--shapes", "--dtypes", "--backends", "--peers"),
        *("--models", "--batch", "--length", "--rounds", "--warmup", "--seed", "--threads"),
        *("--clock", "--allocator", "--gemm", "--most-seconds", "--device", "--output"),
        *("--tokens", "--sequences", "--dim", "--width", "--experts", "--router", "--k"),
        *("--capacity-factor", "--slots", "--plain", "--no-plain"),
    ]
)
SMALL = (
    "--tokens 32 --dim 16 --width 24 --experts 4 --gemm 16 --rounds 1 --warmup 1 --dtypes fp32 "
    "--peers none --allocator default --output out"
)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def help_text(capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_flags_are_frozen(capsys):
    found = re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_text(capsys))
    assert sorted(set(found) - {"--help"}) == FLAGS


def test_the_example_runs(capsys):
    (line,) = re.findall(r"^\s*\$ moefold (.*)$", help_text(capsys), re.MULTILINE)
    # Without the allocator it would have, which is for the whole process, and this is of tests.
    assert main([*line.split(), "--allocator", "default"]) == 0
    done = capsys.readouterr()
    assert "own, fp32: share of the dense MLP's speed" in done.out
    assert re.search(r"moefold +\d+\.\d ms +\d\.\d\d \[", done.out)
    assert "own, fp32: timing" in done.err
    (page,) = Path().glob("*.html")
    assert "<svg" in page.read_text()


def test_results_and_their_page(capsys):
    assert main(["bench", *SMALL.split(), "--parts", "layers"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"wrote out/bench-\d+T\d+\.json and bench-\d+T\d+\.html", shown)
    (file,) = Path("out").glob("*.json")
    results = json.loads(file.read_text())
    assert results["layers"][0]["shape"]["experts"] == 4
    assert main(["bench", "--report", str(file), str(file), "--output", "pages"]) == 0
    assert capsys.readouterr().out == "wrote pages/bench.html\n"
    assert "own, fp32" in Path("pages/bench.html").read_text()


def test_a_layer_of_ones_own(capsys):
    own = "--router soft --sequences 2 --plain --parts layers"
    assert main(["bench", *SMALL.split(), *own.split()]) == 0
    (file,) = Path("out").glob("*.json")
    shape = json.loads(file.read_text())["layers"][0]["shape"]
    assert (shape["router"], shape["gated"], shape["slots"]) == ("soft", False, 4)
    assert shape["active_width"] == 24  # as many slots as tokens
    capsys.readouterr()


REFUSED = {
    "--shapes 8x3": "unknown shape '8x3'; did you mean '8x2'? There are: 8x2, 64x8",
    "--shapes 8x2 --k 1": "--shapes names layers, and the other settings describe one; give either",
    "--peers sonic": "unknown peer 'sonic'",
    "--backends fusedd": "unknown backend 'fusedd'; did you mean 'fused'",
    "--experts 4 --k 5": "k=5 experts of a token, but there are 4",
    "--report none.json": "no file at none.json; give what `moefold bench` wrote",
    "--device tpu9": "unknown device 'tpu9'; give cpu or cuda",
    "--rounds 0": "rounds=0: it must be at least 1",
    "--threads -1": "threads=-1: it must be at least 1",
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_explained(line, capsys):
    assert main(["bench", *line.split()]) == 2
    error = capsys.readouterr().err
    assert REFUSED[line] in error
    assert "Traceback" not in error
    assert not list(Path().iterdir())
