"""Numbers of results as words, for the page and for tables in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moefold.bench.shapes import from_dict

Results = Mapping[str, Any]
NOT_MEASURED = "not measured"


def spread(values: Sequence[float]) -> str:
    """A median share, and its quartiles on a second line."""
    low, middle, high = values
    return f"{middle:.2f}\n{low:.2f} to {high:.2f}"


def spread_numbers(values: Sequence[float]) -> str:
    """A median of any size, and its quartiles on a second line."""
    low, middle, high = values
    return f"{number(middle)}\n{number(low)} to {number(high)}"


def number(value: float) -> str:
    """Three figures that count."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def exponent(fit: Mapping[str, Any] | None) -> str:
    """An exponent with its interval."""
    if fit is None:
        return ""
    if fit["low"] is None:
        return f"{fit['exponent']:.2f}"
    return f"{fit['exponent']:.2f}\n{fit['low']:.2f} to {fit['high']:.2f}"


def machine(results: Results) -> str:
    """Where it ran, in one line."""
    found = results["surroundings"]
    where = found.get("gpu") or f"{found['cpu']}, {found['threads']} of {found['cores']} cores"
    return f"{where}, torch {found['versions']['torch']}"


def processor_text(results: Results) -> str:
    """What it ran on, whatever it was told to use of it."""
    found = results["surroundings"]
    where = found.get("gpu") or f"{found['cpu']} ({found['capability']})"
    return f"{where}, torch {found['versions']['torch']}"


def load_text(results: Results) -> str:
    """How many processes wanted to run, before and after."""
    found = results["surroundings"]
    ends = [found.get(name) for name in ("load_before", "load_after")]
    return " to ".join(f"{one[0]:.1f}" for one in ends if one) or "not known"


def shape_text(data: Mapping[str, Any]) -> str:
    """A shape in words."""
    return from_dict(data).text


def timed(records: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """Records that have a number."""
    return [record for record in records if key in record]


def refused(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Records without one."""
    return [record for record in records if "refused" in record]


def record_of(entry: Mapping[str, Any], variant: str) -> Mapping[str, Any] | None:
    """The record of a variant."""
    return next((r for r in entry["records"] if r["variant"] == variant), None)


def best_peer(entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The record of the peer that is fastest in a training pass; None if none ran."""
    peers = [r for r in entry["records"] if r["kind"] == "peer" and "both_of_dense" in r]
    return max(peers, key=lambda record: record["both_of_dense"][1], default=None)


def setting_of(results: Results, entry: Mapping[str, Any]) -> tuple[str, int]:
    """The dtype of an entry and the threads it had, 0 on a GPU."""
    where = results["surroundings"]
    return entry["dtype"], 0 if where.get("gpu") else where["threads"]


def layers_of(several: Sequence[Results]) -> Iterator[tuple[Results, Mapping[str, Any]]]:
    """Every measured layer, with the results it is from."""
    for results in several:
        for entry in results.get("layers", ()):
            yield results, entry


def never_measured(several: Sequence[Results]) -> list[Mapping[str, Any]]:
    """Shapes that were left out in one of the results and are in none."""
    have = {entry["shape"]["name"] for _, entry in layers_of(several)}
    left_out = {}
    for results in several:
        for one in results.get("not_measured", ()):
            if one["shape"]["name"] not in have:
                left_out[one["shape"]["name"]] = one
    return list(left_out.values())


__all__ = [
    "NOT_MEASURED",
    "Results",
    "best_peer",
    "exponent",
    "layers_of",
    "load_text",
    "machine",
    "never_measured",
    "number",
    "processor_text",
    "record_of",
    "refused",
    "setting_of",
    "shape_text",
    "spread",
    "spread_numbers",
    "timed",
]
