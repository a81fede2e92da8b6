"""Tables in Markdown of how cost grows: fitted exponents, and the points of some curves."""

from collections.abc import Callable, Mapping

from moefold.bench.columns import (
    Entry,
    Found,
    Setting,
    markdown,
    order,
    setting_text,
    settings_of,
    with_ends,
)
from moefold.bench.words import NOT_MEASURED, number

SCALING_MEANS = (
    "Time grows as this power of x, fitted through the points of a curve, with a 95 % interval "
    "from how far they are off it. A cost that hardly changes has an exponent near 0."
)


def scaling_table(found: Found) -> str:
    """Exponents of times."""
    return _curves(found, lambda name, line: "ms" in line, points=False)


SOFT_MEANS = (
    "Median ms of an inference pass of Soft MoE by the number of experts that share the same "
    "slots; dense is an MLP that has as much arithmetic."
)


def soft_table(found: Found) -> str:
    """Soft MoE's inference by experts, slots in all being fixed."""
    return _curves(found, lambda name, line: name == "soft experts", points=True)


MEMORY_MEANS = (
    "MiB at the peak of a training pass, beside weights and their gradients, by experts of a "
    "token. Finer experts: width times experts of a token stays, and so do all weights."
)


def memory_table(found: Found) -> str:
    """Of training, by experts of a token."""
    # Threads do not change what is alive: one of each dtype is enough.
    one_each = {
        name: {(dtype, 0): entry for (dtype, _), entry in entries.items()}
        for name, entries in found.items()
    }
    return _curves(one_each, lambda name, line: "mib" in line, points=True)


def _curves(found: Found, wanted: Callable[[str, Entry], bool], *, points: bool) -> str:
    """Lines of curves, each in every setting: exponents side by side, or all points.

    Args:
        found: curves by name.
        wanted: whether a line of a curve belongs here.
        points: give the points, and not only exponents.
    """
    lines: dict[tuple[str, str], dict[Setting, Entry]] = {}
    for name, entries in found.items():
        for setting, curve in entries.items():
            for line, values in curve["lines"].items():
                if wanted(name, values):
                    lines.setdefault((name, line), {})[setting] = values
    if not lines:
        return ""
    if not points:
        settings = settings_of(lines)
        rows = [
            [name, line, _ends(by), *(_exponent(by.get(one)) for one in settings)]
            for (name, line), by in lines.items()
        ]
        return markdown(["against", "of", "x", *map(setting_text, settings)], rows)
    every_x = sorted({x for by in lines.values() for values in by.values() for x in values["x"]})
    rows = []
    for (name, line), by in lines.items():
        for setting in sorted(by, key=order):
            values = by[setting]
            medians = values.get("mib") or [middle for _, middle, _ in values["ms"]]
            at = dict(zip(values["x"], map(number, medians), strict=True))
            cells = [at.get(x, "") for x in every_x]
            rows.append([name, line, setting_text(setting), *cells, _exponent(values)])
    return markdown(["", "of", "", *map(str, every_x), "exponent"], rows)


def _ends(by: Mapping[Setting, Entry]) -> str:
    x = [one for values in by.values() for one in values["x"]]
    return f"{min(x)} to {max(x)}"


def _exponent(line: Entry | None) -> str:
    if line is None:
        return NOT_MEASURED
    fit = line.get("fit")
    if fit is None:
        return ""
    if fit["low"] is None:
        return f"{fit['exponent']:.2f}"
    return with_ends([fit["low"], fit["exponent"], fit["high"]])


__all__ = [
    "MEMORY_MEANS",
    "SCALING_MEANS",
    "SOFT_MEANS",
    "memory_table",
    "scaling_table",
    "soft_table",
]
