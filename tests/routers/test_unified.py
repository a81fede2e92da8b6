"""The unified competition (USMoE), SeqTopK and Expert Race: budgets, bounds, scores.

Letters: U unified score, E experts, n real tokens of a group.
"""

from fractions import Fraction
from itertools import combinations
from math import exp, floor, log

import pytest
import torch
from torch import Tensor

from moefold.routers.choice import TopPairs
from moefold.routing import SparseRouting
from tests.routers.common import ROUNDING, batch, build, exact, pairs, route


def softmax(row: list[float]) -> list[float]:
    total = sum(map(exp, row))
    return [exp(value) / total for value in row]


def sigmoid(value: float) -> float:
    return 1 / (1 + exp(-value))


# Scores and weights by hand


def test_the_score_mixes_two_views():
    # alpha = 0.25, logits (log 3, 0): softmax (3/4, 1/4), sigmoid (3/4, 1/2) times 2 / E = 1.
    #   U = 3/4 (3/4, 1/4) + 1/4 (3/4, 1/2) = (3/4, 5/16)
    router = exact("unified", 2, budget=2.0, alpha=0.25)
    routing = router(torch.tensor([[[log(3), 0.0]]], dtype=torch.float64))
    assert routing.weights[0, 0].tolist() == pytest.approx([3 / 4, 5 / 16], abs=ROUNDING)


def test_an_undecided_pair_scores_one_over_e():
    # At logit 0 both views say 1 / E, whatever alpha is.
    for alpha in (0.0, 0.3, 1.0):
        routing = exact("unified", 5, alpha=alpha)(torch.zeros(1, 1, 5, dtype=torch.float64))
        assert routing.scores.flatten().tolist() == pytest.approx([1 / 5] * 5, abs=ROUNDING)


def test_the_first_version_scores_over_tokens():
    # Two tokens, logits (log 3, 0) and (0, 0). Softmax over tokens: expert 0 (3/4, 1/4), expert 1
    # (1/2, 1/2). Rows divided by their sums 5/4 and 3/4: (3/5, 2/5) and (1/3, 2/3).
    router = exact("unified", 2, budget=2.0, alpha=1.0, expert_score="token-softmax")
    routing = router(torch.tensor([[[log(3), 0.0], [0.0, 0.0]]], dtype=torch.float64))
    expected = [3 / 5, 2 / 5, 1 / 3, 2 / 3]
    assert routing.scores.flatten().tolist() == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        # U = (3/4, 5/16) as above; the pair of expert 0 is chosen, that of expert 1 is not.
        ("unified", 3 / 4),
        ("softmax", 3 / 4),
        ("renormalized", 1.0),
        ("row-normalized", (3 / 4) / (3 / 4 + 5 / 16)),
    ],
)
def test_ways_to_combine(combine, expected):
    router = exact("unified", 2, budget=1.0, alpha=0.25, combine=combine)
    routing = router(torch.tensor([[[log(3), 0.0]]], dtype=torch.float64))
    assert routing.weights[0, 0].tolist() == pytest.approx([expected, 0.0], abs=ROUNDING)


def test_softmax_and_unified_weights_differ():
    # alpha = 1: U is the sigmoid alone, 1/2 at logit 0 with E = 2; log 3 gives 3/4 either way.
    x = torch.tensor([[[log(3), 0.0]]], dtype=torch.float64)
    settings = {"budget": 2.0, "alpha": 1.0}
    unified = exact("unified", 2, combine="unified", **settings)(x)
    assert unified.weights[0, 0].tolist() == pytest.approx([3 / 4, 1 / 2], abs=ROUNDING)
    by_softmax = exact("unified", 2, combine="softmax", **settings)(x)
    assert by_softmax.weights[0, 0].tolist() == pytest.approx([3 / 4, 1 / 4], abs=ROUNDING)
    renormalized = exact("unified", 2, combine="renormalized", **settings)(x)
    assert renormalized.weights[0, 0].tolist() == pytest.approx([3 / 5, 2 / 5], abs=ROUNDING)


