"""`moefold prefer`: a model that chooses as an expert does, from what the expert chose."""

import difflib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from moefold.preference.report import Report

VERBS = {
    "fit": ("moefold.cli.prefer_fit:main", "learn from an expert's choices, and save the model"),
    "rank": ("moefold.cli.prefer_apply:main_rank", "put candidates in the order of a saved model"),
    "evaluate": (
        "moefold.cli.prefer_apply:main_evaluate",
        "how often a saved model chooses as the expert did",
    ),
}
"""What can be done, where it is, and what it does."""

EXAMPLE = "moefold prefer fit choices.jsonl --output my-expert"


def main(arguments: Sequence[str]) -> None:
    """Runs what the first word says.

    Raises:
        ValueError: there is no such thing to do, or whatever it refuses.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        if arguments:
            sys.exit(0)
        return
    name, *rest = arguments
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {name!r}; {hint}There are: {', '.join(VERBS)}")
    module, _, function = VERBS[name][0].partition(":")
    getattr(import_module(module), function)(rest)


def in_words(report: Report) -> list[str]:
    """A report as lines of text."""
    lines = [
        f"agreement   {_share(report.agreement, report.standard_error)} of {report.groups:,} "
        f"decisions; choosing blindly {100 * report.chance:.1f} %"
    ]
    if report.unseen is not None and report.unseen["groups"]:
        share = _share(report.unseen["mean"], report.unseen["standard_error"])
        lines.append(f"  unseen    {share} of {int(report.unseen['groups']):,}, not in training")
    for name, row in (report.categories or {}).items():
        share = _share(row["mean"], row["standard_error"])
        lines.append(f"  {name:<9} {share} of {int(row['groups']):,}")
    if report.regret is not None:
        lines.append(f"regret      {report.regret:.4g} against the best, on average")
    if report.reliability is not None:
        lines.append(
            f"calibration error {report.reliability.error:.3f}, log loss "
            f"{report.reliability.log_loss:.3f} nats a pair, temperature {report.temperature:.3g}"
        )
    return lines


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Writes data, whole or not at all."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    new.replace(file)


def moving(bars: Any) -> Callable[[int, int], None]:
    """Moves bars by how far a job is and how far it goes; one that goes on begins with a leap.

    Args:
        bars: a `moefold.demo.bars.Bars` of nothing else.
    """
    done = 0

    def to(place: int, end: int) -> None:
        nonlocal done
        bars.expect(end)
        bars.advance(place - done)
        done = place

    return to


def _share(mean: float, error: float) -> str:
    spread = f" ± {100 * error:.1f}" if error == error else ""
    return f"{100 * mean:.1f}{spread} %"


def _help() -> str:
    lines = [f"  {name:<9} {summary}" for name, (_, summary) in VERBS.items()]
    return "\n".join(
        [
            "usage: moefold prefer {fit,rank,evaluate} ...",
            "",
            "Choose as an expert does, from what the expert chose.",
            "",
            *lines,
            "",
            "  moefold prefer fit --help   the settings, with an example",
            "",
            "example:",
            f"  $ {EXAMPLE}",
        ]
    )
