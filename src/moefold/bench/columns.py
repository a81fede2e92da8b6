"""Markdown's side of a README's tables: settings told apart as columns, and how cells read."""

from collections.abc import Mapping, Sequence
from typing import Any

from moefold.bench.precision import DTYPES

Entry = Mapping[str, Any]
Setting = tuple[str, int]
"""A dtype and a number of threads, 0 on a GPU."""
Found = Mapping[str, Mapping[Setting, Entry]]
"""What one machine measured: by what it is of, then by setting."""


def with_ends(values: Sequence[float]) -> str:
    """A median with its quartiles, or an estimate with its interval, on one line."""
    low, middle, high = values
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def settings_of(found: Mapping[Any, Mapping[Setting, Entry]]) -> list[Setting]:
    """Every setting there is, in order."""
    return sorted({setting for entries in found.values() for setting in entries}, key=order)


def order(setting: Setting) -> tuple[int, int]:
    """What settings are sorted by."""
    dtype, threads = setting
    return list(DTYPES).index(dtype), threads


def setting_text(setting: Setting) -> str:
    """A setting in words."""
    dtype, threads = setting
    return f"{dtype}, {threads_text(threads)}" if threads else dtype


def threads_text(number: int) -> str:
    """A number of threads in words."""
    return f"{number} thread{'s' if number > 1 else ''}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


__all__ = [
    "Entry",
    "Found",
    "Setting",
    "markdown",
    "order",
    "setting_text",
    "settings_of",
    "threads_text",
    "with_ends",
]
