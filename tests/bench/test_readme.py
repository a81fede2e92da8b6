"""READMEs whose numbers are made from committed results."""

import re

import pytest
from benchmarks import readme

from moefold.bench.results import write_results
from moefold.bench.tables import readme_tables
from tests.bench.by_hand import layer, mine, results
from tests.bench.common import TOKENS


@pytest.fixture
def file(tmp_path):
    """A file of results."""
    found = tmp_path / "results" / "bench-here.json"
    write_results(results(layers=[layer(TOKENS, "fp32", mine(0.9))]), found)
    return found


@pytest.mark.parametrize("page", readme.READMES, ids=lambda page: page.parent.name)
def test_committed_tables_are_those_of_the_committed_results(page):
    text, _ = readme.written(page, readme.committed())
    assert page.read_text() == text, "call: python -m benchmarks.readme"


def test_every_table_has_a_place():
    pages = "".join(page.read_text() for page in readme.READMES)
    assert sorted(re.findall("<!-- table: (.*?) -->", pages)) == sorted(readme_tables({}))


def test_a_readme_gets_its_tables(file, tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table: runs -->\nstale\n<!-- end of table -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["readme", str(file), "--readme", str(page)])
    readme.main()
    assert capsys.readouterr().out == f"wrote runs into {page}\n"
    text = page.read_text()
    assert text.startswith("before\n<!-- table: runs -->\n\n| results | machine |")
    assert text.endswith("<!-- end of table -->\nafter\n")
    assert "stale" not in text
    assert "| [bench-here](results/bench-here.json) |" in text
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "results"}


def test_several_files_become_one_table(file, tmp_path):
    page, other = tmp_path / "README.md", tmp_path / "bench-2-threads.json"
    page.write_text("<!-- table: speed -->\n<!-- end of table -->\n")
    write_results(results(layers=[layer(TOKENS, "fp32", mine(0.8))], threads=2), other)
    text, names = readme.written(page, [file, other])
    assert names == ["speed"]
    assert "| layer | fp32, 1 thread | fp32, 2 threads | memory, fp32 |" in text


def test_what_cannot_be_written_is_said(file, tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("no mark\n")
    monkeypatch.setattr("sys.argv", ["readme", str(file), "--readme", str(page)])
    with pytest.raises(SystemExit, match=r"has no mark for any of speed, layers, .*; put <!-- tab"):
        readme.main()
    page.write_text("<!-- table: speed -->\n")
    with pytest.raises(SystemExit, match="has no <!-- table: speed --> with <!-- end of table -->"):
        readme.main()
    assert page.read_text() == "<!-- table: speed -->\n"
    monkeypatch.setattr("sys.argv", ["readme", str(page), "--readme", str(page)])
    with pytest.raises(SystemExit, match=r"README\.md is no JSON file"):
        readme.main()
