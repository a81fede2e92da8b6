"""Why a model cannot be exported and what can be done instead: all of it, in one error."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Reason(NamedTuple):
    """A reason against a format.

    Attributes:
        why: a clause.
        instead: what to do about it, if anything.
    """

    why: str
    instead: str = ""


def refusal(kind: str, format: str, reasons: Sequence[Reason], can: Iterable[str]) -> ValueError:
    """All the reasons in one error, with the nearest things that can be done.

    Args:
        kind: class of the model.
        format: the one asked for.
        reasons: against it.
        can: formats with no reason against them.
    """
    nearest = [f"format {name!r} can hold it" for name in can]
    nearest += [reason.instead for reason in reasons if reason.instead]
    parts = [
        f"cannot export a {kind} as {format!r}: {'; '.join(reason.why for reason in reasons)}",
        "; ".join(dict.fromkeys(nearest)) or "moefold.save and moefold.load keep it as it is",
    ]
    return ValueError(". Nearest: ".join(parts))


__all__ = ["Reason", "refusal"]
