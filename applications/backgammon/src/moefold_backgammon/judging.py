"""What a player's choices are worth: against an engine's labels, a benchmark, or people.

Any player can be judged, for it is only asked to choose. Of a benchmark, the performance rating
(PR) is 500 times the mean equity that a decision loses, as elsewhere in backgammon.

Shapes: `n` decisions with `m` plays in all; `2 25` men by side and point, [opponent, mover].
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int8

from moefold.evaluate.files import whole_file
from moefold.preference import Groups, Report, agreement, by_category, regret, seen_before
from moefold.preference.report import Share, standard_error
from moefold_backgammon.bm import Benchmark
from moefold_backgammon.board import CATEGORIES, categories
from moefold_backgammon.data import groups_of_choices
from moefold_backgammon.decisions import Decisions
from moefold_backgammon.human import HumanDecisions
from moefold_backgammon.net import groups_of
from moefold_backgammon.players import Player
from moefold_backgammon.plays import plays

PER_POINT = 500
"""Performance rating of one point lost in every decision."""

_AT_ONCE = 256
"""Decisions that a player is asked about at a time, so that progress can be shown."""

Watch = Callable[[int, int], None]
"""Told of progress: decisions done, and of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkReport:
    """What a player did on a benchmark; `str(report)` is some lines to read.

    Attributes:
        player: its name.
        decisions: how many there were.
        loss: mean points lost, over all decisions; a play that is not listed is charged as the
            worst that is.
        standard_error: of it.
        best: share of the decisions in which its play loses nothing.
        listed: share in which its play is listed.
        categories: mean loss, standard error and number of `groups` (decisions) of each kind.
    """

    player: str
    decisions: int
    loss: float
    standard_error: float
    best: float
    listed: float
    categories: Mapping[str, Share]

    @property
    def rating(self) -> float:
        """The performance rating: 500 times the mean loss."""
        return PER_POINT * self.loss

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        kinds = {
            name: {"rating": PER_POINT * share["mean"], **share}
            for name, share in self.categories.items()
        }
        return _plain({**asdict(self), "rating": self.rating, "categories": kinds})

    def __str__(self) -> str:
        """Rating, loss and the kinds of positions."""
        lines = [
            f"{self.player}: PR {self.rating:.2f} (standard error "
            f"{PER_POINT * self.standard_error:.2f}), {self.loss:.4f} points lost in each of "
            f"{self.decisions:,} decisions; the best play in {self.best:.3f}, a listed one in "
            f"{self.listed:.3f}"
        ]
        lines += [
            f"  {name:<9} PR {PER_POINT * share['mean']:.2f} in {share['groups']:,}"
            for name, share in self.categories.items()
        ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class HumanReport:
    """How often a player chooses as people did; `str(report)` is some lines to read.

    All plays that are legal were there to choose from.

    Attributes:
        player: its name.
        matches: that were kept apart from training.
        human: agreement with the play that was made.
        engine: agreement with the play that the engine of the file lists first.
        human_unseen: as `human`, in decisions that the other matches do not have; None if there
            are no others.
        engine_unseen: as `engine`, in the same.
        people: agreement of the people with the engine.
        categories: as `human`, for each kind of position.
    """

    player: str
    matches: int
    human: Share
    engine: Share
    human_unseen: Share | None
    engine_unseen: Share | None
    people: Share
    categories: Mapping[str, Share]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return _plain(asdict(self))

    def __str__(self) -> str:
        """Agreement with both, everywhere and on what is new."""
        lines = [
            f"{self.player}: among all legal plays of {self.human['groups']:,} decisions in "
            f"{self.matches:,} matches",
            f"  as the people      {_said(self.human)}",
            f"  as the engine      {_said(self.engine)}",
        ]
        if self.human_unseen is not None and self.engine_unseen is not None:
            lines += [
                f"in {self.human_unseen['groups']:,} decisions that the other matches do not have",
                f"  as the people      {_said(self.human_unseen)}",
                f"  as the engine      {_said(self.engine_unseen)}",
            ]
        lines.append(f"people as the engine {_said(self.people)}")
        lines.append("as the people, by kind of position")
        lines += [f"  {kind:<18} {_said(share)}" for kind, share in self.categories.items()]
        return "\n".join(lines)


def choices(
    player: Player,
    before: Int8[np.ndarray, "n 2 25"],
    dice: Int8[np.ndarray, "n 2"],
    finals: Int8[np.ndarray, "m 2 25"],
    lengths: Int[np.ndarray, " n"],
    *,
    watch: Watch | None = None,
) -> Int[np.ndarray, " n"]:
    """What a player chooses, asked about some decisions at a time.

    Args:
        player: who is asked.
        before: the positions, [opponent, mover].
        dice: what was rolled.
        finals: the positions after each play, [opponent, mover].
        lengths: plays of each decision, at least one.
        watch: told of progress.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    found = []
    for at in range(0, len(lengths), _AT_ONCE):
        end = min(at + _AT_ONCE, len(lengths))
        some = finals[ends[at] : ends[end]]
        found.append(player.choose(before[at:end], dice[at:end], some, lengths[at:end]))
        if watch is not None:
            watch(end, len(lengths))
    return np.concatenate(found)


def judge_by_labels(player: Player, labels: Decisions, *, watch: Watch | None = None) -> Report:
    """Compares a player's choices with an engine's; every play as good as the best is right.

    Args:
        player: who is judged.
        labels: decisions with every play valued.
        watch: told of progress.

    Returns:
        A report without what only a model's values can tell: loss and reliability.
    """
    chosen = choices(player, labels.before, labels.dice, labels.finals, labels.lengths, watch=watch)
    groups = groups_of(labels, by_equity=True)
    taken = torch.zeros(len(labels.finals), dtype=torch.float64)
    taken[torch.from_numpy(labels.starts + chosen)] = 1
    hits = agreement(taken, groups)
    blind = np.add.reduceat(groups.best.numpy(), labels.starts) / labels.lengths
    return Report(
        groups=len(groups),
        candidates=len(labels.finals),
        chance=float(blind.mean()),
        agreement=float(hits.mean()),
        standard_error=standard_error(hits, groups),
        loss=math.nan,
        regret=float(regret(taken, groups).mean()),
        categories=by_category(hits, groups),
    )


def judge_by_benchmark(
    player: Player, benchmark: Benchmark, *, watch: Watch | None = None
) -> BenchmarkReport:
    """What a player's plays lose; it chooses among all that are legal.

    Args:
        player: who is judged.
        benchmark: decisions with their best plays.
        watch: told of progress.

    Raises:
        ValueError: the best play of a decision is not legal.
    """
    finals, lengths = plays(benchmark.before, benchmark.dice)
    _check_best(benchmark, finals, lengths)
    chosen = choices(player, benchmark.before, benchmark.dice, finals, lengths, watch=watch)
    losses, listed = benchmark.losses_of(finals[np.cumsum(lengths) - lengths + chosen])
    kinds = categories(benchmark.before)
    shares = {
        CATEGORIES[kind]: _share(losses[kinds == kind])
        for kind in np.argsort(-np.bincount(kinds), kind="stable")
        if (kinds == kind).any()
    }
    whole = _share(losses)
    return BenchmarkReport(
        player=player.name,
        decisions=len(benchmark),
        loss=whole["mean"],
        standard_error=whole["standard_error"],
        best=float((listed & (losses == 0)).mean()),
        listed=float(listed.mean()),
        categories=shares,
    )


def judge_by_people(
    player: Player, human: HumanDecisions, *, held_out: float, watch: Watch | None = None
) -> HumanReport:
    """How often a player chooses as people did in matches that were kept apart from training.

    Args:
        player: who is judged.
        human: all decisions of the file.
        held_out: the share of the matches that was kept apart, as in training; all if 1.
        watch: told of progress.

    Raises:
        ValueError: no match is kept apart.
    """
    apart = human.held_out(held_out)
    if not apart.any():
        raise ValueError(
            f"of {len(human.matches)} matches none is among the share {held_out} that is kept "
            f"apart; give a larger share, 1 for all"
        )
    some, rest = human.part(apart), human.part(~apart)
    told = some.decisions
    chosen = choices(player, told.before, told.dice, told.finals, told.lengths, watch=watch)
    groups = groups_of_choices(some)
    human_hits, engine_hits = _hits(chosen == told.chosen), _hits(chosen == some.best)
    new = None
    if len(rest):
        new = ~seen_before(groups, groups_of_choices(rest))
    return HumanReport(
        player=player.name,
        matches=len(np.unique(told.game)),
        human=_agreed(human_hits, groups),
        engine=_agreed(engine_hits, groups),
        human_unseen=None if new is None else _agreed(human_hits[new], groups.take(new)),
        engine_unseen=None if new is None else _agreed(engine_hits[new], groups.take(new)),
        people=_agreed(_hits(told.chosen == some.best), groups),
        categories=by_category(human_hits, groups),
    )


def write_json(file: Path, report: Report | BenchmarkReport | HumanReport, **more: Any) -> None:
    """Writes a report, whole or not at all.

    Args:
        file: the file to write.
        report: what was found.
        more: what else to say, such as of what it is.
    """
    text = json.dumps({**more, **report.to_dict()}, indent=1)
    with whole_file(file) as beside:
        beside.write_text(f"{text}\n", encoding="utf-8")


def _check_best(
    benchmark: Benchmark, finals: Int8[np.ndarray, "m 2 25"], lengths: Int[np.ndarray, " n"]
) -> None:
    best = benchmark.finals[np.cumsum(benchmark.lengths) - benchmark.lengths]
    owner = np.repeat(np.arange(len(benchmark)), lengths)
    legal = np.zeros(len(benchmark), bool)
    legal[owner[(finals == best[owner]).all(axis=(1, 2))]] = True
    wrong = np.flatnonzero(~legal)
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"the best play of {len(wrong)} of {len(benchmark)} decisions is not legal; the first "
            f"is number {at + 1}, with the dice {benchmark.dice[at].tolist()} on "
            f"{benchmark.before[at].tolist()}"
        )


def _hits(right: np.ndarray) -> Float[torch.Tensor, " n"]:
    return torch.from_numpy(right.astype(np.float64))


def _agreed(hits: Float[torch.Tensor, " n"], groups: Groups) -> Share:
    mean = float(hits.mean()) if len(hits) else math.nan
    return {"mean": mean, "standard_error": standard_error(hits, groups), "groups": len(hits)}


def _share(losses: Float[np.ndarray, " n"]) -> Share:
    spread = losses.std(ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return {
        "mean": float(losses.mean()),
        "standard_error": float(spread),
        "groups": len(losses),
    }


def _said(share: Share) -> str:
    return f"{share['mean']:.3f} (standard error {share['standard_error']:.3f})"


def _plain(value: Any) -> Any:
    """Dictionaries of numbers, those that are none being None."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


__all__ = [
    "BenchmarkReport",
    "HumanReport",
    "choices",
    "judge_by_benchmark",
    "judge_by_labels",
    "judge_by_people",
    "write_json",
]
