"""What a model has learnt of an expert, on one page: agreement, probabilities, how it was learnt.

    page = moefold.inspect.Page("my-expert")
    add_report(page, report), add_history(page, history), page.write(Path("my-expert.html"))

What a page is comes from elsewhere, so that this knows only what to say on it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moefold.preference.calibration import Reliability
from moefold.preference.figures import bars, chart
from moefold.preference.report import Report
from moefold.preference.trainer import History

SHOWN = 100
"""Decisions that a page of rankings shows."""

_SAID, _NAME = 160, 24
"""Characters of a candidate, and of a category beside its bar."""

_MOST = 10
"""Candidates of a decision, and bars of categories; the rest is told in numbers."""


def add_report(page: Any, report: Report) -> None:
    """How good a model is on decisions that it was not trained on.

    Args:
        page: a `moefold.inspect.Page`, or what has its methods.
        report: of a model.
    """
    _agreement(page, report)
    if report.categories:
        _categories(page, report.categories)
    if report.reliability is not None:
        _reliability(page, report.reliability)


def add_history(page: Any, history: History) -> None:
    """How a model was trained.

    Args:
        page: a `moefold.inspect.Page`, or what has its methods.
        history: of a run.
    """
    if not history.steps:
        return
    page.section("How it was learnt")
    points = list(zip(map(float, history.steps), history.loss, strict=True))
    page.figure(
        chart({"loss": points}, x_label="step", y_label="loss in training"),
        "Loss of the decisions that were trained on, a mean over the steps up to each point.",
    )
    if history.held_out is not None:
        points = zip(map(float, history.evaluated), history.held_out["agreement"], strict=True)
        page.figure(
            chart({"agreement": list(points)}, x_label="step", y_label="agreement", dots=True),
            "Agreement with the expert in the decisions that were held out.",
        )


def add_rankings(
    page: Any, decisions: Sequence[Sequence[tuple[str, float | None]]], *, total: int
) -> None:
    """Decisions with their candidates in the order of the model.

    Args:
        page: a `moefold.inspect.Page`, or what has its methods.
        decisions: the first of them, each its candidates, the best first, with the chance of each
            to be chosen (None where the comparator tells none).
        total: decisions there are in all.
    """
    shown = decisions[:SHOWN]
    page.section("Decisions", f"{len(shown):,} of {total:,}, the best candidate of each first.")
    for number, candidates in enumerate(shown):
        page.subsection(f"Decision {number}")
        rows = [(_cut(text), "" if p is None else _percent(p)) for text, p in candidates[:_MOST]]
        more = len(candidates) - len(rows)
        page.table(["candidate", "chance"], rows, caption=f"and {more} more" if more else "")


def add_settings(page: Any, settings: Mapping[str, object]) -> None:
    """What a model is, or was measured on, by name.

    Args:
        page: a `moefold.inspect.Page`, or what has its methods.
        settings: by name.
    """
    page.section("Settings")
    page.table(["setting", "value"], [(name, str(value)) for name, value in settings.items()])


def _agreement(page: Any, report: Report) -> None:
    details = [f"choosing blindly would agree in {_percent(report.chance)}"]
    if report.unseen is not None and report.unseen["groups"]:
        details.append(
            f"in {_percent(report.unseen['mean'])} of the {int(report.unseen['groups']):,} that "
            f"were not among the decisions it learnt from"
        )
    if report.regret is not None:
        details.append(f"its choices lose {report.regret:.4g} against the best, on average")
    page.verdict(
        f"In {_percent(report.agreement)} of {report.groups:,} decisions the model chooses as the "
        f"expert did.",
        details,
    )
    page.facts(
        [
            (
                _percent(report.agreement),
                "agreement",
                f"standard error {_percent(report.standard_error)}",
            ),
            (_percent(report.chance), "by chance", "choosing blindly"),
            (f"{report.groups:,}", "decisions", "compared"),
        ]
    )


def _categories(page: Any, categories: Mapping[str, Mapping[str, float]]) -> None:
    page.section("Agreement by category", "Lines are intervals of 95 %, from standard errors.")
    rows = [
        (_cut(name, _NAME), row["mean"], 1.96 * row["standard_error"])
        for name, row in categories.items()
    ]
    page.figure(
        bars(rows[:_MOST], label="share of decisions in which the model chooses as the expert did"),
        "Agreement with the expert, the largest category first.",
    )
    page.table(
        ["category", "agreement", "standard error", "decisions"],
        [
            (name, _percent(r["mean"]), _percent(r["standard_error"]), f"{int(r['groups']):,}")
            for name, r in categories.items()
        ],
    )


def _reliability(page: Any, told: Reliability) -> None:
    page.section(
        "Are its probabilities frequencies?",
        "Of two candidates the model says with which probability the expert prefers the one that "
        "it holds to be better. A point is a range of such probabilities, and how often they came "
        "true; on the dashed line probabilities are frequencies.",
    )
    points = list(zip(told.probability.tolist(), told.frequency.tolist(), strict=True))
    page.figure(
        chart(
            {"pairs": points},
            x_label="probability that was told",
            y_label="how often it came true",
            x_range=(0.5, 1.0),
            y_range=(min(0.5, *(y for _, y in points)), 1.0),
            diagonal=True,
            dots=True,
        ),
        f"{int(told.count.sum()):,} pairs. Mean distance from the line {told.error:.3f}, log loss "
        f"{told.log_loss:.3f} nats a pair.",
    )


def _percent(share: float) -> str:
    return "-" if share != share else f"{100 * share:.1f} %"


def _cut(text: str, most: int = _SAID) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
