"""From runs to statements: intervals for every model, and who is better than whom.

Shapes: `seeds queries`, the value of a measure for every seed and query.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float

from moefold.demo.twins import CONTINUED, DENSE, MOE, UNTOUCHED
from moefold.evaluate import METRICS, Interval, crossed_bootstrap

MAIN = "ndcg@10"
TITLES = {
    UNTOUCHED: "untouched encoder",
    DENSE: "dense twin",
    CONTINUED: "dense twin, continued",
    MOE: "MoE",
}
# What is compared with what, the first being better where the difference is positive.
COMPARISONS = {
    "equal examples": (MOE, DENSE),
    "equal training compute": (MOE, CONTINUED),
    "MoE over the untouched encoder": (MOE, UNTOUCHED),
    "dense twin over the untouched encoder": (DENSE, UNTOUCHED),
}
VERDICTS = ("equal examples", "equal training compute")


def table_of(
    runs: Sequence[Mapping[str, Any]], model: str, metric: str
) -> Float[np.ndarray, "seeds queries"]:
    """The values of one model, seeds in the order of the runs."""
    return np.array(
        [run["results"][model]["values"][metric] for run in runs if model in run["results"]]
    )


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means with intervals of every model, and the comparisons.

    Args:
        runs: one per seed and kind, and the untouched encoder's.

    Returns:
        `models`: by model, its budget and an interval per measure; `comparisons`: by name, both
        models and an interval of the difference per measure.
    """
    models = {}
    for model in (UNTOUCHED, DENSE, CONTINUED, MOE):
        mine = [run["results"][model] for run in runs if model in run["results"]]
        models[model] = {
            "examples": mine[0]["examples"],
            "training_flops": mine[0]["flops"],
            "training_seconds": float(np.mean([one["seconds"] for one in mine])),
            **{m: asdict(crossed_bootstrap(table_of(runs, model, m))) for m in METRICS},
        }
    comparisons = {
        name: {
            "first": first,
            "second": second,
            **{m: asdict(difference(runs, first, second, m)) for m in METRICS},
        }
        for name, (first, second) in COMPARISONS.items()
    }
    return {"models": models, "comparisons": comparisons}


def difference(runs: Sequence[Mapping[str, Any]], first: str, second: str, metric: str) -> Interval:
    """The interval of `first - second`, paired by seed and query.

    The untouched encoder has one row, which stands for every seed.
    """
    return crossed_bootstrap(table_of(runs, first, metric) - table_of(runs, second, metric))


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """One sentence per budget: which one won, or that the two cannot be told apart."""
    return [_verdict(name, results["comparisons"][name][MAIN]) for name in VERDICTS]


def signed(value: float) -> str:
    """Four digits with a sign, and no minus before zero."""
    return f"{round(value, 4) + 0.0:+.4f}"


def _verdict(name: str, interval: Mapping[str, float]) -> str:
    low, high, mean = (interval[key] for key in ("low", "high", "mean"))
    span = f"{interval['level']:.0%} interval {signed(low)} to {signed(high)}"
    if Interval(**interval).excludes_zero:
        winner = "the MoE wins" if mean > 0 else "the dense twin wins"
        return f"At {name} {winner} by {abs(mean):.4f} nDCG@10 ({span})."
    return f"At {name} the two are not separable: MoE - dense = {signed(mean)} nDCG@10 ({span})."


def lines(results: Mapping[str, Any]) -> list[str]:
    """The comparison as lines of text, for a terminal."""
    head = ("", "examples", "TFLOP", "nDCG@10", "95% interval", "MRR@10", "recall@1", "recall@10")
    rows: list[tuple[str, ...]] = [head]
    for name, model in results["models"].items():
        main = model[MAIN]
        rows.append(
            (
                TITLES[name],
                str(model["examples"]),
                f"{model['training_flops'] / 1e12:.1f}",
                f"{main['mean']:.4f}",
                f"{main['low']:.4f}..{main['high']:.4f}",
                *(f"{model[metric]['mean']:.4f}" for metric in METRICS[1:]),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
