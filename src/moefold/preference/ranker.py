"""A ranker in the manner of scikit-learn: `fit`, `predict`, `score`, parameters, cross-validation.

    ranker = ComparisonRanker().fit(groups, chosen)
    ranker.predict(other_groups)                         the choice in each group

`X` is a list of groups, arrays `[candidates, features]` of different lengths, and `y` says for each
which candidate was chosen.

Shapes: `groups`, `candidates` of one group.
"""

import math
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from moefold.preference.choice import first_best
from moefold.preference.groups import Groups
from moefold.preference.model import PreferenceConfig, PreferenceModel
from moefold.preference.report import measure
from moefold.preference.scorers import NetConfig
from moefold.preference.trainer import FitConfig, fit

_BATCH = 32
"""Groups of a step."""

_STEPS = 1000
"""Steps that a small net takes to learn, about."""


@final
class ComparisonRanker(BaseEstimator):
    """Learns to choose from groups of candidates as an expert did, by comparing them.

    Args:
        net: "mlp", "linear" or "mixture"; "mirror" or "pair-mlp" for the other comparators; or any
            of them with settings of its own, as a `NetConfig`.
        hidden: hidden units, where the net has them and is given by name.
        comparator: "consistent", "antisymmetric" or "free".
        loss: one of `moefold.preference.preference_losses.names()`.
        standardize: whether features are brought to mean 0 and deviation 1 of the training data.
        epochs: passes over the groups; as many as make a thousand steps if None.
        learning_rate: of AdamW.
        random_state: seed of the first weights and of the order of the groups.

    Attributes:
        model_: the `PreferenceModel`.
        history_: how training went.
        n_features_in_: numbers in a candidate.
    """

    def __init__(
        self,
        *,
        net: str | NetConfig = "mlp",
        hidden: int = 40,
        comparator: str = "consistent",
        loss: str = "pair-logistic",
        standardize: bool = True,
        epochs: int | None = None,
        learning_rate: float = 5e-3,
        random_state: int = 0,
    ) -> None:
        self.net = net
        self.hidden = hidden
        self.comparator = comparator
        self.loss = loss
        self.standardize = standardize
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(
        self,
        X: Sequence[Any] | Groups,  # noqa: N803 - as everywhere in scikit-learn
        y: Sequence[Any] | None = None,
        *,
        rankings: Sequence[Any] | None = None,
        utilities: Sequence[Any] | None = None,
        context: Sequence[Any] | None = None,
        sample_weight: Sequence[float] | None = None,
    ) -> "ComparisonRanker":
        """Learns from groups and what the expert said of them.

        Args:
            X: groups, arrays `[candidates, features]`; or `Groups`, which hold all the rest.
            y: for each group the number of the chosen candidate; or
            rankings: for each group the numbers of its candidates, best first; or
            utilities: for each group what each candidate is worth.
            context: for each group what its candidates share, a vector.
            sample_weight: for each group how much it counts.

        Raises:
            ValueError: names every group that is wrong, as `Groups.of` does.
        """
        groups = _groups(
            X,
            chosen=y,
            rankings=rankings,
            utilities=utilities,
            context=context,
            weights=sample_weight,
        )
        net = self.net
        if isinstance(net, str):
            net = NetConfig(net, {} if net == "linear" else {"hidden": self.hidden})
        config = PreferenceConfig(
            net=net, comparator=self.comparator, loss=self.loss, standardize=self.standardize
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_state)
            model = config.build(groups)
        epochs = self.epochs or math.ceil(_STEPS * _BATCH / len(groups))
        how = FitConfig(
            epochs=epochs,
            batch_size=_BATCH,
            learning_rate=self.learning_rate,
            seed=self.random_state,
        )
        self.history_ = fit(model, groups, how)
        self.model_: PreferenceModel = model
        self.n_features_in_: int = model.preference_config.features  # pyright: ignore[reportOptionalMemberAccess] - it was built
        return self

    def predict(self, X: Sequence[Any] | Groups, *, context: Any = None) -> np.ndarray:  # noqa: N803
        """The number of the best candidate of each group.

        Args:
            X: groups.
            context: as in `fit`.
        """
        groups = self._given(X, context)
        return first_best(self.model_.values(groups), groups).numpy()

    def decision_function(
        self,
        X: Sequence[Any] | Groups,  # noqa: N803
        *,
        context: Any = None,
    ) -> list[np.ndarray]:
        """For each group the scores of its candidates; only differences in a group mean anything.

        Args:
            X: groups.
            context: as in `fit`.
        """
        groups = self._given(X, context)
        return _parted(self.model_.values(groups), groups)

    def predict_proba(self, X: Sequence[Any] | Groups, *, context: Any = None) -> list[np.ndarray]:  # noqa: N803
        """For each group the chance of each candidate to be chosen.

        Args:
            X: groups.
            context: as in `fit`.

        Raises:
            ValueError: the comparator is not consistent, and tells chances of pairs only.
        """
        groups = self._given(X, context)
        return _parted(self.model_.probabilities(groups), groups)

    def rank(self, X: Sequence[Any] | Groups, *, context: Any = None) -> list[np.ndarray]:  # noqa: N803
        """For each group the numbers of its candidates, the best first.

        Args:
            X: groups.
            context: as in `fit`.
        """
        return [
            np.argsort(-scores, kind="stable")
            for scores in self.decision_function(X, context=context)
        ]

    def score(
        self,
        X: Sequence[Any] | Groups,  # noqa: N803
        y: Sequence[Any] | None = None,
        *,
        context: Any = None,
    ) -> float:
        """Agreement: the share of groups in which the choice is the expert's, ties shared.

        Args:
            X: groups.
            y: what was chosen.
            context: as in `fit`.
        """
        check_is_fitted(self, "model_")
        return measure(self.model_, _groups(X, chosen=y, context=context)).agreement

    def _given(self, X: Sequence[Any] | Groups, context: Any) -> Groups:  # noqa: N803
        check_is_fitted(self, "model_")
        groups = _groups(X, context=context)
        candidates = groups.candidates
        found = "texts" if isinstance(candidates, list) else tuple(candidates.shape[1:])
        if found != (self.n_features_in_,):
            raise ValueError(
                f"each candidate is {found}, those of fit had the shape ({self.n_features_in_},)"
            )
        return groups


def _groups(X: Sequence[Any] | Groups, **told: Any) -> Groups:  # noqa: N803
    given = {name: value for name, value in told.items() if value is not None}
    if isinstance(X, Groups):
        if given:
            raise ValueError(
                f"Groups hold all that is known of them; leave out {', '.join(sorted(given))}"
            )
        return X
    if "context" in given:
        given["context"] = [_in_float32(value) for value in given["context"]]
    return Groups.of([_in_float32(group) for group in X], **given)


def _in_float32(value: Any) -> Any:
    """An array; what cannot be one stays as it is, for `Groups.of` to name its group."""
    try:
        return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        return value


def _parted(values: torch.Tensor, groups: Groups) -> list[np.ndarray]:
    return [part.numpy() for part in values.split(groups.lengths.tolist())]


__all__ = ["ComparisonRanker"]
