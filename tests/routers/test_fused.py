"""Recipes that one kernel follows: what they make of logits, and which of them there are."""

import pytest
import torch

from tests.ops.triton_library import DEVICE  # isort: skip - before any kernel is defined

from moefold.routers.adapt import AdaptiveL1, BiasBalance
from moefold.routers.capacity import Capacity
from moefold.routers.choice import TopExperts, TopTokens
from moefold.routers.fused import routed
from moefold.routers.score import Relu, Sigmoid, Softmax, Unified
from moefold.routers.weight import Weight
from tests.ops.triton_interpreter import kernels_everywhere

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

EPS = torch.finfo(torch.float32).eps

RECIPES = {
    "softmax": (Softmax(), TopExperts(k=2), Weight(), None),
    "renormalised sigmoid": (Sigmoid(), TopExperts(k=3), Weight(normalize="chosen"), None),
    "scaled unified": (Unified(alpha=0.3), TopExperts(k=2), Weight(scale=2.5), None),
    "biased": (Sigmoid(), TopExperts(k=2), Weight(), BiasBalance()),
}
OTHERS = {
    "another score": (Relu(), TopExperts(k=2), Weight(), None),
    "a score over tokens": (Unified(expert_score="token-softmax"), TopExperts(), Weight(), None),
    "another choice": (Softmax(), TopTokens(), Weight(), None),
    "capacity": (Softmax(), TopExperts(capacity=Capacity(factor=1.0)), Weight(), None),
    "groups of experts": (Softmax(), TopExperts(k=1, expert_groups=2), Weight(), None),
    "another weight": (Softmax(), TopExperts(), Weight(source="sigmoid"), None),
    "a sum over all experts": (Sigmoid(), TopExperts(), Weight(normalize="all"), None),
    "another state": (Softmax(), TopExperts(), Weight(), AdaptiveL1()),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("masked", [False, True], ids=["all real", "masked"])
def test_a_recipe_is_followed(recipe, masked):
    score, choice, weight, adapt = RECIPES[recipe]
    logits = torch.randn(2, 5, 6, device=DEVICE, requires_grad=True)
    valid = torch.rand(2, 5).to(DEVICE) < 0.6 if masked else None
    state = torch.randn(6, device=DEVICE)
    assert routed(score, choice, weight, adapt, logits, valid, state) is None or DEVICE == "cuda"
    with kernels_everywhere():
        fused = routed(score, choice, weight, adapt, logits, valid, state)
    assert fused is not None
    # One part after another; scores differ by roundings: six terms of a sum, two of an exponential
    # and of a division, on either side, and again where weights are divided.
    apart = 4 * (6 + 4) * EPS
    scores = score(logits, valid)
    torch.testing.assert_close(fused.scores, scores, rtol=apart, atol=0)
    contest = fused.scores.detach() if adapt is None else adapt.shift(fused.scores.detach(), state)
    chosen, wanted, most_rows = choice(contest, valid, True)
    assert torch.equal(fused.picked.chosen, chosen)
    assert (fused.picked.wanted, fused.picked.most_rows) == (wanted, most_rows)
    weights = weight(scores, logits, logits, chosen) * chosen
    torch.testing.assert_close(fused.weights, weights, rtol=apart, atol=0)
    (grad,) = torch.autograd.grad(fused.weights.sum(), logits)
    assert grad.any() or weight.normalize == "chosen"  # such weights always add up to 1


@pytest.mark.parametrize("recipe", OTHERS)
def test_other_recipes_are_left_to_their_parts(recipe):
    score, choice, weight, adapt = OTHERS[recipe]
    with kernels_everywhere():
        logits = torch.randn(1, 5, 6, device=DEVICE)
        assert routed(score, choice, weight, adapt, logits, None, torch.zeros(())) is None