def test_the_best_pairs_of_the_matrix_win():
    # alpha = 0, four tokens of three experts, as softmax probabilities, budget 1: four pairs.
    #
    #            e0   e1   e2
    #   token 0 .80* .15  .05
    #   token 1 .40* .35  .25
    #   token 2 .36  .34  .30      no pair: its best is the fifth
    #   token 3 .50* .45* .05
    probability = torch.tensor(
        [[[0.8, 0.15, 0.05], [0.4, 0.35, 0.25], [0.36, 0.34, 0.3], [0.5, 0.45, 0.05]]],
        dtype=torch.float64,
    )
    routing = exact("unified", 3, budget=1.0, alpha=0.0)(probability.log())
    assert pairs(routing.chosen[0]) == {(0, 0), (1, 0), (3, 0), (3, 1)}
    assert not routing.combine(routing.dispatch(probability))[0, 2].any()
    # At least one each: token 2 gets its best, and the last of the four above has to go.
    bounded = exact("unified", 3, budget=1.0, alpha=0.0, min_experts=1)(probability.log())
    assert pairs(bounded.chosen[0]) == {(0, 0), (1, 0), (2, 0), (3, 0)}
    # At most one each comes to the same.
    bounded = exact("unified", 3, budget=1.0, alpha=0.0, max_experts=1)(probability.log())
    assert pairs(bounded.chosen[0]) == {(0, 0), (1, 0), (2, 0), (3, 0)}


# Budgets


@pytest.mark.parametrize(
    ("budget", "tokens", "taken"),
    [
        (2.0, 5, 10),
        (1.5, 4, 6),
        (1.5, 3, 5),  # 4.5: halves are rounded up
        (0.5, 1, 1),  # 0.5
        (0.5, 5, 3),  # 2.5: up, where rounding to even would take 2
        (0.25, 1, 0),  # a group may get nothing
        (0.1, 4, 0),
        (0.1, 5, 1),
        (1.1, 10, 11),
        (3.0, 7, 21),  # everything
        (2.9, 1, 3),
    ],
)
@pytest.mark.parametrize("padding", [0, 3])
def test_the_budget_of_a_group(budget, tokens, taken, padding):
    router = exact("unified", 3, budget=budget)
    x = torch.randn(2, tokens + padding, 3, dtype=torch.float64)
    mask = torch.arange(tokens + padding).expand(2, -1) < tokens if padding else None
    assert router(x, mask).chosen.sum((1, 2)).tolist() == [taken, taken]


@pytest.mark.parametrize("group", ["sequence", "batch", "position", 4])
@pytest.mark.parametrize("budget", [0.1, 0.75, 1.5, 2.0, 3.3])
@pytest.mark.parametrize("bounds", [{}, {"max_experts": 4}], ids=["free", "bounded"])
def test_every_group_spends_its_budget(group, budget, bounds):
    for _ in range(5):
        given = batch(4, 6, padded=False)
        mask = torch.rand(4, 6) < 0.6
        mask[0] = False
        routing = build("unified", budget=budget, group=group, **bounds)(given.x, mask)
        split = routing.grouping.split
        real = split(mask).sum(1).tolist()
        exactly = Fraction(str(budget))
        expected = [floor(exactly * n + Fraction(1, 2)) for n in real]
        assert split(routing.chosen).sum((1, 2)).tolist() == expected


def test_numbers_and_tensors_agree_on_the_budget():
    for budget in (0.1, 0.35, 0.5, 1.0, 1.15, 1.5, 2.05, 2.9):
        choice = TopPairs(budget=budget)
        tokens = torch.arange(200)
        one_by_one = [choice.pairs(n, 3) for n in tokens.tolist()]
        assert choice.quota(tokens, 3).tolist() == one_by_one


# What it comes to in special cases


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_one_token_alone_makes_its_token_choice(k, alpha):
    # Decoding token by token: with nobody to compete with, the budget is the token's own top k.
    unified = exact("unified", 4, budget=float(k), alpha=alpha)
    token_choice = exact("token-choice", 4, k=k)
    x = torch.randn(20, 1, 4, dtype=torch.float64)
    assert torch.equal(unified(x).chosen, token_choice(x).chosen)


def test_alpha_zero_is_seq_topk_without_bounds_and_a_race_in_one_sequence():
    # Eleven tokens are sure of one expert and one is undecided between eight: without the bound of
    # 4 it would take all of them.
    sure = torch.tensor([0.1] + [40.0] * 11, dtype=torch.float64).unsqueeze(-1)
    x = sure * torch.randn(6, 12, 8, dtype=torch.float64)
    unified = exact("unified", 8, budget=2.0, alpha=0.0)(x)
    bounded = exact("unified", 8, budget=2.0, alpha=0.0, min_experts=1, max_experts=4)(x)
    seq_topk = exact("seq-topk", 8, k=2)(x)
    assert torch.equal(seq_topk.chosen, bounded.chosen)
    assert not torch.equal(seq_topk.chosen, unified.chosen)
    for sequence in range(6):
        race = exact("expert-race", 8, k=2)(x[sequence : sequence + 1])
        assert torch.equal(race.chosen[0], unified.chosen[sequence])
        assert torch.equal(race.weights[0], unified.weights[sequence])


