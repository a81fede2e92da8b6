"""From lists, arrays and tensors to the parts of `Groups`, with every fault named at once.

Shapes: `candidates *features` of one group.
"""

from collections.abc import Iterable, Sequence
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
    weights: Sequence[float] | None,
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
    lengths = [len(body) for body in bodies]
    parts: Parts = {"lengths": torch.tensor(lengths, dtype=torch.long)}
    for position, body in enumerate(bodies):
        if len(body) < 2:
            faults.add(
                f"group {numbers[position]} has {len(body)} candidates; a choice needs two (forced="
                f"'drop' leaves groups of one out)"
            )
    each = list(zip(numbers, lengths, strict=True))
    if "chosen" in told:
        found = [
            _chosen(value, n, length, faults)
            for value, (n, length) in zip(told["chosen"], each, strict=True)
        ]
        parts["chosen"] = torch.tensor(found, dtype=torch.long)
    if "rankings" in told:
        rows = [
            _ranks(value, n, length, faults)
            for value, (n, length) in zip(told["rankings"], each, strict=True)
        ]
        parts["ranks"] = torch.tensor([rank for row in rows for rank in row], dtype=torch.long)
    if "utilities" in told:
        rows = [
            _utilities(value, n, length, faults)
            for value, (n, length) in zip(told["utilities"], each, strict=True)
        ]
        parts["utilities"] = torch.cat(rows) if rows else torch.zeros(0)
    faults.throw()
    parts["candidates"] = _together(bodies)
    if "context" in told:
        parts["context"] = _together([_one(value) for value in told["context"]])
    if "weights" in told:
        parts["weights"] = torch.tensor(told["weights"], dtype=torch.float32)
    for name in ("split", "category"):
        if name in told:
            parts[name] = [str(value) for value in told[name]]
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
    if isinstance(group, Tensor):
        return group
    if isinstance(group, Sequence) and any(isinstance(one, str) for one in group):
        if not all(isinstance(one, str) for one in group):
            faults.add(f"{who} mixes texts with something else; all its candidates must be texts")
        return list(group)
    try:
        if isinstance(group, Sequence):
            return torch.stack([torch.as_tensor(one) for one in group]) if group else []
        return torch.as_tensor(group)
    except (RuntimeError, TypeError, ValueError) as error:
        faults.add(f"{who} is no array [candidates, features] and no list of texts ({error})")
        return []


def _one(value: Any) -> Tensor | list[str]:
    return [value] if isinstance(value, str) else torch.as_tensor(value).unsqueeze(0)


def _together(bodies: list[Any]) -> Tensor | list[str]:
    """One after the other.

    Raises:
        ValueError: some are texts and others not, or their features differ.
    """
    kinds = {isinstance(body, list) for body in bodies}
    if kinds == {True}:
        return [text for body in bodies for text in body]
    if len(kinds) > 1:
        raise ValueError("some groups are texts and others arrays; give one kind only")
    shapes = sorted({tuple(body.shape[1:]) for body in bodies})
    if len(shapes) > 1:
        raise ValueError(
            f"groups differ in their features: {', '.join(map(str, shapes))} of a candidate; all "
            f"must have the same"
        )
    if not bodies:
        raise ValueError("there are no groups; give at least one with two candidates")
    return torch.cat(bodies)


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
    ranks, found = [UNRANKED] * length, 0
    for rank, tied in enumerate(value.tolist() if hasattr(value, "tolist") else value):
        for place in tied if isinstance(tied, Iterable) else (tied,):
            if not 0 <= place < length:
                faults.add(f"group {n} ranks candidate {place} of {length}; counted from 0")
            elif ranks[place] != UNRANKED:
                faults.add(
                    f"group {n} ranks candidate {place} twice, as {ranks[place]} and {rank}: a "
                    f"cycle, by which it is better than itself"
                )
            else:
                ranks[place], found = rank, found + 1
    if not found:
        faults.add(f"group {n} ranks none of its candidates; rank one at least")
    return ranks


def _utilities(value: Any, n: int, length: int, faults: _Faults) -> Tensor:
    found = torch.as_tensor(value, dtype=torch.float32)
    if found.shape != (length,):
        faults.add(f"group {n} has {found.numel()} utilities for {length} candidates")
        return torch.zeros(length)
    return found
