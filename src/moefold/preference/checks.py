"""From lists, arrays and tensors to the parts of `Groups`, with every fault named at once.

Shapes: `candidates *features` of one group.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from moefold.preference.ragged import SHOWN

UNRANKED = -1
"""The rank of a candidate of which only this is known: every ranked one is better."""

Parts = dict[str, Any]


def assemble(
    groups: Sequence[Any],
    *,
    chosen: Sequence[Any] | None,
    rankings: Sequence[Any] | None,
    utilities: Sequence[Any] | None,
    context: Sequence[Any] | Tensor | None,
    weights: Sequence[Any] | None,
    split: Sequence[object] | None,
    category: Sequence[object] | None,
    forced: str,
) -> Parts:
    """The arguments of `Groups`; see `Groups.of` for what is given.

    Raises:
        ValueError: names every fault, as `Groups.of` says.
    """
    if forced not in ("error", "drop"):
        raise ValueError(f"forced is {forced!r}; allowed: 'error', 'drop'")
    given = {
        "chosen": chosen,
        "rankings": rankings,
        "utilities": utilities,
        "context": context,
        "weights": weights,
        "split": split,
        "category": category,
    }
    told = {name: list(value) for name, value in given.items() if value is not None}
    for name, value in told.items():
        if len(value) != len(groups):
            raise ValueError(f"{name} has {len(value)} entries for {len(groups)} groups")
    faults = _Faults()
    bodies = [_body(group, f"group {n}", faults) for n, group in enumerate(groups)]
    numbers = range(len(groups))
    if forced == "drop":
        numbers = [n for n in numbers if len(bodies[n]) != 1]
    bodies = [bodies[n] for n in numbers]
    told = {name: [value[n] for n in numbers] for name, value in told.items()}
    for n, body in zip(numbers, bodies, strict=True):
        if len(body) < 2:
            faults.add(
                f"group {n} has {len(body)} candidates; a choice needs two (forced='drop' leaves "
                f"groups of one out)"
            )
    parts = _labels(told, list(zip(numbers, map(len, bodies), strict=True)), faults)
    parts["lengths"] = torch.tensor([len(body) for body in bodies], dtype=torch.long)
    parts["candidates"] = _together(bodies, numbers, "features", faults)
    if "context" in told:
        rows = [_one(value, n, faults) for value, n in zip(told["context"], numbers, strict=True)]
        parts["context"] = _together(rows, numbers, "context", faults)
    for name in ("split", "category"):
        if name in told:
            parts[name] = [str(value) for value in told[name]]
    faults.throw()
    return parts


def _labels(
    told: dict[str, list[Any]], each: list[tuple[int, int]], faults: "_Faults"
) -> dict[str, Any]:
    """What is said of groups, of which `each` has the number and length."""

    def read(name: str, how: Callable[..., Any]) -> list[Any]:
        given = zip(told[name], each, strict=True)
        return [how(value, n, length, faults) for value, (n, length) in given]

    parts: Parts = {}
    if "chosen" in told:
        parts["chosen"] = torch.tensor(read("chosen", _chosen), dtype=torch.long)
    if "rankings" in told:
        ranks = [rank for row in read("rankings", _ranks) for rank in row]
        parts["ranks"] = torch.tensor(ranks, dtype=torch.long)
    if "utilities" in told:
        parts["utilities"] = torch.cat([torch.zeros(0), *read("utilities", _utilities)])
    if "weights" in told:
        parts["weights"] = torch.tensor(read("weights", _weight), dtype=torch.float32)
    return parts


class _Faults:
    """What is wrong, gathered, so that it can be mended at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, fault: str) -> None:
        self.found.append(fault)

    def throw(self) -> None:
        if self.found:
            more = len(self.found) - SHOWN
            shown = self.found[:SHOWN] + ([f"and {more} more faults"] if more > 0 else [])
            raise ValueError("; ".join(shown))


def _body(group: Any, who: str, faults: _Faults) -> Tensor | list[str]:
    if isinstance(group, str):
        faults.add(f"{who} is one text, {group[:40]!r}; it must be a list of texts")
        return []
    if isinstance(group, Tensor):
        return group
    if isinstance(group, Sequence) and any(isinstance(one, str) for one in group):
        if not all(isinstance(one, str) for one in group):
            faults.add(f"{who} mixes texts with something else; all its candidates must be texts")
            return [str(one) for one in group]
        return list(group)
    try:
        if isinstance(group, Sequence):
            return torch.stack([torch.as_tensor(one) for one in group]) if group else []
        return torch.as_tensor(group)
    except (RuntimeError, TypeError, ValueError) as error:
        faults.add(f"{who} is no array [candidates, features] and no list of texts ({error})")
        return []


