"""From `results.json` to tables and a plot; no number comes from anywhere else.

The README holds each table between two marks, and `publish` writes what stands between them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from studies.language_model.embedded import embedding_table
from studies.tables import into_readme, table

Results = Mapping[str, Any]
PLOT = "results.png"
BUDGETS = "budgets.json"
"""What `moefold reroute` measured on the exported model, see the README."""


def tables(results: Results) -> dict[str, str]:
    """Every table in Markdown, by the name of its mark."""
    return {
        "data": _data(results),
        "training": _training(results),
        "judged": _judged(results),
        "rerouted": _rerouted(results),
        "embedded": table(*embedding_table(results)),
    }


def budget_table(found: Results) -> str:
    """The rows of `moefold reroute`, the untouched model first."""
    whole = found["rows"][0]["flops_per_token"]
    rows = []
    for row in found["rows"]:
        untouched = row is found["rows"][0]
        ratio = row["perplexity_ratio"]
        change = {end: math.log(ratio[end]) for end in _ENDS} if ratio else None
        rows.append(
            (
                "untouched" if untouched else f"{row['budget']:g}",
                f"{row['experts_per_token']:.2f}",
                f"{100 * row['flops_per_token'] / whole:.1f} %",
                f"{row['perplexity']['mean']:.1f}",
                "" if untouched or change is None else relative(change),
                f"{row['quality']['mean']:.1f}",
                "" if untouched else _interval(row["quality_change"]),
            )
        )
    heads = ("budget", "experts per token", "FLOPs", "perplexity", "change", "STS-B dev", "change")
    return table(heads, rows)


def _interval(change: Mapping[str, float]) -> str:
    mean, low, high = (f"{change[end]:+.1f}" for end in _ENDS)
    return f"{mean} ({low} to {high})".replace("-", "\N{MINUS SIGN}")


def _data(results: Results) -> str:
    data, count, settings = results["data"], results["parameters"], results["settings"]
    rows = [
        ("training text", f"{data['training_tokens']:,} tokens of {data['training_books']} books"),
        (
            "held-out text",
            f"{data['heldout_tokens']:,} tokens of {len(data['heldout_books'])} books by other "
            f"authors",
        ),
        ("vocabulary", f"{settings['vocabulary']:,}, byte-level BPE of the training text"),
        ("bytes in a held-out token", f"{data['heldout_bytes_per_token']:.2f}"),
        (
            "parameters",
            f"{count['all']:,}, of which a token uses {count['active']:,} (embeddings, shared with "
            f"the output: {count['embeddings']:,})",
        ),
        ("seeds", str(len(settings["seeds"]))),
        ("machine", f"{results['machine']['cpu']}, {results['machine']['cores']} cores"),
        (
            "versions",
            ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        ),
    ]
    return table(("", ""), rows)


def _training(results: Results) -> str:
    rows = [
        (
            arm,
            f"{told['tokens']:,}",
            f"{told['experts_per_token']:.2f}",
            _spread([s / 60 for s in told["seconds"]], ".1f"),
            _spread(told["tokens_per_second"], ",.0f"),
            f"{told['curve'][-1]:.3f}",
        )
        for arm, told in results["trained"].items()
    ]
    heads = (
        "trained with",
        "tokens",
        "experts per token",
        "minutes",
        "tokens per second",
        "last training loss",
    )
    return table(heads, rows)


def _judged(results: Results) -> str:
    rows = [
        (arm, rule, *_cells(found))
        for arm, by_rule in results["judged"].items()
        for rule, found in by_rule.items()
    ]
    return table(("trained with", "chooses by", *_HEADS), rows)


def _rerouted(results: Results) -> str:
    rows = [(rule, *_cells(found)) for rule, found in results["rerouted"].items()]
    return table(("rerouted to", *_HEADS), rows)


_HEADS = (
    "perplexity",
    "against token choice",
    "experts per token",
    "MFLOP per token",
    "leakage",
)


def _cells(found: Results) -> tuple[str, ...]:
    difference = found["difference"]
    same = difference["low"] == difference["high"] == 0
    return (
        perplexity(found["loss"]),
        "the same" if same else relative(difference),
        f"{found['experts_per_token']:.2f}",
        f"{found['flops_per_token'] / 1e6:.2f}",
        leaks(found["leakage"]),
    )


def leaks(found: Mapping[str, Any]) -> str:
    """What leaks, in words: tokens that go to other experts, of those that were compared."""
    if found["clean"]:
        return "none"
    kinds = {
        kind: found[kind]
        for kind in ("later", "others", "padding", "decoding")
        if found[kind]["rerouted"] or found[kind]["output"] > found["tolerance"]
    }
    return "**leaks**: " + ", ".join(
        f"{_WORDS[kind]} {one['rerouted']} of {one['tokens']}" for kind, one in kinds.items()
    )


_WORDS = {
    "later": "later tokens",
    "others": "other sequences",
    "padding": "padding",
    "decoding": "token by token",
}


def perplexity(loss: Mapping[str, float]) -> str:
    """A loss in nats with its interval, as perplexity."""
    mean, low, high = (f"{math.exp(loss[end]):.1f}" for end in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def relative(difference: Mapping[str, float]) -> str:
    """A difference of losses with its interval, as a change of perplexity in percent."""
    mean, low, high = (
        f"{100 * math.expm1(difference[end]):+.1f}" for end in ("mean", "low", "high")
    )
    return f"{mean} % ({low} to {high})".replace("-", "\N{MINUS SIGN}")


def _spread(values: Sequence[float], form: str) -> str:
    low, high = min(values), max(values)
    shown = f"{low:{form}}", f"{high:{form}}"
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]}"


def publish(results: Results, folder: Path) -> None:
    """Writes the tables into a folder's README and the plot beside it."""
    made = tables(results)
    if (folder / BUDGETS).is_file():
        swept = json.loads((folder / BUDGETS).read_text(encoding="utf-8"))
        made["budgets"] = budget_table(swept)
    into_readme(made, folder / "README.md")
    write_plot(results, folder / PLOT)


def write_plot(results: Results, path: Path) -> None:
    """Perplexity by router and rule, and of the rerouted models."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    judged = {f"{arm}: {r}": f for arm, rs in results["judged"].items() for r, f in rs.items()}
    rerouted = {
        f"{rule} ({found['flops_per_token'] / 1e6:.2f})": found
        for rule, found in results["rerouted"].items()
    }
    _plot_rows(left, judged, "Trained with: chooses by (red, hollow: sees later tokens)")
    _plot_rows(right, rerouted, "Token choice rerouted without training (MFLOP per token)")
    right.set_xscale("symlog", linthresh=10)
    right.set_xticks(ticks := (0, 5, 10, 20, 50), [str(tick) for tick in ticks])
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _plot_rows(axes: Any, rows: Results, title: str) -> None:
    for place, found in enumerate(rows.values()):
        mean, low, high = (100 * math.expm1(found["difference"][e]) for e in _ENDS)
        clean = found["leakage"]["clean"]
        axes.errorbar(
            mean,
            place,
            xerr=[[mean - low], [high - mean]],
            fmt="o",
            color="tab:blue" if clean else "tab:red",
            mfc="tab:blue" if clean else "white",
            capsize=3,
        )
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="0.7", lw=0.8)
    axes.set_xlabel("held-out perplexity against token choice, %")
    axes.set_title(title, fontsize=9)


_ENDS = ("mean", "low", "high")
