"""Figures of the page, drawn as those of `moefold.inspect.plots`."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from moefold.inspect.drawing import COLOURS, FAINT, INK, MARKERS, as_svg, blank_figure

Row = tuple[str, Sequence[float], bool]


def shares(rows: Sequence[Row], *, x_label: str, one: str) -> str:
    """A point and its quartiles for each row, and a line where a share is one.

    Args:
        rows: name, quartiles, and whether it is ours, from the top down.
        x_label: what is shared.
        one: whose share is one.

    Returns:
        An `<svg>` element.
    """
    with blank_figure(7.2, 0.95 + 0.36 * len(rows)) as (figure, axes):
        for i, (_, (low, middle, high), mine) in enumerate(rows):
            which = 0 if mine else 1
            axes.plot([low, high], [i, i], color=COLOURS[which], linewidth=3,
                      solid_capstyle="round")  # fmt: skip
            axes.plot([middle], [i], MARKERS[which], color=COLOURS[which], markersize=8)
        axes.axvline(1, color=INK, linewidth=1.2)
        axes.annotate(
            one, (1, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
            textcoords="offset points", ha="center", va="bottom", color=INK, fontsize=9,
        )  # fmt: skip
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        # Layers of one page have the same axis, unless somebody is faster than that.
        axes.set_xlim(0, max(1.15, *(1.05 * high for _, (_, _, high), _ in rows)))
        axes.set_xlabel(x_label)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=FAINT, linewidth=0.8)
        return as_svg(figure)


def growth(lines: Mapping[str, Mapping[str, Any]], *, x_label: str, y_label: str) -> str:
    """Points on two logarithmic axes, with quartiles, and the power law through them.

    Args:
        lines: by name: `x`; `ms` as quartiles or `mib`; and `fit` if there is one.
        x_label: what x is.
        y_label: what y is.

    Returns:
        An `<svg>` element.
    """
    rows_of_names = (len(lines) + 1) // 2
    with blank_figure(7.2, 3.4 + 0.2 * rows_of_names) as (figure, axes):
        styles = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS))
        for (name, line), (colour, marker) in zip(lines.items(), styles, strict=False):
            x = line["x"]
            points = line["ms"] if "ms" in line else [[value] * 3 for value in line["mib"]]
            label = name
            if fit := line.get("fit"):
                label = f"{name}, to the power of {fit['exponent']:.2f}"
                ends = [min(x), max(x)]
                law = [fit["factor"] * one ** fit["exponent"] for one in ends]
                axes.plot(ends, law, color=colour, linewidth=1.2, linestyle=(0, (4, 2)), alpha=0.7)
            for at, (low, _, high) in zip(x, points, strict=True):
                axes.plot([at, at], [low, high], color=colour, linewidth=2)
            middles = [middle for _, middle, _ in points]
            axes.plot(x, middles, marker, color=colour, markersize=7, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({one for line in lines.values() for one in line["x"]})
        axes.set_xticks(ticks, [f"{one:g}" for one in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_locator(_round_numbers(*axes.get_ylim()))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=FAINT, linewidth=0.8)
        # Above the axes: inside, it would lie on some line of some run.
        axes.legend(frameon=False, labelcolor=INK, fontsize=9, ncols=2, loc="lower left",
                    bbox_to_anchor=(0, 1), borderaxespad=0.2)  # fmt: skip
        return as_svg(figure)


def _round_numbers(low: float, high: float) -> Any:
    """Where to write numbers on an axis, so that there are at least two of them."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    # A span with fewer than two of 1, 2, 5, 10 ... in it is as good as linear.
    if high / low < 5:
        return MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10])
    return LogLocator(base=10, subs=(1.0, 2.0, 5.0))


__all__ = ["growth", "shares"]
