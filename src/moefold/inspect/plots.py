"""Figures for a page, drawn by matplotlib and embedded as SVG.

The text of a figure stays text, in the page's own typeface, and its neutral colours become the
page's variables, so that one figure reads well on a light and on a dark background.
"""

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with any colour vision, readable on white and on near-black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A12", "#7F7F7F")
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Stand-ins that occur nowhere else, replaced by the page's variables in the finished SVG.
_INK, _FAINT = "#010203", "#040506"
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--rule)"}
# What would reach beyond the figure: metadata, rules for every element, ids that repeat, typefaces.
_NOT_FOR_A_PAGE = {
    r"<metadata>.*?</metadata>": "",
    r"<style[^>]*>.*?</style>": "",
    r'<g id="[^"]*"': "<g",
    r"font-family: [^;\"]*;?": "",
}


def lines(
    curves: Mapping[str, Sequence[tuple[Sequence[int], Sequence[float]]]],
    *,
    x_label: str,
    y_label: str,
    marks: Mapping[str, int] | None = None,
) -> str:
    """Smoothed curves, the mean of several per name (one per seed), each of them faint behind.

    Args:
        curves: by name, a list of (x, y), all with the same x.
        x_label: what x is.
        y_label: what y is.
        marks: vertical lines by name.

    Returns:
        An `<svg>` element.
    """
    with _figure(7.2, 3.4) as (figure, axes):
        styles = zip(itertools.cycle(COLOURS), itertools.cycle(_DASHES))
        for (name, runs), (colour, dash) in zip(curves.items(), styles, strict=False):
            smoothed = [smooth(y) for _, y in runs]
            for y in smoothed if len(runs) > 1 else ():
                axes.plot(runs[0][0], y, color=colour, alpha=0.3, linewidth=1)
            mean = [sum(values) / len(runs) for values in zip(*smoothed, strict=True)]
            axes.plot(runs[0][0], mean, color=colour, linewidth=2.2, linestyle=dash, label=name)
        for name, x in (marks or {}).items():
            axes.axvline(x, color=_INK, linewidth=1, linestyle=(0, (3, 3)))
            axes.annotate(
                name, (x, 1.0), xycoords=("data", "axes fraction"), xytext=(-4, -4),
                textcoords="offset points", ha="right", va="top", color=_INK, fontsize=9,
            )  # fmt: skip
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y", color=_FAINT, linewidth=0.8)
        axes.margins(x=0.01)
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor=_INK, loc="upper right")
        return _svg(figure)


def dots(
    rows: Sequence[tuple[str, float, float, float]], *, x_label: str, zero: bool = False
) -> str:
    """One row per name: a point and the interval around it.

    Args:
        rows: (name, value, low, high), from the top down.
        x_label: what the values are.
        zero: draw a line at zero, for differences.

    Returns:
        An `<svg>` element.
    """
    with _figure(7.2, 0.7 + 0.42 * len(rows)) as (figure, axes):
        for i, (_, value, low, high) in enumerate(rows):
            colour = COLOURS[i % len(COLOURS)]
            axes.plot([low, high], [i, i], color=colour, linewidth=3, solid_capstyle="round")
            axes.plot([value], [i], _MARKERS[i % len(_MARKERS)], color=colour, markersize=8)
        if zero:
            axes.axvline(0, color=_INK, linewidth=1.2)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(x_label)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=_FAINT, linewidth=0.8)
        return _svg(figure)


def smooth(values: Sequence[float], weight: float = 0.85) -> list[float]:
    """Exponential moving mean, corrected for its start (as Adam corrects its moments)."""
    out, mean = [], 0.0
    for step, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**step))
    return out


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple["Figure", "Axes"]]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "moefold",  # ids of markers and clips then depend on their content alone
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        yield figure, axes


def _svg(figure: "Figure") -> str:
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
