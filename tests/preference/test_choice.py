"""Best of n, rankings and tournaments, against a look at every candidate and every pair."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from moefold.preference import (
    AntisymmetricComparator,
    ConsistentComparator,
    FreeComparator,
    Groups,
    agreement,
    antisymmetry_error,
    best_of,
    by_category,
    pairs_of,
    probability,
    ranking,
    regret,
    seen_before,
    tournament,
)
from moefold.preference.scorers import MirrorNet, PairMLP
from tests.preference.common import comparator, one_by_one, random_groups


class Table(nn.Module):
    """Log-odds from a table over numbered candidates."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = torch.tensor(table)

    def forward(self, a, b):
        return self.table[a[:, 0].long(), b[:, 0].long()]


# 0 beats 1, 1 beats 2, 2 beats 0: a circle; 3 loses to all.
CIRCLE = [[0.0, 1, -1, 2], [-1, 0.0, 1, 2], [1, -1, 0.0, 2], [-2, -2, -2, 0.0]]


def numbered(*sizes: int) -> Groups:
    return Groups.of([torch.arange(n).unsqueeze(1).float() for n in sizes])


def test_the_best_is_the_highest_score_the_first_of_equals():
    groups, net = random_groups(40, most=9), comparator()
    scores = net.scores(groups.candidates)
    wanted = [int(s.argmax()) for (s,) in one_by_one(groups, scores)]
    assert best_of(net, groups).tolist() == wanted
    twice = groups.take([0, 0])
    twice.candidates[:] = 1.0
    assert best_of(net, twice).tolist() == [0, 0]


def test_a_ranking_is_the_order_of_scores():
    groups, net = random_groups(40, most=9), comparator()
    found = ranking(net, groups)
    for s, places in one_by_one(groups, net.scores(groups.candidates), found):
        assert s[places.argsort()].tolist() == sorted(s.tolist(), reverse=True)


@pytest.mark.parametrize("method", ["copeland", "borda", "king-of-the-hill"])
def test_a_tournament_of_a_consistent_comparator_is_won_by_its_best(method):
    groups, net = random_groups(40, most=9), comparator()
    found = tournament(net, groups, method=method)
    assert torch.equal(found.best, best_of(net, groups))
    each = groups.lengths if method == "king-of-the-hill" else groups.lengths.square()
    if method == "king-of-the-hill":
        assert found.comparisons == int((each - 1).sum())
    else:
        assert found.comparisons == int(((each - groups.lengths) / 2).sum())
        assert found.cyclic_triples == 0.0
        assert found.beaten_winners == 0.0


def test_of_equal_candidates_the_first_wins_a_tournament_too():
    # In another batch the last digit of a score may differ: each must be scored once.
    for seed in range(100):
        draw = torch.Generator().manual_seed(seed)
        few = (torch.rand(12, 7, generator=draw) < 0.2).float()
        groups = Groups.of([few[torch.randint(0, 12, (3 + seed % 22,), generator=draw)]])
        net = comparator(7, hidden=16, seed=seed).float()
        found = tournament(net, groups)
        assert found.cyclic_triples == 0.0
        assert torch.equal(found.best, best_of(net, groups))


class Broken(nn.Module):
    """Scores, or log-odds, of which one is NaN."""

    def forward(self, a, b=None):
        return torch.where(a[:, 0] == 1, torch.nan, a[:, 0])


@pytest.mark.parametrize("by", [best_of, ranking, tournament])
def test_nothing_is_chosen_by_nan(by):
    groups = Groups.of([[[0.0], [2.0]], [[0.0], [1.0]]])
    words = r"^group 1 has {} that are NaN: nothing can be chosen; look for NaN in the candidates"
    with pytest.raises(ValueError, match=words.format("scores")):
        by(ConsistentComparator(Broken()), groups)
    with pytest.raises(ValueError, match=words.format("log-odds")):
        by(FreeComparator(Broken()), groups)


def test_a_circle_is_reported():
    found = tournament(FreeComparator(Table(CIRCLE)), numbered(4))
    # Of the four triples the one without candidate 3 goes in a circle.
    assert found.cyclic_triples == 0.25
    assert found.points.tolist() == [2.0, 2.0, 2.0, 0.0]
    assert (found.best.tolist(), found.beaten_winners) == ([0], 1.0)
    assert found.comparisons == 12  # both orders of six pairs


def test_circles_are_counted_as_a_look_at_every_triple_does():
    torch.manual_seed(0)
    net: Any = AntisymmetricComparator(MirrorNet(5)).double()
    for parameter in net.parameters():
        parameter.data *= 3
    groups = random_groups(30, most=8)
    circles = triples = 0
    for (x,) in one_by_one(groups, groups.candidates):
        for i, j, k in itertools.combinations(range(len(x)), 3):
            with torch.no_grad():
                wins = [float(net(x[[a]], x[[b]])) > 0 for a, b in ((i, j), (j, k), (k, i))]
            circles += wins[0] == wins[1] == wins[2]
            triples += 1
    assert circles > 0
    assert tournament(net, groups).cyclic_triples == pytest.approx(circles / triples)