def test_equal_bounds_are_token_choice():
    # min = max = k leaves no competition.
    x = torch.randn(6, 9, 4, dtype=torch.float64)
    bounded = exact("unified", 4, budget=2.0, alpha=0.0, min_experts=2, max_experts=2)(x)
    assert torch.equal(bounded.weights, exact("token-choice", 4, k=2)(x).weights)


# Bounds


@pytest.mark.parametrize(
    ("budget", "low", "high"), [(2.0, 1, 3), (1.5, 1, 2), (1.25, 0, 2), (3.0, 2, None)]
)
def test_bounds_hold_and_the_budget_is_spent(budget, low, high):
    router = build("unified", budget=budget, min_experts=low, max_experts=high)
    given = batch(6, 9)
    given.x.mul_(3)  # peaked: without bounds some tokens would take all
    routing = route(router, given)
    assert isinstance(routing, SparseRouting)
    assert given.mask is not None
    counts = routing.chosen.sum(2)
    assert counts[given.mask].min() >= low
    assert counts.max() <= (4 if high is None else high)
    expected = torch.floor(given.mask.sum(1) * budget + 0.5).long()
    assert torch.equal(counts.sum(1), expected)


def test_seq_topk_gives_one_to_k_plus_two():
    x = 6 * torch.randn(8, 16, 8, dtype=torch.float64)
    counts = exact("seq-topk", 8, k=2)(x).chosen.sum(2)
    assert (counts.min().item(), counts.max().item()) == (1, 4)
    assert counts.sum(1).tolist() == [32] * 8


@pytest.mark.parametrize("seed", range(8))
def test_with_bounds_it_is_still_the_best_total(seed):
    # Every set of 4 of 9 pairs that respects the bounds, on three tokens of three experts.
    torch.manual_seed(seed)
    x = torch.randn(1, 3, 3, dtype=torch.float64)
    router = exact("unified", 3, budget=4 / 3, min_experts=1, max_experts=2)
    routing = router(x)
    scores: Tensor = routing.scores[0].detach()
    cells = [(t, e) for t in range(3) for e in range(3)]
    totals = {
        chosen: sum(float(scores[pair]) for pair in chosen)
        for chosen in combinations(cells, 4)
        if all(1 <= sum(t == token for t, _ in chosen) <= 2 for token in range(3))
    }
    best = max(totals, key=lambda chosen: totals[chosen])
    assert pairs(routing.chosen[0]) == set(best)


# Rows


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_token_takes_its_own_best_experts(alpha):
    # Row-monotone: competition decides how many experts a token gets; which ones, its logits do.
    routing = exact("unified", 5, budget=1.5, alpha=alpha)(torch.randn(8, 12, 5).double() * 2)
    counts = routing.chosen.sum(2, keepdim=True)
    place = routing.logits.argsort(-1, descending=True).argsort(-1)
    assert torch.equal(routing.chosen, place < counts)
    assert counts.unique().numel() > 2


def test_the_first_version_may_take_a_worse_expert():
    # Token 0 prefers expert 0 by a little, but there token 1 is far ahead: over tokens, expert 0
    # belongs to token 1 and token 0's row is nearly all expert 1.
    x = torch.tensor([[[1.0, 0.9], [5.0, 0.0]]], dtype=torch.float64)
    first = {"budget": 1.0, "alpha": 1.0, "expert_score": "token-softmax"}
    assert pairs(exact("unified", 2, **first)(x).chosen[0]) == {(0, 1), (1, 0)}
    released = {"budget": 1.0, "alpha": 1.0}
    assert pairs(exact("unified", 2, **released)(x).chosen[0]) == {(0, 0), (1, 0)}


def test_the_score_by_the_formula():
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    routing = exact("unified", 4, alpha=0.3)(x)
    for token, row in enumerate(x[0].tolist()):
        expected = [
            0.7 * p + 0.3 * (2 / 4) * sigmoid(value)
            for p, value in zip(softmax(row), row, strict=True)
        ]
        assert routing.scores[0, token].tolist() == pytest.approx(expected, abs=ROUNDING)


def test_far_logits_keep_the_rows_of_the_first_version():
    # Token 1 is ahead of token 0 by 200 at both experts: token 0's shares are e^-200 and e^-201,
    # less than float32 holds, and its row is still (e, 1) / (e + 1) of itself.
    router = exact("unified", 2, alpha=1.0, expert_score="token-softmax").float()
    routing = router(torch.tensor([[[1.0, 0.0], [201.0, 201.0]]]))
    expected = [sigmoid(1.0), sigmoid(-1.0)]
    assert routing.scores[0, 0].tolist() == pytest.approx(expected, rel=1e-5)  # float32 near 200
