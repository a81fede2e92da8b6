"""What every figure is drawn with: colours, markers, a blank figure, and its SVG for a page.

The text of a figure stays text, in the page's own typeface, and its neutral colours become the
page's variables, so that one figure reads well on a light and on a dark background.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with any colour vision, readable on white and on near-black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A12", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Stand-ins that occur nowhere else, replaced by the page's variables in the finished SVG.
INK, FAINT = "#010203", "#040506"
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--rule)"}
# What would reach beyond the figure: metadata, rules for every element, ids that repeat, typefaces.
_NOT_FOR_A_PAGE = {
    r"<metadata>.*?</metadata>": "",
    r"<style[^>]*>.*?</style>": "",
    r'<g id="[^"]*"': "<g",
    r"font-family: [^;\"]*;?": "",
}


@contextmanager
def blank_figure(width: float, height: float) -> Iterator[tuple["Figure", "Axes"]]:
    """An empty figure with one pair of axes, in inches; it is in our style within the block."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "moefold",  # ids of markers and clips then depend on their content alone
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        yield figure, axes


def as_svg(figure: "Figure") -> str:
    """The `<svg>` element of a figure, with nothing that would reach beyond it."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    view = re.search(r'viewBox="[^"]+"', text)
    assert view is not None, "matplotlib writes a viewBox"
    body = re.search(r"<svg[^>]*>(.*)", text, flags=re.DOTALL)
    assert body is not None, "matplotlib writes an svg element"
    text = f'<svg {view[0]} class="figure" aria-hidden="true">{body[1]}'
    for pattern, replacement in _NOT_FOR_A_PAGE.items():
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text


__all__ = ["COLOURS", "FAINT", "INK", "MARKERS", "as_svg", "blank_figure"]