def _one(value: Any, n: int, faults: _Faults) -> Tensor | list[str]:
    if isinstance(value, str):
        return [value]
    try:
        return torch.as_tensor(value).unsqueeze(0)
    except (RuntimeError, TypeError, ValueError) as error:
        faults.add(f"group {n} has a context that is no array and no text ({error})")
        return []


def _together(
    bodies: list[Any], numbers: Sequence[int], what: str, faults: _Faults
) -> Tensor | list[str]:
    """One after the other; nothing, and a fault, if they are not of one kind, shape and finite."""
    filled = [(n, body) for n, body in zip(numbers, bodies, strict=True) if len(body)]
    kinds: dict[Any, int] = {}  # and the first group of each
    for n, body in filled:
        kinds.setdefault("texts" if isinstance(body, list) else tuple(body.shape[1:]), n)
        if isinstance(body, Tensor) and body.is_floating_point() and not body.isfinite().all():
            faults.add(f"group {n} has {what} that are NaN or infinite")
    if not bodies:
        faults.add("there are no groups; give at least one with two candidates")
    if not kinds:
        return []
    (first, of_first), *others = kinds.items()
    for kind, n in others:
        faults.add(
            f"group {n} has {what} {_in_words(kind)} and group {of_first} {_in_words(first)}; all "
            f"must have the same"
        )
    if others:
        return []
    if first == "texts":
        return [text for _, body in filled for text in body]
    return torch.cat([body for _, body in filled])


def _in_words(kind: str | tuple[int, ...]) -> str:
    return f"of shape {kind}" if isinstance(kind, tuple) else f"that are {kind}"


def _chosen(value: Any, n: int, length: int, faults: _Faults) -> int:
    items = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(items, Sequence) and not isinstance(items, str):
        places = [place for place, one in enumerate(items) if one]
        if len(items) != length:
            faults.add(f"group {n} has a mask of {len(items)} for {length} candidates")
        elif len(places) != 1:
            what = "none of its candidates" if not places else f"candidates {places}"
            faults.add(f"group {n} chooses {what}; exactly one must be chosen (or give rankings)")
        return places[0] if places else 0
    if not isinstance(items, int) or isinstance(items, bool):
        faults.add(f"group {n} chooses {items!r}; it must be the number of a candidate, from 0")
        return 0
    if not 0 <= items < length:
        faults.add(f"group {n} chooses candidate {items} of {length}; they are counted from 0")
    return items


def _ranks(value: Any, n: int, length: int, faults: _Faults) -> list[int]:
    ranks, found, sound = [UNRANKED] * length, 0, len(faults.found)
    for rank, tied in enumerate(_items(value)):
        if not (places := _items(tied)):
            faults.add(f"group {n} has no candidate at place {rank}; leave empty places out")
        for place in places:
            if not isinstance(place, int) or isinstance(place, bool):
                faults.add(f"group {n} ranks {place!r}; it must be the number of a candidate")
            elif not 0 <= place < length:
                faults.add(f"group {n} ranks candidate {place} of {length}; counted from 0")
            elif ranks[place] != UNRANKED:
                faults.add(
                    f"group {n} ranks candidate {place} twice, as {ranks[place]} and {rank}: a "
                    f"cycle, by which it is better than itself"
                )
            else:
                ranks[place], found = rank, found + 1
    if not found and len(faults.found) == sound:
        faults.add(f"group {n} ranks none of its candidates; rank one at least")
    return ranks


def _items(value: Any) -> list[Any]:
    """What a list, array or tensor holds, in Python's own types; of anything else itself."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, str) or not isinstance(plain, Iterable):
        return [plain]
    return [one.tolist() if hasattr(one, "tolist") else one for one in plain]


def _utilities(value: Any, n: int, length: int, faults: _Faults) -> Tensor:
    try:
        found = torch.as_tensor(value, dtype=torch.float32)
    except (RuntimeError, TypeError, ValueError) as error:
        faults.add(f"group {n} has utilities that are no numbers ({error})")
        return torch.zeros(length)
    if found.shape != (length,):
        faults.add(f"group {n} has {found.numel()} utilities for {length} candidates")
        return torch.zeros(length)
    if not found.isfinite().all():
        faults.add(f"group {n} has utilities that are NaN or infinite")
    return found


def _weight(value: Any, n: int, _: int, faults: _Faults) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        said = repr(value) if math.isnan(number) else number
        faults.add(f"group {n} has weight {said}; it must be zero or more, and finite")
    return number
