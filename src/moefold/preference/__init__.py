"""Comparison training: learn to choose as an expert does, from what the expert chose.

    groups = Groups.of(candidates, chosen=chosen)             of these n, the expert took that one
    comparator = ConsistentComparator(scorer)                 comparator(a, b): log-odds for a
    preference_loss(comparator, groups).backward()
    best_of(comparator, groups)                               n evaluations

    model = PreferenceConfig().build(groups)                  or with training, saving, measuring
    fit(model, groups, FitConfig(epochs=8)); measure(model, others); save(model, "folder")
    ComparisonRanker().fit(groups, chosen).predict(others)    or as in scikit-learn

Source: Tesauro, *Connectionist Learning of Expert Preferences by Comparison Training*, 1988.
"""

from typing import TYPE_CHECKING, Any

from moefold.preference.calibration import Reliability, fit_temperature, reliability
from moefold.preference.choice import Tournament, best_of, probability, ranking, tournament
from moefold.preference.collapse import Collapsed, collapsed
from moefold.preference.comparators import (
    AbstractComparator,
    AntisymmetricComparator,
    ConsistentComparator,
    FreeComparator,
    group_scores,
    log_odds,
)
from moefold.preference.diagnostics import (
    agreement,
    antisymmetry_error,
    by_category,
    regret,
    seen_before,
)
from moefold.preference.groups import UNRANKED, Groups
from moefold.preference.losses import preference_loss, preference_losses
from moefold.preference.model import PreferenceConfig, PreferenceModel
from moefold.preference.pairs import Pairs, pairs_of
from moefold.preference.perceptron import averaged_perceptron
from moefold.preference.reading import read, read_all
from moefold.preference.report import Report, calibrate, measure
from moefold.preference.saved import load, save
from moefold.preference.scorers import NetConfig, pair_nets, scorers
from moefold.preference.trainer import FitConfig, History, fit

if TYPE_CHECKING:
    from moefold.preference.ranker import ComparisonRanker


def __getattr__(name: str) -> Any:
    if name == "ComparisonRanker":  # the only one that needs scikit-learn, to be imported even
        from moefold.preference.ranker import ComparisonRanker

        return ComparisonRanker
    raise AttributeError(f"module 'moefold.preference' has no attribute {name!r}")


__all__ = [
    "UNRANKED",
    "AbstractComparator",
    "AntisymmetricComparator",
    "Collapsed",
    "ComparisonRanker",
    "ConsistentComparator",
    "FitConfig",
    "FreeComparator",
    "Groups",
    "History",
    "NetConfig",
    "Pairs",
    "PreferenceConfig",
    "PreferenceModel",
    "Reliability",
    "Report",
    "Tournament",
    "agreement",
    "antisymmetry_error",
    "averaged_perceptron",
    "best_of",
    "by_category",
    "calibrate",
    "collapsed",
    "fit",
    "fit_temperature",
    "group_scores",
    "load",
    "log_odds",
    "measure",
    "pair_nets",
    "pairs_of",
    "preference_loss",
    "preference_losses",
    "probability",
    "ranking",
    "read",
    "read_all",
    "regret",
    "reliability",
    "save",
    "scorers",
    "seen_before",
    "tournament",
]
