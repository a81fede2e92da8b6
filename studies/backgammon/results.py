"""From the files of a study to what is said of it: means over seeds and games, with intervals.

Values form a table, seeds by games, and both are drawn again. All nets are judged by the same games
and play with the same dice, so that differences are paired. Shapes: `seeds games`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from moefold.evaluate.intervals import crossed_bootstrap
from studies.backgammon.judging import STRENGTH, VERDICT
from studies.backgammon.settings import ARMS, Run, Settings
from studies.backgammon.training import RUN, place, rate_file
from studies.files import read_json
from studies.surroundings import surroundings

SCHEMA = 1
_LIBRARIES = ("moefold", "moefold-backgammon", "gnubg-nn", "torch", "transformers")
_BASE = "regression"
"""The arm that others are compared with, by games and by size."""


def summarise(settings: Settings, output: Path) -> dict[str, Any]:
    """What `results.json` holds, from the files of a study that is done."""
    parts = settings.runs()
    (strongest,) = parts["strongest"]
    return {
        "schema": SCHEMA,
        "settings": settings.to_dict(),
        "versions": {name: version(name) for name in _LIBRARIES},
        **surroundings(),
        "arms": {name: asdict(arm) for name, arm in ARMS.items()},
        "rates": {
            arm: read_json(rate_file(output, arm))
            for arm in ARMS
            if rate_file(output, arm).exists()
        },
        **{
            part: _compared(output, parts[part], against)
            for part, against in (
                ("methods", _BASE),
                ("sizes", _BASE),
                ("experts", "list"),
                ("people", "list"),
            )
        },
        "strongest": {
            **_one(output, [strongest]),
            "after": read_json(place(output, strongest) / RUN)["after"],
            "matches": read_json(place(output, strongest) / STRENGTH),
        },
    }


def _compared(output: Path, runs: Sequence[Run], against: str) -> list[dict[str, Any]]:
    """A row for each kind of net, compared with that of an arm at the same data and width."""
    by_kind: dict[tuple[int, str, int], list[Run]] = {}
    for run in runs:
        by_kind.setdefault((run.games, run.arm, run.hidden), []).append(run)
    rows = []
    for (games, arm, _), own in by_kind.items():
        # Of several widths the narrowest is what others are compared with.
        others = {h: found for (n, a, h), found in by_kind.items() if (n, a) == (games, against)}
        base = others[min(others)]
        row = _one(output, own)
        if own is not base:
            row["against"] = {
                "arm": against,
                "agreement": _interval(output, own, "agreement", base),
                "points": _interval(output, own, "points", base),
            }
        rows.append({"arm": arm, "games": games, **row})
    return rows


def _one(output: Path, runs: Sequence[Run]) -> dict[str, Any]:
    trained = [read_json(place(output, run) / RUN) for run in runs]
    verdicts = [read_json(place(output, run) / VERDICT) for run in runs]
    row: dict[str, Any] = {
        **{k: trained[0][k] for k in ("arm", "games", "passes", "hidden", "rate", "parameters")},
        "seeds": [run.seed for run in runs],
        "decisions": [one["decisions"] for one in trained],
        "cpu_seconds": [round(one["cpu_seconds"], 1) for one in trained],
        "agreement": _interval(output, runs, "agreement"),
        "regret": _interval(output, runs, "regret"),
        "points": _interval(output, runs, "points"),
        "agreement_of_seeds": [float(np.mean(one["agreement"])) for one in verdicts],
        "points_of_seeds": [float(np.mean(one["points"])) for one in verdicts],
        "won": float(np.mean([one["won"] for one in verdicts])),
        "by_category": _mean_of([one["by_category"] for one in verdicts]),
    }
    if "people" in verdicts[0]:
        row["people"] = [one["people"] for one in verdicts]
    if "phases" in verdicts[0]:
        row["phases"] = [one["phases"] for one in verdicts]
    return row


def _interval(
    output: Path, runs: Sequence[Run], what: str, base: Sequence[Run] | None = None
) -> dict[str, float]:
    """The mean over seeds and games, of the difference from other runs if there are some."""

    def table(of: Sequence[Run]) -> np.ndarray:
        return np.array([read_json(place(output, run) / VERDICT)[what] for run in of])

    values = table(runs) if base is None else table(runs) - table(base)
    return asdict(crossed_bootstrap(values, resamples=4000))


def _mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
