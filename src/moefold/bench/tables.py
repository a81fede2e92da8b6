"""The numbers of a README as tables in Markdown, made from results."""

from collections.abc import Mapping, Sequence
from typing import Any

from moefold.bench.variants import OURS
from moefold.bench.words import (
    NOT_MEASURED,
    Results,
    layers_of,
    machine,
    never_measured,
    number,
    record_of,
    shape_text,
)

_GROUPED, _EAGER = "transformers grouped_mm", "transformers eager"


def readme_tables(several: Sequence[Results]) -> dict[str, str]:
    """Tables by name: `speed` of layers, `models`, `scaling`; those there are numbers for."""
    made = {"speed": _speed(several), "models": _models(several), "scaling": _scaling(several)}
    return {name: text for name, text in made.items() if text}


def _speed(several: Sequence[Results]) -> str:
    rows, machines = [], []
    for results, entry in layers_of(several):
        mine = record_of(entry, OURS)
        if mine is None or "both_of_dense" not in mine:
            continue
        machines.append(machine(results))
        rows.append(
            [
                shape_text(entry["shape"]),
                entry["dtype"],
                _share(mine),
                _best_peer(entry),
                _faster(entry, _GROUPED),
                _faster(entry, _EAGER),
                f"{mine['memory']['of_dense']:.2f}",
            ]
        )
    if not rows:
        return ""
    rows += [
        [shape_text(one["shape"]), "bf16", *[NOT_MEASURED] * 5] for one in never_measured(several)
    ]
    heads = [
        "layer",
        "dtype",
        "moefold",
        "best peer",
        "over `grouped_mm`",
        "over `eager`",
        "memory",
    ]
    return "\n\n".join(
        [
            _markdown(heads, rows),
            "Forward and backward, as a share of the speed of a dense MLP of the same active "
            "width: medians over rounds, with quartiles. Over: how many times as fast as "
            "transformers' expert functions. Memory: peak of a training pass, less the weights "
            "and gradients beyond the dense MLP's, as a share of its peak. "
            + "; ".join(dict.fromkeys(machines))
            + ".",
        ]
    )


def _models(several: Sequence[Results]) -> str:
    rows = []
    for results in several:
        for entry in results.get("models", ()):
            for record in entry.get("records", ()):
                if "ms" not in record or record["variant"] == "dense":
                    continue
                low, middle, high = record["times_dense"]
                rows.append(
                    [
                        f"{entry['model']}, {entry['batch']} texts of {entry['length']} tokens",
                        entry["dtype"],
                        record["variant"],
                        f"{middle:.2f} ({low:.2f} to {high:.2f})",
                        f"{record['flops_of_dense']:.2f}",
                    ]
                )
    if not rows:
        return ""
    heads = ["encoder", "dtype", "mixture", "time, of dense", "operations, of dense"]
    return _markdown(heads, rows)


def _scaling(several: Sequence[Results]) -> str:
    rows = []
    for results in several:
        for curve in results.get("scaling", ()):
            for name, line in curve["lines"].items():
                values = [v[1] for v in line["ms"]] if "ms" in line else line["mib"]
                ends = f"{line['x'][0]} to {line['x'][-1]}"
                rows.append(
                    [
                        f"{curve['name']}, {curve['dtype']}",
                        name,
                        ends,
                        f"{number(values[0])} to {number(values[-1])} {curve['y'].split()[0]}",
                        _interval(line.get("fit")),
                    ]
                )
    if not rows:
        return ""
    return _markdown(["cost against", "of", "from, to", "costs", "exponent"], rows)


def _share(record: Mapping[str, Any]) -> str:
    low, middle, high = record["both_of_dense"]
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _best_peer(entry: Mapping[str, Any]) -> str:
    peers = [r for r in entry["records"] if r["kind"] == "peer" and "both_of_dense" in r]
    if not peers:
        return "none can run it"
    best = max(peers, key=lambda record: record["both_of_dense"][1])
    return f"{best['both_of_dense'][1]:.2f}, {best['variant']}"


def _faster(entry: Mapping[str, Any], variant: str) -> str:
    record = record_of(entry, variant)
    if record is None or "both_ours_faster" not in record:
        return ""
    return f"{record['both_ours_faster'][1]:.2f}"


def _interval(fit: Mapping[str, Any] | None) -> str:
    if fit is None:
        return ""
    if fit["low"] is None:
        return f"{fit['exponent']:.2f}"
    return f"{fit['exponent']:.2f} ({fit['low']:.2f} to {fit['high']:.2f})"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


__all__ = ["readme_tables"]
