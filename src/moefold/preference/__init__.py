"""Comparison training: learn to choose as an expert does, from what the expert chose.

    groups = Groups.of(candidates, chosen=chosen)             of these n, the expert took that one
    comparator = ConsistentComparator(scorer)                 comparator(a, b): log-odds for a
    preference_loss(comparator, groups).backward()
    best_of(comparator, groups)                               n evaluations

Source: Tesauro, *Connectionist Learning of Expert Preferences by Comparison Training*, 1988.
"""

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
from moefold.preference.pairs import Pairs, pairs_of
from moefold.preference.perceptron import averaged_perceptron
from moefold.preference.scorers import NetConfig, pair_nets, scorers

__all__ = [
    "UNRANKED",
    "AbstractComparator",
    "AntisymmetricComparator",
    "Collapsed",
    "ConsistentComparator",
    "FreeComparator",
    "Groups",
    "NetConfig",
    "Pairs",
    "Reliability",
    "Tournament",
    "agreement",
    "antisymmetry_error",
    "averaged_perceptron",
    "best_of",
    "by_category",
    "collapsed",
    "fit_temperature",
    "group_scores",
    "log_odds",
    "pair_nets",
    "pairs_of",
    "preference_loss",
    "preference_losses",
    "probability",
    "ranking",
    "regret",
    "reliability",
    "scorers",
    "seen_before",
    "tournament",
]
