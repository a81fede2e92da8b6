"""A sweep over budgets as a picture: what is lost against what is saved.

    perplexity           against FLOPs per token, in percent of the untouched model's
    embedding quality    against the same

A point for each budget, with two intervals: the thin one says how well its value is known, the
thick one how well its change against the untouched model is, which stands at 100 %.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefold.evaluate.intervals import Interval
from moefold.evaluate.sweep import Measured, Sweep
from moefold.inspect.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BUDGETS, _UNTOUCHED = COLOURS[0], COLOURS[1]
_GREY = "#555555"


@dataclass(frozen=True, slots=True)
class _Panel:
    """What one half shows.

    Attributes:
        title: what it is, and which way is better.
        untouched: of the untouched model.
        values: at every budget.
        changes: intervals of what the untouched model has and the change against it.
    """

    title: str
    untouched: Interval
    values: Sequence[Interval | None]
    changes: Sequence[tuple[float, float] | None]


def plot_sweep(sweep: Sweep, file: Path) -> None:
    """Draws a sweep into a PNG file.

    Args:
        sweep: what was measured.
        file: the file; it is replaced.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {"font.size": 10}
    settings |= {"axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        if sweep.no_perplexity is None:
            _draw(left, sweep, _of_perplexity(sweep))
        else:
            _note(left, f"perplexity is not measured: {sweep.no_perplexity}")
        _draw(right, sweep, _of_embeddings(sweep))
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.suptitle(f"{sweep.router}; beside a point, its budget of experts per token")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150, metadata={"Software": None})


def _of_perplexity(sweep: Sweep) -> _Panel:
    old = sweep.original.perplexity
    assert old is not None, "an untouched model looks at no later token"
    ratios = [one.perplexity_ratio for one in sweep.budgets]
    return _Panel(
        title="perplexity, lower is better",
        untouched=old,
        values=[one.perplexity for one in sweep.budgets],
        changes=[r and (old.mean * r.low, old.mean * r.high) for r in ratios],
    )


def _of_embeddings(sweep: Sweep) -> _Panel:
    """Against people's scores where there are some, else against the untouched model."""
    old = sweep.original.quality
    if old is None:
        return _Panel(
            title="agreement with the untouched model's similarities, Spearman x100",
            untouched=Interval(mean=100.0, low=100.0, high=100.0),
            values=[one.agreement for one in sweep.budgets],
            changes=[None for _ in sweep.budgets],
        )
    changes = [one.quality_change for one in sweep.budgets]
    return _Panel(
        title="similarities and people's scores, Spearman x100, higher is better",
        untouched=old,
        values=[one.quality for one in sweep.budgets],
        changes=[c and (old.mean + c.low, old.mean + c.high) for c in changes],
    )


def _draw(axes: "Axes", sweep: Sweep, panel: _Panel) -> None:
    old = sweep.original
    points = [
        (_share(one, old), value, change, one)
        for one, value, change in zip(sweep.budgets, panel.values, panel.changes, strict=True)
        if value is not None
    ]
    thin, thick = "rerouted, 95 % interval", "95 % interval of the change"
    line = {"color": _BUDGETS, "linewidth": 1, "alpha": 0.5, "zorder": 1}
    axes.plot([x for x, *_ in points], [value.mean for _, value, *_ in points], **line)
    for x, value, change, one in points:
        _point(axes, x, value, _BUDGETS, "o", thin)
        thin = None
        if change is not None:
            wide = {"color": _BUDGETS, "linewidth": 14, "alpha": 0.3, "solid_capstyle": "butt"}
            axes.plot([x, x], change, label=thick, zorder=1.5, **wide)
            thick = None
        where = {"xytext": (9, 6), "textcoords": "offset points"}
        axes.annotate(f"{one.budget:g}", (x, value.mean), color=_BUDGETS, fontsize=9, **where)
    dashes = {"linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 0}
    axes.axhline(panel.untouched.mean, color=_UNTOUCHED, **dashes)
    named = f"untouched, {old.experts_per_token:g} experts per token"
    _point(axes, 100.0, panel.untouched, _UNTOUCHED, "D", named)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("FLOPs per token, % of the untouched model's")
    axes.locator_params(axis="x", integer=True)
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.08, y=0.12)


def _point(
    axes: "Axes", x: float, value: Interval, colour: str, marker: str, label: str | None
) -> None:
    # Not `errorbar`: both ends of a percentile interval may lie on one side of the value.
    ends = [value.low, value.high]
    axes.plot([x, x], ends, color=colour, linewidth=1.4, zorder=2)
    axes.plot([x, x], ends, "_", color=colour, markersize=7, zorder=2)
    dot = {"color": colour, "markersize": 7, "linestyle": "none", "zorder": 3}
    axes.plot([x], [value.mean], marker, label=label, **dot)


def _note(axes: "Axes", text: str) -> None:
    """Words in place of a panel."""
    axes.set_axis_off()
    wrapped = "\n".join(textwrap.wrap(text, 46))
    axes.text(0.5, 0.5, wrapped, transform=axes.transAxes, ha="center", va="center", color=_GREY)


def _share(one: Measured, old: Measured) -> float:
    return 100 * one.flops_per_token / old.flops_per_token


__all__ = ["plot_sweep"]
