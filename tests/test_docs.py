"""Every Python block in the README and in docs/ runs, page by page, in the order it stands."""

import re
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

import moefold
from moefold import routers
from moefold.surgery import pretrained_encoder
from moefold.surgery.hosts import FORMS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


SLOW = {"demo"}  # its block trains two encoders


def as_case(page: Path) -> ParameterSet:
    marks = [pytest.mark.slow] if page.stem in SLOW else []
    return pytest.param(page, id=page.stem, marks=marks)


@pytest.mark.parametrize("page", [as_case(page) for page in PAGES if blocks(page)])
def test_code_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a block writes does not stay
    names: dict[str, object] = {"__name__": page.stem}
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_the_page_on_routers_names_every_router() -> None:
    text = (ROOT / "docs" / "routers.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([a-z-]+)` \|(?:[^|\n]*\|){5}$", text, re.MULTILINE))
    assert listed == set(routers.names())


def test_the_page_on_hosts_names_every_form() -> None:
    text = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`[^|\n]*) \|(?:[^|\n]*\|){4}$", text, re.MULTILINE)
    listed = set(re.findall(r"`([a-z0-9-]+)`", " ".join(first_cells)))
    # Forms that other tests describe are registered under names with a space.
    assert listed == {name for name in FORMS.names() if " " not in name} - {"block"}


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_plan_in_the_readme_is_the_one_that_is_printed() -> None:
    pytest.importorskip("sentence_transformers")
    shown = re.search(r"```text\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    assert PAGES[0].name == "README.md"
    assert shown is not None
    plan = moefold.upcycle(pretrained_encoder("minilm"), moefold.UpcycleConfig())
    # Rounding differs between machines.
    printed, wanted = (re.sub(r"\d\.\de-0[678]", "~", text) for text in (str(plan), shown.group(1)))
    assert printed.strip() == wanted.strip()
