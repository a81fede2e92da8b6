"""Any score x choice x weight: combinations nobody published build, route and learn."""

import math
from typing import Any

import pytest
import torch

from moefold import routers
from moefold.routers import Capacity, SparseRouter
from moefold.routers.choice import TopExperts, TopTokens
from moefold.routers.score import Sinkhorn, SparseTransport
from moefold.routing import SparseRouting
from tests.routers.common import DIM, EXPERTS, Batch, batch, build, exact, output, pairs, untyped

SCORES = ("softmax", "sigmoid", "relu", "identity", "unified", "sinkhorn", "sparse-transport")
CHOICES = ("top-experts", "top-tokens", "top-pairs", "above", "balanced")
WEIGHTS = ("scores", "softmax", "clean-softmax", "sigmoid", "clean-sigmoid", "one")
WEIGHED = [
    *((weight, "no") for weight in WEIGHTS),
    *(("scores", normalize) for normalize in ("chosen", "all")),
    *(("sigmoid", normalize) for normalize in ("chosen", "all")),
]
WITHOUT_GRADIENT = ("sinkhorn", "sparse-transport")  # plans that choose and cannot weigh


def custom(**settings: Any) -> SparseRouter:
    router = build("custom", **settings)
    assert isinstance(router, SparseRouter)
    return router


def routed(router: SparseRouter, given: Batch) -> SparseRouting:
    routing = router(given.x, given.mask)
    assert isinstance(routing, SparseRouting)
    return routing


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("score", SCORES)
def test_every_combination_routes_and_learns(score, choice):
    given = batch()
    assert given.mask is not None
    for weight, normalize in WEIGHED:
        router = custom(score=score, choice=choice, weight=weight, normalize=normalize)
        routing = routed(router, given)
        assert not routing.chosen[~given.mask].any()
        counts = routing.chosen.sum(2)[given.mask]
        if choice == "top-experts":
            assert (counts == 2).all()
        if choice == "balanced":
            assert (counts == 1).all()
        if choice == "top-pairs":
            assert torch.equal(routing.chosen.sum((1, 2)), 2 * given.mask.sum(1))
        if choice == "top-tokens":
            # Factor 2 over 4 experts: half of the real tokens, rounded up.
            room = torch.ceil(given.mask.sum(1, keepdim=True) / 2).long()
            assert torch.equal(routing.chosen.sum(1), room.expand(-1, EXPERTS))
        if choice == "above":
            assert routing.scores is not None
            real = given.mask.unsqueeze(-1)
            assert torch.equal(routing.chosen, (routing.scores > 0) & real)
        if normalize == "chosen" and score != "identity":
            total = routing.weights.sum(2)[given.mask & (routing.weights.sum(2) != 0)]
            torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
        out = output(router, given)
        assert torch.isfinite(out).all()
        learns = weight != "one" and not (weight == "scores" and score in WITHOUT_GRADIENT)
        assert routing.weight_of_row.requires_grad == learns
        if learns:
            out.sum().backward()
            assert router.weight.grad is not None
            assert torch.isfinite(router.weight.grad).all()
            # The only expert of a token has a weight of w / w = 1, whatever w is.
            assert router.weight.grad.any() or (choice, normalize) == ("balanced", "chosen")


def test_weights_by_hand():
    # One token, logits (log 3, 0): softmax (3/4, 1/4), sigmoid (3/4, 1/2); only expert 0 is chosen.
    x = torch.tensor([[[math.log(3), 0.0]]], dtype=torch.float64)
    expected = {
        ("sigmoid", "softmax", "no"): 3 / 4,
        ("softmax", "sigmoid", "all"): (3 / 4) / (5 / 4),
        ("softmax", "clean-sigmoid", "all"): (3 / 4) / (5 / 4),
        ("sigmoid", "scores", "all"): (3 / 4) / (5 / 4),
        ("sigmoid", "clean-softmax", "no"): 3 / 4,
        ("identity", "scores", "no"): math.log(3),
        ("softmax", "one", "no"): 1.0,
        ("softmax", "one", "all"): 1 / 2,
        ("sigmoid", "scores", "chosen"): 1.0,
    }
    for (score, weight, normalize), value in expected.items():
        router = exact("custom", 2, k=1, score=score, weight=weight, normalize=normalize)
        assert router(x).weights[0, 0].tolist() == pytest.approx([value, 0.0], abs=1e-15)


