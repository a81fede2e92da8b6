"""Numbers of results as words, for the page and for tables in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moefold.bench.shapes import from_dict

Results = Mapping[str, Any]
PARTS = ("forward", "backward", "both")
NOT_MEASURED = "not measured"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """A median, and its quartiles on a second line."""
    low, middle, high = values
    return f"{middle:.{digits}f}\n{low:.{digits}f} to {high:.{digits}f}"


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


def shape_name(data: Mapping[str, Any]) -> str:
    """A shape's name."""
    return str(data["name"])


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
    "PARTS",
    "Results",
    "exponent",
    "layers_of",
    "machine",
    "never_measured",
    "number",
    "record_of",
    "refused",
    "shape_name",
    "shape_text",
    "spread",
    "timed",
]
