"""The page: self-contained, escaped, consistent; figures that follow the page's colours."""

import re
from html.parser import HTMLParser

import pytest

from moefold.inspect import Page
from moefold.inspect.choices import Choices, SiteChoices
from moefold.inspect.plots import dots, lines, smooth
from moefold.inspect.who import short_name, who_chooses_whom

METRICS = {
    "experts_per_token": 1.5,
    "max_violation": 0.25,
    "entropy": 0.9,
    "uncovered": 0.0,
    "dropped": 0.0,
}
VOID = {"meta", "input", "br"}


def choices() -> Choices:
    """Two experts; the token <b> went to expert 1 first, then 0; "##c" to nobody."""
    site = SiteChoices(
        site="0.model.encoder.layer.3",
        load=(0.25, 0.75),
        mass=(0.25, 0.75),
        dead=(),
        coactivation=((1.0, 0.5), (0.4, 1.0)),
        metrics=METRICS,
        characteristic=((("<i>", 3.5, 12),), ()),
    )
    other = SiteChoices(
        site="0.model.encoder.layer.5",
        load=(0.0, 1.0),
        mass=(0.0, 1.0),
        dead=(0,),
        coactivation=None,
        metrics=METRICS,
        characteristic=((), ()),
    )
    tokens = (((1, 0.8), (0, 0.2)), ())
    return Choices(
        sites=(site, other),
        texts=(("<b>", "##c"),),
        chosen={site.site: (tokens,), other.site: (tokens,)},
        tokens=2,
    )


class Reader(HTMLParser):
    """Collects ids, references and text, and checks that elements nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        for name in ("href", "xlink:href", "for", "src"):
            self.references += [given[name] or ""] if name in given else []
        self.references += re.findall(r"url\((.*?)\)", str(given))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def page() -> Page:
    page = Page("A <title>", "lead & more")
    page.section("One & only", "text <script>")
    page.verdict("<win>", ["why & how"])
    page.facts([("1 < 2", "what", "remark")])
    page.table(["", "a<b"], [["row", "1\n0 to 2"]], caption="<cap>")
    page.figure(
        lines({"a": [([1, 2, 3], [3.0, 2.0, 1.0])] * 2, "b": [([1, 2], [1.0, 2.0])]},
              x_label="x", y_label="y", marks={"here": 2}),
        "cap",
    )  # fmt: skip
    page.figure(dots([("a", 0.1, 0.0, 0.2), ("b", 0.0, -1.0, 1.0)], x_label="x", zero=True), "cap")
    page.details("more", "<pre>")
    page.raw(who_chooses_whom(choices(), ["a <docstring>"]))
    return page


def test_nothing_is_fetched(page: Page):
    html = page.html()
    # Links of the namespaces of SVG are names, not addresses; matplotlib's are left out with them.
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert "<script" not in html
    assert "<link" not in html
    for reference in read(html).references:
        assert reference.startswith(("#", "site-")), reference


def test_references_lead_somewhere_and_ids_are_unique_but_for_shared_marks(page: Page):
    reader = read(page.html())
    for reference in reader.references:
        assert reference.removeprefix("#") in reader.ids
    # Two figures may define the same mark: its id is a hash of what it is.
    hashes = re.compile(r"[mp][0-9a-f]{10}")
    own = [name for name in reader.ids if not hashes.fullmatch(name)]
    assert len(own) == len(set(own))


def test_everything_that_is_text_is_escaped(page: Page):
    words = read(page.html()).words
    for text in ("A <title>", "lead & more", "text <script>", "<win>", "1 < 2", "a<b", "<cap>"):
        assert text in words
    assert "a <docstring>" in words
    assert "<i>" in words  # a characteristic token
    assert "<b>1" in words  # a token with the number of its expert


def test_figures_take_the_colours_and_the_type_of_the_page(page: Page):
    html = page.html()
    assert "var(--ink)" in html
    assert "#010203" not in html
    assert "#040506" not in html
    assert "font-family: 'DejaVu" not in html
    assert ">here</text>" in html  # text stays text


def test_the_same_input_gives_the_same_page():
    figure = [("a", 0.1, 0.0, 0.2)]
    assert dots(figure, x_label="x") == dots(figure, x_label="x")


def test_a_token_carries_its_heaviest_expert_and_names_all():
    html = who_chooses_whom(choices())
    assert 'title="expert 1: 0.80, expert 0: 0.20">&lt;b&gt;<sub>1</sub>' in html
    # A piece that continues a word stands directly behind it, and has no colour without an expert.
    assert '</sub></span><span class="t none" title="no expert">c</span>' in html


def test_loads_dead_experts_and_co_activation_are_told():
    first, second = who_chooses_whom(choices()).split('id="panel-1"')
    assert "25.0%" in first
    assert "75.0%" in first
    assert "Experts without any token: none." in first
    assert ">50%</td>" in first
    assert ">40%</td>" in first
    assert "Experts without any token: 0." in second
    assert "no co-activation to show" in second


@pytest.mark.parametrize(
    ("site", "short"),
    [
        ("0.model.encoder.layer.3", "layer 3"),
        ("encoder.block.2.mlp", "block 2"),
        ("mlp", "mlp"),
        ("0.1", "0.1"),
    ],
)
def test_short_names(site: str, short: str):
    assert short_name(site) == short


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([1.0, 5.0])[0] == pytest.approx(1.0)
    # After two steps: weights 0.85 * 0.15 and 0.15, normalised.
    assert smooth([1.0, 5.0])[1] == pytest.approx((0.85 * 1 + 5) / 1.85)


def test_a_page_is_written_as_utf_8(tmp_path):
    page = Page("\N{GREEK SMALL LETTER ALPHA}")
    page.write(tmp_path / "page.html")
    assert "\N{GREEK SMALL LETTER ALPHA}" in (tmp_path / "page.html").read_text(encoding="utf-8")
