"""Decisions to learn from: groups of candidates, and what the expert said of them.

All candidates lie one after the other, and `lengths` says how many belong to each group; nothing is
padded, since groups differ a hundredfold in size.

    candidates   a0 a1 a2  b0 b1  c0 c1 c2 c3      lengths  3 2 4
    chosen             2    0         1            counted inside the group

What is known may be the one that was chosen, ranks of some candidates or all, or a utility of each.

Shapes: `candidates *features` and `groups *features`; lists of texts in their place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefold.preference.checks import UNRANKED, assemble
from moefold.preference.ragged import fault_list, ranges, select


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Groups:
    """Groups of candidates, one decision each.

    Attributes:
        candidates: one after the other, as the scorer takes them: a tensor, or texts.
        lengths: how many candidates each group has.
        chosen: which the expert chose, counted inside the group.
        ranks: 0 for the best; equal ranks are ties; `UNRANKED` is below all that have a rank.
        utilities: what each is worth, more being better, in units of the data.
        context: what the candidates of a group share: a tensor with a row for each group, or texts.
        weights: how much each group counts, 1 if None.
        split: what a group must not be separated from when data are split, such as its match.
        category: what kind of decision it is, for diagnostics.

    Raises:
        ValueError: the parts do not fit together.
    """

    candidates: Tensor | list[str]
    lengths: Int[Tensor, " groups"]
    chosen: Int[Tensor, " groups"] | None = None
    ranks: Int[Tensor, " candidates"] | None = None
    utilities: Float[Tensor, " candidates"] | None = None
    context: Tensor | list[str] | None = None
    weights: Float[Tensor, " groups"] | None = None
    split: list[str] | None = None
    category: list[str] | None = None

    def __post_init__(self) -> None:
        told = int(self.lengths.sum())
        if told != len(self.candidates):
            raise ValueError(
                f"the lengths add up to {told} candidates, but there are {len(self.candidates)}; "
                f"candidates lie one after the other, group after group"
            )
        for name in _OF_CANDIDATES[1:] + _OF_GROUPS:
            value = getattr(self, name)
            wanted = len(self.lengths) if name in _OF_GROUPS else told
            if value is not None and len(value) != wanted:
                what = "groups" if name in _OF_GROUPS else "candidates"
                raise ValueError(f"{name} has {len(value)} entries for {wanted} {what}")

    @classmethod
    def of(
        cls,
        groups: Sequence[Any],
        *,
        chosen: Sequence[Any] | None = None,
        rankings: Sequence[Any] | None = None,
        utilities: Sequence[Any] | None = None,
        context: Sequence[Any] | Tensor | None = None,
        weights: Sequence[Any] | None = None,
        split: Sequence[object] | None = None,
        category: Sequence[object] | None = None,
        forced: str = "error",
    ) -> "Groups":
        """Groups from lists, arrays or tensors, checked.

        Args:
            groups: for each group an array `[candidates, *features]`, or texts.
            chosen: for each group the number of the chosen one from 0, or a mask with one True.
            rankings: for each group the numbers of candidates, best first; ties as a list inside,
                `[2, [0, 3], 1]`; candidates that are left out are below.
            utilities: for each group a number for each candidate.
            context: for each group what its candidates share.
            weights: for each group how much it counts.
            split: for each group what it must stay together with.
            category: for each group what kind it is.
            forced: "error" or "drop": what to do with a group of one, which teaches nothing.

        Raises:
            ValueError: names every group that is wrong, with its number, value and what to do.
        """
        return cls(
            **assemble(
                groups,
                chosen=chosen,
                rankings=rankings,
                utilities=utilities,
                context=context,
                weights=weights,
                split=split,
                category=category,
                forced=forced,
            )
        )

    def check(self) -> "Groups":
        """Looks at every value, which the constructor does not.

        Raises:
            ValueError: a group of fewer than two candidates, a choice that is not there, ranks
                without a first, a value that is no finite number, a negative weight; names the
                groups.
        """
        words = "group {} has {} candidates; a choice needs two"
        faults = list(fault_list(self.lengths < 2, words, self.lengths))
        if self.chosen is not None:
            outside = (self.chosen < 0) | (self.chosen >= self.lengths)
            faults += fault_list(
                outside,
                "group {} chooses candidate {} of {}; they are counted from 0",
                self.chosen,
                self.lengths,
            )
        if self.ranks is not None:
            broken = self._any(self.ranks < UNRANKED)
            faults += fault_list(broken, f"group {{}} has ranks below {UNRANKED}, which is no rank")
            headless = ~self._any(self.ranks == 0)
            faults += fault_list(headless, "group {} has no candidate of rank 0, which is the best")
        for name, what in (("candidates", "features"), ("context", "context")):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.is_floating_point():
                finite = value.isfinite().flatten(1).all(1) if value.ndim > 1 else value.isfinite()
                broken = ~finite if name == "context" else self._any(~finite)
                faults += fault_list(broken, f"group {{}} has {what} that are NaN or infinite")
        if self.utilities is not None:
            broken = self._any(~self.utilities.isfinite())
            faults += fault_list(broken, "group {} has utilities that are NaN or infinite")
        if self.weights is not None:
            bad = ~(self.weights >= 0) | ~self.weights.isfinite()
            faults += fault_list(
                bad, "group {} has weight {}; it must be zero or more, and finite", self.weights
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _any(self, of_candidates: Bool[Tensor, " candidates"]) -> Bool[Tensor, " groups"]:
        found = torch.zeros(len(self), dtype=torch.bool, device=of_candidates.device)
        return found.index_put((self.group_of_candidate[of_candidates],), torch.tensor(True))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> Int[Tensor, " groups"]:
        """Where each group begins."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def group_of_candidate(self) -> Int[Tensor, " candidates"]:
        """The number of each candidate's group."""
        return torch.arange(len(self), device=self.lengths.device).repeat_interleave(self.lengths)

    @property
    def is_labelled(self) -> bool:
        """Whether anything is known of which candidates are better."""
        return any(part is not None for part in (self.chosen, self.ranks, self.utilities))

    @property
    def best(self) -> Bool[Tensor, " candidates"]:
        """The chosen candidate of each group, or those of rank 0, or of the highest utility.

        Raises:
            ValueError: nothing is known.
        """
        if self.chosen is not None:
            found = torch.zeros(len(self.candidates), dtype=torch.bool, device=self.lengths.device)
            found[self.starts + self.chosen] = True
            return found
        if self.ranks is not None:
            return self.ranks == 0
        if self.utilities is not None:
            group = self.group_of_candidate
            lowest = self.utilities.new_full((len(self),), -torch.inf)
            highest = lowest.scatter_reduce(0, group, self.utilities, "amax")
            return self.utilities == highest[group]
        raise ValueError(
            "the groups say nothing of which candidates are better; give chosen, ranks or utilities"
        )

    def context_rows(self, index: Int[Tensor, " rows"]) -> Tensor | list[str] | None:
        """The context of these candidates, a row each.

        Args:
            index: numbers of candidates.
        """
        if self.context is None:
            return None
        return select(self.context, self.group_of_candidate[index])

    def take(
        self,
        index: Int[Tensor, " taken"] | Bool[Tensor, " groups"] | Sequence[int],
        *,
        starts: Int[Tensor, " groups"] | None = None,
    ) -> "Groups":
        """These groups, in this order.

        Args:
            index: their numbers, or a mask of all groups.
            starts: `starts`, where it is there already: to find it takes a look at every group,
                which is much for a few of many.

        Raises:
            ValueError: a mask of another length.
        """
        index = torch.as_tensor(index, device=self.lengths.device)
        if index.dtype == torch.bool:
            if len(index) != len(self):
                raise ValueError(f"the mask has {len(index)} entries for {len(self)} groups")
            index = index.nonzero().squeeze(1)
        index = index.long()
        lengths = self.lengths[index]
        rows = ranges((self.starts if starts is None else starts)[index], lengths)
        return type(self)(
            lengths=lengths,
            **{name: _selected(getattr(self, name), rows) for name in _OF_CANDIDATES},
            **{name: _selected(getattr(self, name), index) for name in _OF_GROUPS},
        )

    def with_candidates(self, kept: Bool[Tensor, " candidates"]) -> "Groups":
        """The same groups with these candidates only; the chosen ones must be among them."""
        group = self.group_of_candidate
        lengths = torch.zeros_like(self.lengths).index_add(0, group, kept.to(self.lengths))
        before = kept.cumsum(0) - kept.long()
        chosen = None
        if self.chosen is not None:
            first = lengths.cumsum(0) - lengths
            chosen = before[self.starts + self.chosen] - first
        rows = kept.nonzero().squeeze(1)
        parts = {name: _selected(getattr(self, name), rows) for name in _OF_CANDIDATES}
        return replace(self, lengths=lengths, chosen=chosen, **parts)

    def split_by(self, fraction: float, *, seed: int = 0) -> tuple["Groups", "Groups"]:
        """Two parts, in which no `split` id is on both sides.

        Args:
            fraction: share of groups in the second part, about.
            seed: of the draw.

        Raises:
            ValueError: the fraction is not between 0 and 1, or there is one id only.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction is {fraction}; it must lie between 0 and 1")
        ids = self.split if self.split is not None else [str(n) for n in range(len(self))]
        names = sorted(set(ids))
        if len(names) < 2:
            raise ValueError(f"all groups have the split id {names[0]!r}; a split needs two")
        place = {name: n for n, name in enumerate(names)}
        own = torch.tensor([place[name] for name in ids])
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        sizes = own.bincount(minlength=len(names))[order].cumsum(0)
        last = int((sizes < fraction * len(self)).sum()) + 1
        held = torch.isin(own, order[: min(last, len(names) - 1)])
        return self.take((~held).nonzero().squeeze(1)), self.take(held.nonzero().squeeze(1))

    def to(self, device: torch.device | str) -> "Groups":
        """The same on another device; texts stay where they are."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in parts.items()
        }
        return type(self)(**moved)

    def as_inputs(self) -> dict[str, Any]:
        """What is there by name, as a model is called; the inverse of `Groups(**inputs)`."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: value for name, value in parts.items() if value is not None}

    @classmethod
    def concatenate(cls, parts: Sequence["Groups"]) -> "Groups":
        """Groups after groups.

        Raises:
            ValueError: there are none, or some have a part that others lack.
        """
        if not parts:
            raise ValueError("there are no groups to put together")
        joined = {}
        for part in fields(cls):
            values = [getattr(one, part.name) for one in parts]
            have = [value is not None for value in values]
            if any(have) and not all(have):
                raise ValueError(
                    f"{part.name} is given for {sum(have)} of {len(parts)} parts; give it for all "
                    f"or none"
                )
            joined[part.name] = _joined(values) if all(have) else None
        return cls(**joined)


__all__ = ["UNRANKED", "Groups"]

_OF_CANDIDATES = ("candidates", "ranks", "utilities")
_OF_GROUPS = ("chosen", "context", "weights", "split", "category")


def _selected(items: Any, index: Tensor) -> Any:
    return None if items is None else select(items, index)


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    return [item for value in values for item in value]
