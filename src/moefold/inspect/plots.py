"""Figures for a page, drawn by matplotlib and embedded as SVG."""

import itertools
from collections.abc import Mapping, Sequence

from moefold.inspect.drawing import COLOURS, FAINT, INK, MARKERS, as_svg, blank_figure

_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))


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
    with blank_figure(7.2, 3.4) as (figure, axes):
        styles = zip(itertools.cycle(COLOURS), itertools.cycle(_DASHES))
        for (name, runs), (colour, dash) in zip(curves.items(), styles, strict=False):
            smoothed = [smooth(y) for _, y in runs]
            for y in smoothed if len(runs) > 1 else ():
                axes.plot(runs[0][0], y, color=colour, alpha=0.3, linewidth=1)
            mean = [sum(values) / len(runs) for values in zip(*smoothed, strict=True)]
            axes.plot(runs[0][0], mean, color=colour, linewidth=2.2, linestyle=dash, label=name)
        for name, x in (marks or {}).items():
            axes.axvline(x, color=INK, linewidth=1, linestyle=(0, (3, 3)))
            axes.annotate(
                name, (x, 1.0), xycoords=("data", "axes fraction"), xytext=(-4, -4),
                textcoords="offset points", ha="right", va="top", color=INK, fontsize=9,
            )  # fmt: skip
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.margins(x=0.01)
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor=INK, loc="upper right")
        return as_svg(figure)


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
    with blank_figure(7.2, 0.7 + 0.42 * len(rows)) as (figure, axes):
        for i, (_, value, low, high) in enumerate(rows):
            colour = COLOURS[i % len(COLOURS)]
            axes.plot([low, high], [i, i], color=colour, linewidth=3, solid_capstyle="round")
            axes.plot([value], [i], MARKERS[i % len(MARKERS)], color=colour, markersize=8)
        if zero:
            axes.axvline(0, color=INK, linewidth=1.2)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(x_label)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=FAINT, linewidth=0.8)
        return as_svg(figure)


def smooth(values: Sequence[float], weight: float = 0.85) -> list[float]:
    """Exponential moving mean, corrected for its start (as Adam corrects its moments)."""
    out, mean = [], 0.0
    for step, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**step))
    return out


__all__ = ["COLOURS", "dots", "lines", "smooth"]
