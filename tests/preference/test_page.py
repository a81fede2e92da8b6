"""What is said of a model on a page: its numbers, escaped, with figures drawn to scale."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from moefold.inspect import Page
from moefold.preference.calibration import Reliability
from moefold.preference.figures import bars, chart
from moefold.preference.page import add_history, add_rankings, add_report, add_settings
from moefold.preference.report import Report
from moefold.preference.trainer import History

VOID = {"meta", "path", "line", "circle", "rect"}

RELIABILITY = Reliability(
    probability=torch.tensor([0.5, 0.75], dtype=torch.float64),
    frequency=torch.tensor([0.5, 1.0], dtype=torch.float64),
    count=torch.tensor([3, 1]),
    error=0.0625,
    log_loss=0.4375,
)
REPORT = Report(
    groups=1200,
    candidates=4800,
    chance=0.25,
    agreement=0.635,
    standard_error=0.0139,
    loss=0.4,
    regret=0.0123,
    unseen={"mean": 0.5, "standard_error": 0.1, "groups": 30},
    categories={
        "<b>contact</b>": {"mean": 0.75, "standard_error": 0.02, "groups": 1100},
        "race": {"mean": 0.125, "standard_error": float("nan"), "groups": 100},
    },
    reliability=RELIABILITY,
)


class Reader(HTMLParser):
    """The words of a page; fails where elements do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            assert name not in ("src", "srcset"), value
            assert name != "href" or (value or "").startswith("#")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def words_of(page: Page) -> str:
    reader = Reader()
    reader.feed(page.html())
    assert not reader.open
    return "\n".join(reader.words)


def whole() -> Page:
    page = Page("my-expert")
    add_report(page, REPORT)
    history = History(
        steps=(10, 20),
        loss=(0.7, 0.5),
        evaluated=(20,),
        held_out={"loss": (0.6,), "agreement": (0.635,)},
    )
    add_history(page, history)
    add_settings(page, {"seed": 7, "data": Path("a & b")})
    return page


def test_the_numbers_are_on_the_page():
    words = words_of(whole())
    for told in (
        "In 63.5 % of 1,200 decisions the model chooses as the expert did.",
        "choosing blindly would agree in 25.0 %",
        "in 50.0 % of the 30 that were not among the decisions it learnt from",
        "its choices lose 0.0123 against the best, on average",
        "standard error 1.4 %",
        "Agreement by category",
        "12.5 %",
        "4 pairs. Mean distance from the line 0.062, log loss 0.438 nats a pair.",
        "How it was learnt",
        "a & b",
    ):
        assert told in words, told
    assert "nan" not in words


def test_what_comes_from_data_is_escaped():
    page = whole()
    assert "<b>contact" not in page.html()
    assert "<b>contact</b>" in words_of(page)
    add_rankings(page, [[("<script>alert(1)</script>", 0.5), ("no", None)]], total=3)
    assert "<script" not in page.html()
    assert "1 of 3, the best candidate of each first." in words_of(page)


def test_what_is_not_known_is_not_shown():
    page = Page("bare")
    plain = Report(
        groups=2, candidates=4, chance=0.5, agreement=1.0, standard_error=float("nan"), loss=0.1
    )
    add_report(page, plain)
    add_history(page, History())
    words = words_of(page)
    assert "In 100.0 % of 2 decisions" in words
    assert "standard error -" in words
    for absent in ("lose", "category", "frequencies", "learnt"):
        assert absent not in words


def test_a_page_shows_the_first_decisions_and_candidates():
    page = Page("ranked")
    candidates = [(f"candidate {n}", 1 / (n + 2)) for n in range(13)]
    add_rankings(page, [candidates] * 150, total=2000)
    words = words_of(page)
    assert "100 of 2,000, the best candidate of each first." in words
    assert words.count("and 3 more") == 100
    assert "candidate 9" in words
    assert "candidate 10" not in words
    assert words.count("50.0 %") == 100


def test_a_chart_is_drawn_to_scale():
    # 640 x 278 between the axes, which begin at (64, 292).
    svg = chart(
        {"all": [(0, 0), (5, 1)]},
        x_label="x",
        y_label="<y>",
        x_range=(0, 10),
        y_range=(0, 2),
        diagonal=True,
        dots=True,
    )
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert [(float(x), float(y)) for x, y in circles] == [(64, 292), (384, 153)]
    # y = x leaves the chart at y = 2, a fifth of the way.
    assert 'd="M64.0 292.0L192.0 14.0"' in svg
    assert "&lt;y&gt;" in svg
    ticks = re.findall(r'text-anchor="middle" fill="var\(--ink\)">([\d.]+)<', svg)
    assert ticks == ["0", "2", "4", "6", "8", "10"]


def test_one_point_and_equal_values_can_be_drawn():
    for points in ([(3.0, 0.5)], [(1.0, 0.0), (2.0, 0.0)]):
        svg = chart({"loss": points}, x_label="step", y_label="loss")
        numbers = [float(n) for n in re.findall(r"[ML](\S+) ", svg)]
        assert all(64 <= n <= 704 for n in numbers)
        assert "nan" not in svg


def test_names_of_several_lines_are_shown():
    svg = chart({"a": [(0, 0), (1, 1)], "b": [(0, 1), (1, 0)]}, x_label="x", y_label="y")
    assert re.findall(r'text-anchor="end" fill="#\w+">(\w)<', svg) == ["a", "b"]


def test_bars_are_as_long_as_their_values():
    # The axis is 514 long, from 190.
    svg = bars([("half", 0.5, 0.1), ("all", 1.0, float("nan"))], label="share")
    assert re.findall(r'<rect x="190" y="\d+" width="([\d.]+)"', svg) == ["257.0", "514.0"]
    intervals = re.findall(
        r'<line x1="([\d.]+)" y1="\S+" x2="([\d.]+)" \S+ stroke="var\(--ink', svg
    )
    assert intervals == [("395.6", "498.4")]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: chart({"a": []}, x_label="x", y_label="y"), "there is no point to draw"),
        (lambda: bars([], label="share"), "there is no row to draw"),
    ],
    ids=["chart", "bars"],
)
def test_nothing_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
