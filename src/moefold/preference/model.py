"""A comparator as a model that a trainer takes, and its built-in nets as data.

    config = PreferenceConfig(net=NetConfig("mlp", {"hidden": 40}))
    model = config.build(groups)             sizes, and what inputs are standardized by, from data
    model(**groups.as_inputs())              {"loss": ..., "scores": ...}

Shapes: `candidates *features`, `groups`, as in `Groups`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moefold.modes import evaluating
from moefold.preference.choice import first_best, tournament
from moefold.preference.comparators import (
    AbstractComparator,
    AntisymmetricComparator,
    ConsistentComparator,
    FreeComparator,
    KnownScorer,
    group_scores,
)
from moefold.preference.groups import Groups
from moefold.preference.losses import preference_loss, preference_losses
from moefold.preference.ragged import highest, total
from moefold.preference.scorers import NetConfig, pair_nets, scorers

COMPARATORS: Mapping[str, type[Any]] = MappingProxyType(
    {
        "consistent": ConsistentComparator,
        "antisymmetric": AntisymmetricComparator,
        "free": FreeComparator,
    }
)
"""Names of the comparators."""

AT_ONCE = 65536
"""Candidates that are valued together, outside of training."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceConfig:
    """How a model of built-in parts is made; with its sizes, all that is saved beside the weights.

    Attributes:
        net: a scorer, or for comparators that are not consistent a net of pairs.
        comparator: "consistent", "antisymmetric" or "free".
        loss: one of `preference_losses.names()`.
        loss_settings: of the loss.
        standardize: whether features are brought to mean 0 and deviation 1 of the training data.
        features: numbers in a candidate; `build` takes them from the data if 0.
        context: numbers in a context, 0 for none.

    Raises:
        ValueError: no such comparator or loss, or a net that does not go with the comparator.
    """

    net: NetConfig = field(default_factory=lambda: NetConfig("mlp"))
    comparator: str = "consistent"
    loss: str = "pair-logistic"
    loss_settings: Mapping[str, Any] = field(default_factory=dict)
    standardize: bool = False
    features: int = 0
    context: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_settings", MappingProxyType(dict(self.loss_settings)))
        preference_losses.get(self.loss)
        if self.comparator not in COMPARATORS:
            raise ValueError(
                f"comparator is {self.comparator!r}; allowed: {', '.join(map(repr, COMPARATORS))}"
            )
        kind = scorers if self.comparator == "consistent" else pair_nets
        if self.net.name not in kind:
            raise ValueError(
                f"the net {self.net.name!r} does not go with a comparator that is "
                f"{self.comparator}; it takes {', '.join(kind.names())}"
            )

    def build(self, groups: Groups | None = None) -> "PreferenceModel":
        """Makes the model.

        Args:
            groups: the training data, for sizes and what inputs are standardized by; may be None
                where the sizes are known and the weights will be loaded.

        Raises:
            ValueError: candidates are texts or not vectors, or a setting is not the net's.
        """
        config = self if groups is None else self._sized(groups)
        net = config.net.build(config.features, config.context)
        if config.standardize:
            net = Standardized(net, config.features, config.context)
            if groups is not None:
                net.learn(groups)
        model = PreferenceModel(
            COMPARATORS[config.comparator](net),
            loss=config.loss,
            loss_settings=config.loss_settings,
        )
        model.preference_config = config
        return model

    def _sized(self, groups: Groups) -> "PreferenceConfig":
        sizes = [0, 0]
        for place, (name, value) in enumerate(
            (("candidates", groups.candidates), ("context", groups.context))
        ):
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.ndim != 2:
                what = "texts" if isinstance(value, list) else f"of shape {tuple(value.shape)}"
                raise ValueError(
                    f"{name} are {what}; the net {self.net.name!r} takes a vector of numbers for "
                    f"each (texts: moefold.preference.text)"
                )
            sizes[place] = value.shape[1]
        for name, told, found in zip(
            ("features", "context"), (self.features, self.context), sizes, strict=True
        ):
            if told not in (0, found):
                raise ValueError(f"{name} is {told}, but the groups have {found}")
        return PreferenceConfig(**{**self._parts(), "features": sizes[0], "context": sizes[1]})

    def __reduce__(self) -> tuple[Any, ...]:
        settings = {"loss_settings": dict(self.loss_settings)}
        return partial(type(self), **{**self._parts(), **settings}), ()

    def _parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        parts = self._parts()
        return {**parts, "net": self.net.to_dict(), "loss_settings": dict(self.loss_settings)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PreferenceConfig":
        """The inverse of `to_dict`."""
        return cls(**{**data, "net": NetConfig.from_dict(data["net"])})


@final
class PreferenceModel(nn.Module):
    """A comparator with its loss, called with what `Groups.as_inputs` gives.

    Args:
        comparator: what is trained.
        loss: one of `preference_losses.names()`.
        loss_settings: of the loss: `margin`, `per_group`, `by_utility`, `centring`.

    Attributes:
        temperature: by which log-odds are divided where probabilities are told, from calibration.
        preference_config: how it was built; None for a comparator of your own. (A trainer of
            transformers would take `config` for its own.)
    """

    def __init__(
        self,
        comparator: AbstractComparator,
        *,
        loss: str = "pair-logistic",
        loss_settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        preference_losses.get(loss)
        self.comparator = comparator
        self.loss = loss
        self.loss_settings = dict(loss_settings or {})
        self.temperature = 1.0
        self.preference_config: PreferenceConfig | None = None

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """The loss, if anything is known of the groups, and scores, if the comparator has any.

        Args:
            **inputs: parts of `Groups`.
        """
        groups = Groups(**inputs)
        comparator, found = self.comparator, {}
        if isinstance(comparator, ConsistentComparator):
            found["scores"] = group_scores(comparator, groups)
            # Losses ask a comparator; this one has its answers ready, so that each is made once.
            comparator = ConsistentComparator(KnownScorer(found["scores"]))
        if groups.is_labelled:
            loss = preference_loss(comparator, groups, self.loss, **self.loss_settings)
            found["loss"] = loss
        return found

    @torch.no_grad()
    def values(
        self, groups: Groups, *, advance: Callable[[int], None] | None = None
    ) -> Float[Tensor, " candidates"]:
        """What choosing goes by: the score of each candidate, or its points in a tournament.

        In evaluation mode, a part at a time, on the model's device; the result is on the CPU.

        Args:
            groups: any number of them.
            advance: called after every part with its number of groups, for a progress bar.
        """
        device = next(self.parameters(), torch.zeros(())).device
        found = []
        with evaluating(self):
            for part in in_parts(groups):
                here = part.to(device)
                if isinstance(self.comparator, ConsistentComparator):
                    values = group_scores(self.comparator, here)
                else:
                    values = tournament(self.comparator, here).points
                found.append(values.cpu())
                if advance is not None:
                    advance(len(part))
        return torch.cat(found) if found else torch.zeros(0)

    def best(self, groups: Groups) -> Int[Tensor, " groups"]:
        """The best candidate of each group, counted inside it; the first of equals."""
        return first_best(self.values(groups), groups)

    def probabilities(self, groups: Groups) -> Float[Tensor, " candidates"]:
        """The chance of each candidate to be chosen, by Luce's axiom from what pairs have.

        The odds of any two are those of the comparison between them, after calibration.

        Raises:
            ValueError: the comparator is not consistent, so that there are no such chances.
        """
        if not isinstance(self.comparator, ConsistentComparator):
            raise ValueError(
                f"{type(self.comparator).__name__} tells chances of pairs only; use a "
                f"ConsistentComparator, or moefold.preference.probability"
            )
        return softmax(self.values(groups) / self.temperature, groups)


@final
class Standardized(nn.Module):
    """A net whose inputs are brought to mean 0 and deviation 1.

    Args:
        net: of candidates or pairs of them, and the context last, if there is one.
        features: numbers in a candidate.
        context: numbers in a context.
    """

    mean: Tensor
    scale: Tensor
    context_mean: Tensor
    context_scale: Tensor

    def __init__(self, net: nn.Module, features: int, context: int = 0) -> None:
        super().__init__()
        self.net = net
        for name, size in (("", features), ("context_", context)):
            self.register_buffer(f"{name}mean", torch.zeros(size))
            self.register_buffer(f"{name}scale", torch.ones(size))

    def learn(self, groups: Groups) -> None:
        """Takes mean and deviation from candidates and contexts; what never varies keeps its scale.

        Args:
            groups: the training data.
        """
        for name, value in (("", groups.candidates), ("context_", groups.context)):
            if isinstance(value, Tensor):
                deviation, mean = torch.std_mean(value.double(), 0, correction=0)
                scale = torch.where(deviation > 1e-12 * mean.abs(), 1 / deviation, 1.0)
                getattr(self, f"{name}mean").copy_(mean)
                getattr(self, f"{name}scale").copy_(scale)

    def forward(self, *given: Tensor) -> Tensor:
        """What the net says of standardized inputs."""
        last = len(given) - 1 if len(self.context_mean) else len(given)
        return self.net(
            *((x - self.mean) * self.scale for x in given[:last]),
            *((x - self.context_mean) * self.context_scale for x in given[last:]),
        )


def softmax(values: Float[Tensor, " candidates"], groups: Groups) -> Float[Tensor, " candidates"]:
    """The softmax of each group's values."""
    group, count = groups.group_of_candidate, len(groups)
    raised = (values - highest(values, group, count)[group]).exp()
    return raised / total(raised, group, count)[group]


@torch.no_grad()
def mean_loss(
    model: PreferenceModel, groups: Groups, values: Float[Tensor, " candidates"] | None = None
) -> float:
    """The loss of labelled groups in evaluation mode.

    Args:
        model: any.
        groups: labelled; with weights, their mean by them.
        values: what `model.values` said of them; with these, the loss of a consistent comparator
            takes no evaluation.
    """
    if values is not None and isinstance(model.comparator, ConsistentComparator):
        known = ConsistentComparator(KnownScorer(values))
        return float(preference_loss(known, groups, model.loss, **model.loss_settings))
    device = next(model.parameters(), torch.zeros(())).device
    loss, weight = 0.0, 0.0
    with evaluating(model):
        for part in in_parts(groups):
            own = float(len(part) if part.weights is None else part.weights.sum())
            if own:
                loss += own * float(model(**part.to(device).as_inputs())["loss"])
                weight += own
    return loss / weight if weight else float("nan")


def in_parts(groups: Groups) -> Iterator[Groups]:
    """Groups after groups, of about `AT_ONCE` candidates together."""
    ends = groups.lengths.cumsum(0)
    starts, place, first = ends - groups.lengths, (ends - 1) // AT_ONCE, 0
    for size in place.unique_consecutive(return_counts=True)[1].tolist():
        index = torch.arange(first, first + size, device=groups.lengths.device)
        yield groups.take(index, starts=starts)
        first += size


__all__ = [
    "COMPARATORS",
    "PreferenceConfig",
    "PreferenceModel",
    "Standardized",
    "in_parts",
    "mean_loss",
]
