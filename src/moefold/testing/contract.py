"""What a contract suite is: named checks, run one after the other, and a report.

A check is a function of a case. It raises if the invariant does not hold, returns the reason if the
invariant does not apply to the case, and None if it holds. All checks run before anything is
raised, so that one call tells everything that is wrong.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

Case = TypeVar("Case")
Check = Callable[[Case], str | None]


@dataclass(frozen=True, slots=True)
class Report:
    """What a suite found out about one subject that kept the contract.

    Attributes:
        subject: what was checked.
        ran: names of the invariants that hold.
        skipped: invariants that do not apply, or are declared exceptions, with the reason.
    """

    subject: str
    ran: tuple[str, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.subject}: {len(self.ran)} invariants hold"]
        lines += [f"  holds    {name}" for name in self.ran]
        lines += [f"  skipped  {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def run(
    subject: str,
    checks: Mapping[str, Check[Case]],
    case: Case,
    exceptions: Mapping[str, str] | None = None,
) -> Report:
    """Run every check on a case.

    Args:
        subject: what messages call it.
        checks: the contract, name to check.
        case: what the checks are given.
        exceptions: invariants that the subject declares not to keep, name to reason. An exception
            that turns out to hold is an error too: it would hide the day it stops to hold.

    Raises:
        AssertionError: an invariant does not hold; names all of them, and how.
        ValueError: an exception names no check.
    """
    exceptions = dict(exceptions or {})
    for name in exceptions:
        if name not in checks:
            raise ValueError(f"there is no check {name!r} to except; checks: {', '.join(checks)}.")
    ran, skipped, broken = [], {}, {}
    for name, check in checks.items():
        error, reason = _outcome(check, case)
        if name in exceptions and error is not None:
            skipped[name] = exceptions[name]
        elif error is not None:
            broken[name] = error
        elif reason is not None:
            skipped[name] = reason
        elif name in exceptions:
            broken[name] = AssertionError(
                f"is declared as an exception ({exceptions[name]}) but holds; remove the exception"
            )
        else:
            ran.append(name)
    if broken:
        lines = [f"{subject} breaks {len(broken)} of {len(checks)} invariants:"]
        alike: dict[str, list[str]] = {}  # one crash breaks many invariants: say it once
        for name, error in broken.items():
            alike.setdefault(_words(error), []).append(name)
        lines += [f"  {', '.join(names)}: {words}" for words, names in alike.items()]
        raise AssertionError("\n".join(lines)) from next(iter(broken.values()))
    return Report(subject, tuple(ran), skipped)


def without_a_case(members: Iterable[str], cases: Iterable[str]) -> tuple[str, ...]:
    """Return the registered members that no case covers; being registered means being tested."""
    covered = set(cases)
    return tuple(name for name in members if name not in covered)


@contextmanager
def from_seed(seed: int) -> Iterator[None]:
    """Draw from a fixed random state inside, and go on outside as if nothing had been drawn."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: for every kind of device that is absent it keeps a stack trace.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        yield


def _outcome(check: Check[Case], case: Case) -> tuple[Exception | None, str | None]:
    # Every check starts from the same random state, and leaves the caller's as it was.
    with from_seed(0):
        try:
            return None, check(case)
        except Exception as error:
            return error, None


def _words(error: Exception) -> str:
    text = str(error).strip()
    return text if isinstance(error, AssertionError) else f"raised {type(error).__name__}: {text}"
