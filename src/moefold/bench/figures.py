"""Figures of the page, drawn by matplotlib as those of `moefold.inspect.plots`."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from moefold.inspect.plots import _FAINT, _INK, _MARKERS, COLOURS, _figure, _svg

Row = tuple[str, Sequence[float], bool]


def shares(rows: Sequence[Row], *, x_label: str) -> str:
    """A point and its quartiles for each row, and a line where a share is one.

    Args:
        rows: name, quartiles, and whether it is ours, from the top down.
        x_label: what is shared.

    Returns:
        An `<svg>` element.
    """
    with _figure(7.2, 0.8 + 0.36 * len(rows)) as (figure, axes):
        for i, (_, (low, middle, high), mine) in enumerate(rows):
            colour = COLOURS[0] if mine else COLOURS[1]
            axes.plot([low, high], [i, i], color=colour, linewidth=3, solid_capstyle="round")
            axes.plot([middle], [i], _MARKERS[0 if mine else 1], color=colour, markersize=8)
        axes.axvline(1, color=_INK, linewidth=1.2)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel(x_label)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=_FAINT, linewidth=0.8)
        return _svg(figure)


def growth(lines: Mapping[str, Mapping[str, Any]], *, x_label: str, y_label: str) -> str:
    """Points on two logarithmic axes, with quartiles, and the power law through them.

    Args:
        lines: by name: `x`; `ms` as quartiles or `mib`; and `fit` if there is one.
        x_label: what x is.
        y_label: what y is.

    Returns:
        An `<svg>` element.
    """
    with _figure(7.2, 3.6) as (figure, axes):
        for (name, line), colour, marker in zip(
            lines.items(), itertools.cycle(COLOURS), itertools.cycle(_MARKERS), strict=False
        ):
            x = line["x"]
            points = line["ms"] if "ms" in line else [[value] * 3 for value in line["mib"]]
            label = name
            if fit := line.get("fit"):
                label = f"{name}: {x_label} to the power of {fit['exponent']:.2f}"
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
        axes.yaxis.set_major_locator(_decades())
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=_FAINT, linewidth=0.8)
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
        return _svg(figure)


def _decades() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1.0, 2.0, 5.0))


__all__ = ["growth", "shares"]
