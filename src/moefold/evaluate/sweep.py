"""A sweep over budgets as data: what is asked, what was measured, and the file that keeps it.

    SweepConfig   ->   sweep_budgets   ->   Sweep(original, budgets)   ->   words, table, plot

Shapes: `documents`, `pairs`, as tuples.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moefold.evaluate.files import whole_file
from moefold.evaluate.intervals import Interval
from moefold.routers import RouterConfig

SCHEMA = 1
"""Version of the file of results."""

Rows = dict[float | None, "Measured"]
"""What was measured by budget; None for the untouched model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """What is measured.

    Attributes:
        router: the router, whose budget is set to one after the other.
        budgets: experts per token, on average.
        faithful: see `moefold.reroute`.
        length: tokens of a piece of text.
        tokens: most tokens of text to calibrate on, and as many to measure on.
        texts: most texts whose embeddings are compared with the untouched model's.
        batch_size: pieces in a batch.
        resamples: draws for an interval.

    Raises:
        ValueError: no budget, or one that is not above zero; a number below 1.
    """

    router: RouterConfig
    budgets: tuple[float, ...]
    faithful: bool = False
    length: int = 256
    tokens: int = 16384
    texts: int = 64
    batch_size: int = 8
    resamples: int = 1000

    def __post_init__(self) -> None:
        if not self.budgets:
            raise ValueError("there are no budgets; give some, as in 1,1.5,2")
        for budget in self.budgets:
            if not 0 < budget < float("inf"):
                raise ValueError(
                    f"budget is {budget}; it must be a finite number of experts above zero"
                )
        for name in ("tokens", "texts", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One router on the same text.

    Attributes:
        budget: experts per token asked for; None for the untouched model.
        experts_per_token: those a token really had, on average over tokens and mixtures.
        flops_per_token: floating-point operations of a forward pass, counted.
        perplexity: on the second half of the text; None where it would mean nothing.
        perplexity_ratio: over that of the untouched model.
        quality: Spearman x100 of cosines with people's scores; None without pairs.
        quality_change: against the untouched model.
        agreement: Spearman x100 of cosines with the untouched model's.
        losses: in nats, of every document.
        cosines: of every pair.
    """

    budget: float | None
    experts_per_token: float
    flops_per_token: float
    perplexity: Interval | None = None
    perplexity_ratio: Interval | None = None
    quality: Interval | None = None
    quality_change: Interval | None = None
    agreement: Interval | None = None
    losses: tuple[float, ...] | None = None
    cosines: tuple[float, ...] | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Measured":
        """The inverse of `dataclasses.asdict`, through JSON."""
        read: dict[str, Any] = {}
        for name in (field.name for field in fields(cls)):
            value = data[name]
            value = Interval(**value) if isinstance(value, Mapping) else value
            read[name] = tuple(value) if isinstance(value, list) else value
        return cls(**read)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All of it.

    Attributes:
        original: the untouched model.
        budgets: by rising budget.
        router: in words, without its budget.
        no_perplexity: why there is none; None where there is.
    """

    original: Measured
    budgets: tuple[Measured, ...]
    router: str
    no_perplexity: str | None

    def at(self, budget: float) -> Measured:
        """What was measured at a budget."""
        return next(one for one in self.budgets if one.budget == budget)

    def in_words(self, budget: float) -> str:
        """What a budget costs and saves against the untouched model."""
        one, old = self.at(budget), self.original
        saved = 100 * (1 - one.flops_per_token / old.flops_per_token)
        lines = [
            f"at a budget of {budget:g}: {abs(saved):.1f} % {'fewer' if saved >= 0 else 'more'} "
            f"FLOPs per token ({big(old.flops_per_token)} -> {big(one.flops_per_token)}), "
            f"{one.experts_per_token:.2f} experts per token instead of {old.experts_per_token:.2f}"
        ]
        if one.perplexity is not None and old.perplexity is not None:
            assert one.perplexity_ratio is not None
            ratio = (100 * (end - 1) for end in _ends(one.perplexity_ratio))
            lines.append(
                f"  perplexity {old.perplexity.mean:.2f} -> {shown(one.perplexity)}: "
                "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*ratio)
            )
        else:
            lines.append(f"  no perplexity: {self.no_perplexity}")
        if one.quality is not None and old.quality is not None:
            assert one.quality_change is not None
            lines.append(
                f"  Spearman x100 with people's scores {old.quality.mean:.2f} -> "
                f"{shown(one.quality)}: "
                "{:+.2f} [{:+.2f}, {:+.2f}]".format(*_ends(one.quality_change))
            )
        if one.agreement is not None:
            lines.append(
                f"  Spearman x100 with the untouched model's similarities {shown(one.agreement)}"
            )
        return "\n".join(lines)


def read_rows(file: Path, about: Mapping[str, Any]) -> Rows:
    """What a file of results holds; nothing if there is none.

    Args:
        file: the file.
        about: what is measured, and of what; the file must say the same.

    Raises:
        ValueError: it is no such file, or of another sweep.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        before, rows = dict(found["about"]), [Measured.from_dict(row) for row in found["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} holds no sweep over budgets ({error!r}); give another file, or remove it"
        ) from error
    now = json.loads(json.dumps(about))
    differ = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if differ:
        raise ValueError(
            f"{file} holds a sweep with another {', '.join(differ)}; give another file, or remove "
            f"it"
        )
    return {row.budget: row for row in rows}


def write_rows(
    file: Path, about: Mapping[str, Any], rows: Rows, surroundings: Mapping[str, Any]
) -> None:
    """Writes the file, whole or not at all.

    Args:
        file: the file.
        about: what is measured, and of what.
        rows: what was measured so far.
        surroundings: versions and the machine.
    """
    made = {
        "about": {**about},
        "surroundings": {**surroundings},
        "rows": [asdict(rows[budget]) for budget in sorted(rows, key=lambda b: b or 0.0)],
    }
    with whole_file(file) as new:
        new.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def big(number: float) -> str:
    """A number of operations, short: 12.3 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def shown(interval: Interval, digits: int = 4) -> str:
    """An interval as text, its ends with three digits: 20.40 [20.2, 20.6]."""
    mean, low, high = _ends(interval)
    return f"{_rounded(mean, digits)} [{_rounded(low, 3)}, {_rounded(high, 3)}]"


def _rounded(value: float, digits: int) -> str:
    """With so many digits that count, but no fewer than stand before the point."""
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:.{min(max(digits - before, 0), digits)}f}"


def _ends(interval: Interval) -> tuple[float, float, float]:
    return interval.mean, interval.low, interval.high


__all__ = ["Measured", "Rows", "Sweep", "SweepConfig", "big", "read_rows", "shown", "write_rows"]
