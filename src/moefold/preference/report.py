"""What a model is worth on decisions, in numbers; and the temperature of its probabilities.

    calibrate(model, some)                 on decisions that it was not trained on
    report = measure(model, others)        and on others again, for probabilities were fitted too

Shapes: `groups`, `candidates`, `pairs`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from moefold.preference.calibration import Reliability, fit_temperature, reliability
from moefold.preference.comparators import ConsistentComparator, log_odds
from moefold.preference.diagnostics import agreement, by_category, regret, seen_before
from moefold.preference.groups import Groups
from moefold.preference.model import PreferenceModel, in_parts, mean_loss
from moefold.preference.pairs import Pairs, pairs_of
from moefold.preference.ragged import total

Share = Mapping[str, float]
"""`mean`, `standard_error` and number of `groups`."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a model did on decisions of an expert.

    Attributes:
        groups: how many there were.
        candidates: in all of them.
        chance: agreement of a blind choice.
        agreement: share of groups in which the choice is the expert's, ties shared.
        standard_error: of it; groups of one `split` id are not taken for independent.
        loss: mean over groups.
        temperature: by which log-odds were divided for `reliability`.
        regret: mean utility lost; None where utilities are not known.
        unseen: agreement on groups that are not among the known ones; None if none were given.
        categories: agreement in each; None where there are none.
        reliability: of the probabilities of pairs.
    """

    groups: int
    candidates: int
    chance: float
    agreement: float
    standard_error: float
    loss: float
    temperature: float = 1.0
    regret: float | None = None
    unseen: Share | None = None
    categories: Mapping[str, Share] | None = None
    reliability: Reliability | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON: what is no number is None."""
        told = asdict(replace(self, reliability=None))
        if self.reliability is not None:
            told["reliability"] = {
                name: value.tolist() if isinstance(value, Tensor) else value
                for name, value in asdict(self.reliability).items()
            }
        return _plain(told)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """The inverse of `to_dict`."""
        told = _numbers(dict(data))
        if told.get("reliability") is not None:
            parts: dict[str, Any] = dict(told["reliability"])
            for name, kind in _BINS.items():
                parts[name] = torch.tensor(parts[name], dtype=kind)
            told["reliability"] = Reliability(**parts)
        return cls(**told)


def measure(
    model: PreferenceModel,
    groups: Groups,
    *,
    known: Groups | None = None,
    values: Float[Tensor, " candidates"] | None = None,
) -> Report:
    """Compares a model's choices with an expert's.

    Args:
        model: any.
        groups: labelled, and not those that it was trained on.
        known: those it was trained on, to tell apart what it may have learnt by heart.
        values: what `model.values` says of the groups, if it has been asked.

    Raises:
        ValueError: there are no groups, or nothing is known of them.
    """
    if not len(groups) or not groups.is_labelled:
        raise ValueError(
            f"there are {len(groups)} groups, labelled: {groups.is_labelled}; give at least one, "
            f"with chosen, ranks or utilities"
        )
    values = model.values(groups) if values is None else values
    hits = agreement(values, groups)
    of_chance = total(groups.best.double(), groups.group_of_candidate, len(groups))
    unseen = None
    if known is not None:
        new = (~seen_before(groups, known)).nonzero().squeeze(1)
        unseen = {
            "mean": float(hits[new].mean()),
            "standard_error": standard_error(hits[new], groups.take(new)),
            "groups": len(new),
        }
    z = _log_odds(model, groups, values, pairs_of(groups))
    return Report(
        groups=len(groups),
        candidates=len(groups.candidates),
        chance=float((of_chance / groups.lengths).mean()),
        agreement=float(hits.mean()),
        standard_error=standard_error(hits, groups),
        loss=mean_loss(model, groups, values),
        temperature=model.temperature,
        regret=None if groups.utilities is None else float(regret(values, groups).mean()),
        unseen=unseen,
        categories=None if groups.category is None else by_category(hits, groups),
        reliability=reliability(z, temperature=model.temperature) if len(z) else None,
    )


def calibrate(model: PreferenceModel, groups: Groups) -> float:
    """Sets the model's temperature by groups that it was not trained on, and returns it.

    It stays 1 where no temperature is best: if all pairs are told right, or there are none.

    Args:
        model: any.
        groups: labelled.
    """
    pairs = pairs_of(groups)
    z = _log_odds(model, groups, model.values(groups), pairs)
    both = bool((z > 0).any()) and bool((z < 0).any())
    model.temperature = fit_temperature(z, pairs.weight.cpu()) if both else 1.0
    return model.temperature


def standard_error(values: Float[Tensor, " groups"], groups: Groups) -> float:
    """Of the mean of values, those of one `split` id being taken together; NaN for one id only."""
    ids = range(len(groups)) if groups.split is None else groups.split
    place: dict[object, int] = {}
    own = torch.tensor([place.setdefault(one, len(place)) for one in ids], dtype=torch.long)
    if len(place) < 2:
        return math.nan
    from_mean = values.double().cpu() - values.double().mean().cpu()
    together = total(from_mean, own, len(place))
    spread = together.square().sum() * len(place) / (len(place) - 1)
    return float(spread.sqrt() / len(values))


def _log_odds(
    model: PreferenceModel, groups: Groups, values: Tensor, pairs: Pairs
) -> Float[Tensor, " pairs"]:
    if isinstance(model.comparator, ConsistentComparator):
        return values[pairs.winner] - values[pairs.loser]
    device = next(model.parameters()).device
    with torch.no_grad():
        parts = [part.to(device) for part in in_parts(groups)]
        return torch.cat([log_odds(model.comparator, one, pairs_of(one)).cpu() for one in parts])


_BINS = {"probability": torch.float64, "frequency": torch.float64, "count": torch.long}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _numbers(told: dict[str, Any]) -> dict[str, Any]:
    """NaN where `to_dict` wrote None for a number."""
    for name in ("standard_error", "loss", "agreement", "chance"):
        told[name] = math.nan if told[name] is None else told[name]
    shares = [told.get("unseen"), *(told.get("categories") or {}).values()]
    for share in shares:
        if share is not None:
            share.update({k: math.nan if v is None else v for k, v in share.items()})
    return told


__all__ = ["Report", "calibrate", "measure", "standard_error"]