def test_a_combination_is_the_named_router():
    x = torch.randn(3, 8, DIM, dtype=torch.float64)
    for name, recipe in {
        "token-choice": {},
        "mixtral": {"normalize": "chosen"},
        "expert-choice": {"choice": "top-tokens"},
        "unified": {"score": "unified", "choice": "top-pairs"},
        "sinkhorn-token-choice": {"score": "sinkhorn", "weight": "clean-softmax"},
        "sinkhorn-expert-choice": {
            "score": "sinkhorn",
            "choice": "top-tokens",
            "weight": "softmax",
        },
        "sparse-transport-expert-choice": {
            "score": "sparse-transport",
            "choice": "top-tokens",
            "weight": "softmax",
            "only_positive": True,
        },
        "base": {"score": "identity", "choice": "balanced", "weight": "sigmoid"},
    }.items():
        named, combined = build(name), custom(**recipe)
        combined.load_state_dict(named.state_dict())
        assert torch.equal(named(x).weights, combined(x).weights), name
        assert named.reach == combined.reach, name


def test_settings_go_to_the_part_that_knows_them():
    # epsilon and iterations to the score, k and capacity to the choice.
    router = custom(score="sinkhorn", epsilon=0.5, iterations=3, k=1, capacity=2, priority="gate")
    assert router.recipe.score == Sinkhorn(epsilon=0.5, iterations=3)
    choice = router.recipe.choice
    assert isinstance(choice, TopExperts)
    assert (choice.k, choice.capacity.rows, choice.priority) == (1, 2, "gate")
    # A capacity that both parts know goes to both.
    router = custom(score="sparse-transport", choice="top-tokens", capacity_factor=1.5)
    choice, score = router.recipe.choice, router.recipe.score
    assert isinstance(choice, TopTokens)
    assert isinstance(score, SparseTransport)
    assert choice.capacity == score.capacity == Capacity(factor=1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"score": "softmx"},
            "score is 'softmx'; allowed: 'softmax', 'sigmoid', 'relu', 'identity'",
        ),
        ({"choice": "top"}, "choice is 'top'; allowed: 'top-experts', 'top-tokens', 'top-pairs'"),
        ({"weight": "score"}, "weight is 'score'; allowed: 'scores', 'softmax', 'clean-softmax'"),
        ({"normalize": "sum"}, "normalize is 'sum'; allowed: 'no', 'chosen', 'all'"),
        (
            {"budget": 2.0},
            "softmax x top-experts knows no setting 'budget'; it knows capacity, exp.* k, pri",
        ),
        ({"epsilon": 0.5, "kk": 1}, "knows no setting 'epsilon', 'kk'; it knows capacity,"),
        ({"score": "unified", "alpha": 2.0}, "alpha is 2.0; it must lie between 0"),
        ({"choice": "above", "capacity": 2}, "softmax x above knows no setting 'capacity'"),
        ({"choice": "top-tokens", "k": 2}, "softmax x top-tokens knows no setting 'k'"),
        ({"reach": "token"}, "softmax x top-experts knows no setting 'reach'"),
        (
            {"choice": "top-tokens", "convention": "vmoe"},  # a convention of no factor
            "capacity and capacity_factor are both None; where experts choose",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(settings, message):
    with untyped(), pytest.raises(ValueError, match=message):
        routers.build("custom", dim=DIM, num_experts=EXPERTS, **settings)


def test_pairs_above_a_threshold_of_ones_own():
    router = exact("custom", 2, score="sigmoid", choice="above", threshold=0.6)
    routing = router(torch.tensor([[[1.0, 0.0], [-1.0, 2.0]]], dtype=torch.float64))
    assert pairs(routing.chosen[0]) == {(0, 0), (1, 1)}  # sigmoid(1) = .73, sigmoid(0) = .5