def test_the_last_king_depends_on_the_order_where_there_is_a_circle():
    net: Any = FreeComparator(Table(CIRCLE))
    first = tournament(net, numbered(4), method="king-of-the-hill")
    assert first.best.tolist() == [2]  # 0 beats 1, 2 beats 0, 2 beats 3
    turned = Groups.of([torch.tensor([[1.0], [2.0], [0.0], [3.0]])])
    assert tournament(net, turned, method="king-of-the-hill").best.tolist() == [2]  # which is 0


def test_borda_adds_probabilities():
    found = tournament(FreeComparator(Table(CIRCLE)), numbered(2), method="borda")
    p = torch.tensor(1.0).sigmoid()
    assert found.points.tolist() == pytest.approx([float(p), float(1 - p)])
    with pytest.raises(ValueError, match="method is 'swiss'; allowed: copeland, borda, king"):
        tournament(FreeComparator(Table(CIRCLE)), numbered(2), method="swiss")


def test_probabilities_are_cooled_by_the_temperature():
    groups, net = random_groups(), comparator()
    pairs = pairs_of(groups)
    plain = probability(net, groups, pairs)
    warm = probability(net, groups, pairs, temperature=4.0)
    assert torch.allclose(warm.logit() * 4, plain.logit(), atol=1e-12)
    with pytest.raises(ValueError, match=r"temperature is 0\.0; it must be positive"):
        probability(net, groups, pairs, temperature=0.0)


def test_agreement_shares_a_hit_among_equals():
    groups: Any = Groups.of([torch.zeros(3, 1)] * 3, chosen=[0, 1, 2])
    values = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 1, 1])
    assert agreement(values, groups).tolist() == pytest.approx([1.0, 0.5, 1 / 3])
    several = Groups.of([torch.zeros(3, 1)], utilities=[[2.0, 2.0, 0.0]])
    assert agreement(torch.tensor([1.0, 1.0, 1.0]), several).tolist() == pytest.approx([2 / 3])


def test_regret_is_what_the_choice_loses():
    groups: Any = Groups.of([torch.zeros(3, 1)] * 2, utilities=[[0.5, 0.2, -1.0], [0.0, 0.4, 0.1]])
    values = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    assert regret(values, groups).tolist() == pytest.approx([0.3, 0.35])
    with pytest.raises(ValueError, match="no utilities; regret is measured in them"):
        regret(values, random_groups(2))


def test_the_antisymmetry_error_is_that_of_the_table():
    found = antisymmetry_error(FreeComparator(Table([[0.0, 1.0], [3.0, 0.0]])), numbered(2))
    assert found == {"largest": 4.0, "contradictions": 1.0}
    torch.manual_seed(0)
    exact = antisymmetry_error(AntisymmetricComparator(PairMLP(5)).double(), random_groups())
    assert exact == {"largest": 0.0, "contradictions": 0.0}
    with pytest.raises(ValueError, match="none of 0 groups has two candidates that could be swap"):
        antisymmetry_error(FreeComparator(PairMLP(1)), numbered(2).take([]))


def test_categories_are_apart_the_largest_first():
    groups = random_groups(5, category=["race", "contact", "contact", "race", "contact"])
    found = by_category(torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]), groups)
    assert list(found) == ["contact", "race"]
    assert found["contact"]["mean"] == pytest.approx(2 / 3)
    assert found["race"] == {"mean": 0.5, "standard_error": pytest.approx(0.5), "groups": 2}
    with pytest.raises(ValueError, match="have no categories; give category"):
        by_category(torch.zeros(2), random_groups(2))


def test_what_was_seen_before_in_any_order_is_known_again():
    known = Groups.of([[[1.0], [2.0]], [[3.0], [4.0], [5.0]]])
    asked = Groups.of([[[2.0], [1.0]], [[3.0], [4.0]], [[5.0], [4.0], [3.0]]])
    assert seen_before(asked, known).tolist() == [True, False, True]
    short = [
        Groups(candidates=torch.as_tensor(g.candidates).bfloat16(), lengths=g.lengths)
        for g in (asked, known)
    ]
    assert seen_before(*short).tolist() == [True, False, True]
    told: Any = Groups.of([["a", "b"]], context=["c"])
    others = Groups.of([["b", "a"], ["a", "b"]], context=["c", "d"])
    assert seen_before(others, told).tolist() == [True, False]
