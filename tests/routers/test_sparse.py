"""The sparse router around its three choices: logits, noise, jitter, precision; named recipes."""

import math

import pytest
import torch
from torch import Tensor, nn

from moefold import routers
from moefold.ops.transport import sparse_transport
from moefold.routers import SoftRouter, SparseRouter
from moefold.routing import SparseRouting
from tests.routers.common import LEARNT, batch, build, exact, maps, pairs, route, state_of

ROUNDING = 1e-12  # float64: a few operations on numbers around 1


def tokens(*rows: list[float]) -> Tensor:
    """One sequence of these tokens."""
    return torch.tensor([rows], dtype=torch.float64)


# Named recipes by hand


def test_switch_takes_one_with_room_for_a_quarter_more():
    # Probabilities (3/4, 1/4): expert 0 for all eight tokens; room for ceil(1.25 * 8 / 2) = 5.
    routing = exact("switch", 2, jitter=0.0)(tokens(*[[math.log(3), 0.0]] * 8))
    assert pairs(routing.chosen[0]) == {(t, 0) for t in range(5)}
    assert routing.weights[0, :, 0].tolist() == pytest.approx([3 / 4] * 5 + [0] * 3, abs=ROUNDING)


def test_mixtral_shares_the_weight_between_two():
    # Probabilities 1/2, 1/4, 1/4 of which two are taken: 2/3 and 1/3.
    routing = exact("mixtral", 3)(tokens([math.log(2), 0.0, 0.0]))
    assert routing.weights[0, 0].tolist() == pytest.approx([2 / 3, 1 / 3, 0], abs=ROUNDING)
    plain = exact("token-choice", 3)(tokens([math.log(2), 0.0, 0.0]))
    assert plain.weights[0, 0].tolist() == pytest.approx([1 / 2, 1 / 4, 0], abs=ROUNDING)


def test_renormalized_weights_are_those_of_what_is_left():
    # One row of each expert. Token 1 wants both and gets expert 1 alone: its weight is 1.
    router = exact("token-choice", 2, k=2, capacity=1, renormalize=True)
    routing = router(tokens([3.0, 0.0], [1.0, 2.0]))
    assert pairs(routing.chosen[0]) == {(0, 0), (1, 1)}
    assert routing.weights[0].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_expert_choice_by_hand():
    # One row of each expert; probabilities (.9, .1), (.8, .2), (.6, .4): expert 0 takes token 0,
    # expert 1 takes token 2. Token 1 is covered by nobody.
    x = tokens([0.9, 0.1], [0.8, 0.2], [0.6, 0.4]).log()
    routing = exact("expert-choice", 2, capacity=1)(x)
    assert pairs(routing.chosen[0]) == {(0, 0), (2, 1)}
    assert routing.weight_of_row.tolist() == pytest.approx([0.9, 0.4], abs=ROUNDING)


def test_sparse_transport_leaves_rows_empty_rather_than_take_zeros():
    # With room for every token, an expert takes those that its column of the plan is positive for.
    router = exact("sparse-transport-expert-choice", 3, capacity=8, gamma=0.1)
    x = 3 * torch.randn(4, 8, 3, dtype=torch.float64)
    plan = sparse_transport(x.softmax(-1), 8, gamma=0.1)
    routing = router(x)
    assert torch.equal(routing.chosen, plan > 0)
    assert routing.chosen.sum(1).min() < 8
    torch.testing.assert_close(
        routing.weights, x.softmax(-1) * routing.chosen, rtol=0, atol=ROUNDING
    )


def test_deepseek_weighs_by_sigmoids_and_scales():
    # Sigmoids 3/4, 1/2, 1/2, 1/4: experts 0 and 1, weights 3/5 and 2/5 times 2.5.
    logit = math.log(3)
    router = exact("bias-balanced", 4, k=2, scale=2.5)
    routing = router(tokens([logit, 0.0, 0.0, -logit]))
    assert routing.weights[0, 0].tolist() == pytest.approx([1.5, 1.0, 0, 0], abs=ROUNDING)


def test_a_token_stays_in_its_best_groups_of_experts():
    # Sigmoids in two groups of two: (.9, .1) sums to 1.0, (.6, .5) to 1.1. Group 1 wins, although
    # the best expert is in group 0.
    x = tokens([0.9, 0.1, 0.6, 0.5]).logit()
    assert pairs(exact("bias-balanced", 4, k=1)(x).chosen[0]) == {(0, 0)}
    limited = exact("bias-balanced", 4, k=1, expert_groups=2)
    assert pairs(limited(x).chosen[0]) == {(0, 2)}
    # The bias takes part in the choice of groups: +.2 on expert 1 makes it 1.2.
    state_of(limited).copy_(torch.tensor([0.0, 0.2, 0.0, 0.0]))
    assert pairs(limited(x).chosen[0]) == {(0, 0)}
    # Both groups allowed is no limit.
    both = exact("bias-balanced", 4, k=2, expert_groups=2, top_groups=2)
    assert pairs(both(x).chosen[0]) == {(0, 0), (0, 2)}


def test_a_group_is_judged_by_its_two_best():
    # (.5, .4, .4) sums to .9 by its two best and to 1.3 by all; (.9, .1, .1) to 1.0 and to 1.1.
    x = tokens([0.5, 0.4, 0.4, 0.9, 0.1, 0.1]).logit()
    routing = exact("bias-balanced", 6, k=2, expert_groups=2)(x)
    assert pairs(routing.chosen[0]) == {(0, 3), (0, 4)}


def test_negative_biased_scores_do_not_open_a_closed_group():
    # Biases of -2 make every score negative; experts of the closed group must not win with a zero.
    router = exact("bias-balanced", 4, k=2, expert_groups=2)
    state_of(router).fill_(-2.0)
    routing = router(tokens([0.9, 0.1, 0.6, 0.5]).logit())
    assert pairs(routing.chosen[0]) == {(0, 2), (0, 3)}


def test_cosine_logits_by_hand():
    # Width 2, projection identity, experts (1, 0) and (3, 4) of any length: the token (0, 2) has
    # cosines 0 and 4/5, divided by the temperature 0.5.
    router = build("cosine", dim=2, experts=2, width=2, temperature=0.5)
    assert isinstance(router, SparseRouter)
    with torch.no_grad():
        router.projection.copy_(torch.eye(2))
        router.weight.copy_(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        router.temperature.fill_(0.5)
    routing = router(tokens([0.0, 2.0], [0.0, 1e-3]))
    expected = [0.0, 1.6, 0.0, 1.6]
    assert routing.logits.flatten().tolist() == pytest.approx(expected, abs=ROUNDING)
    routing.weight_of_row.square().sum().backward()
    assert router.temperature.grad is not None
    assert router.temperature.grad != 0


def test_cosine_survives_a_token_and_a_temperature_of_zero():
    router = build("cosine", dim=2, experts=2, width=2)
    assert isinstance(router, SparseRouter)
    with torch.no_grad():
        router.temperature.fill_(0.0)
    routing = router(tokens([0.0, 0.0], [1.0, 2.0]))
    assert routing.logits[0, 0].tolist() == [0.0, 0.0]
    assert torch.isfinite(routing.logits).all()
    routing.weights.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in router.parameters() if p.grad is not None)


def test_base_weighs_by_the_sigmoid_of_the_assigned():
    # Both prefer expert 0; in training token 1 has to go to expert 1, at test it does not.
    x = tokens([2.0, 0.0], [1.0, 0.0])
    router = exact("base", 2).train()
    routing = router(x)
    assert pairs(routing.chosen[0]) == {(0, 0), (1, 1)}
    assert routing.weights[0, 1, 1].item() == pytest.approx(1 / 2, abs=ROUNDING)
    assert pairs(router.eval()(x).chosen[0]) == {(0, 0), (1, 0)}


def test_the_recipes_name_their_losses():
    named = {name: build(name).losses for name in routers.names()}
    assert {name for name, losses in named.items() if "balance" in losses} == {
        "token-choice",
        "switch",
        "mixtral",
        "compete",
        "cosine",
    }
    assert named["bias-balanced"] == {"sequence-balance": 1e-4}
    assert named["relu"] == {"l1": 1.0}
    assert named["expert-race"] == {"similarity": 1e-5}
    assert not any(named[name] for name in ("expert-choice", "soft", "unified", "base", "hash"))


# Noise and jitter


@pytest.mark.parametrize(
    "name", ["token-choice", "sinkhorn-token-choice", "expert-choice", "sinkhorn-expert-choice"]
)
def test_noise_has_its_standard_deviation_in_training_only(name):
    # noise_std 2 of 4 experts: 1/2. 4 * 1000 * 4 draws estimate it to 1 / sqrt(2 n) = 0.6 %.
    router = build(name, noise_std=2.0)
    x = torch.randn(4, 1000, 6, dtype=torch.float64)
    routing = router.train()(x)
    assert isinstance(routing, SparseRouting)
    assert routing.logits is not None
    assert routing.noisy_logits is not None
    noise = routing.noisy_logits - routing.logits
    assert routing.noise_std == 0.5
    assert noise.std().item() == pytest.approx(0.5, rel=0.03)
    assert noise.mean().item() == pytest.approx(0.0, abs=5 * 0.5 / 16000**0.5)
    assert not torch.equal(maps(router(x))[1], maps(routing)[1])

    quiet = router.eval()(x)
    assert isinstance(quiet, SparseRouting)
    assert quiet.noisy_logits is None
    assert quiet.noise_std == 0.0
    assert torch.equal(maps(router(x))[1], maps(quiet)[1])


def test_weights_come_from_the_logits_the_authors_took():
    # Token choice weighs by what was scored, noise included; the Sinkhorn token choice of the
    # released code by the clean softmax, its expert choice by the noisy one.
    x = torch.randn(1, 8, 6, dtype=torch.float64)
    for name, noisy in (
        ("token-choice", True),
        ("expert-choice", True),
        ("sinkhorn-token-choice", False),
        ("sinkhorn-expert-choice", True),
    ):
        routing = build(name, noise_std=4.0).train()(x)
        assert isinstance(routing, SparseRouting)
        of = routing.noisy_logits if noisy else routing.logits
        assert of is not None
        torch.testing.assert_close(
            routing.weights, of.softmax(-1) * routing.chosen, rtol=0, atol=ROUNDING
        )


def test_noise_on_the_soft_router_is_not_divided():
    router = build("soft", noise_std=0.5)
    x = torch.randn(4, 1000, 6, dtype=torch.float64)
    quiet, noisy = router.eval()(x).logits, router.train()(x).logits
    assert quiet is not None
    assert noisy is not None
    assert (noisy - quiet).std().item() == pytest.approx(0.5, rel=0.03)


def test_jitter_multiplies_the_input_in_training_only():
    # Logits are the tokens; all are 1, so they show the factors.
    router = exact("switch", 4, jitter=0.25).train()
    x = torch.ones(1, 5000, 4, dtype=torch.float64)
    factors = router(x).logits
    assert factors.min().item() >= 0.75
    assert factors.max().item() <= 1.25
    assert factors.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.03)  # of a uniform draw
    assert torch.equal(router.eval()(x).logits, x)
    assert torch.equal(router.train()(x).dispatch(x), torch.ones_like(router(x).dispatch(x)))


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*LEARNT, "soft"])
def test_half_precision_is_scored_in_float32(name, dtype):
    # The logits are those of a float32 router with the same rounded parameters and tokens.
    router = routers.build(name, dim=6, num_experts=4).to(dtype).eval()
    x = torch.randn(3, 7, 6).to(dtype)
    routing = router(x)
    logits = routing.logits
    assert logits is not None
    assert logits.dtype == torch.float32
    assert maps(routing)[1].dtype == torch.float32
    for one, two in zip(maps(routing), maps(router.float()(x.float())), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", [*LEARNT, "soft"])
def test_autocast_does_not_reach_the_router(name):
    router = routers.build(name, dim=6, num_experts=4).eval()
    x = torch.randn(3, 7, 6)
    outside = maps(router(x))
    with torch.autocast("cpu", torch.bfloat16):
        inside = maps(router(x))
    assert all(torch.equal(one, two) for one, two in zip(outside, inside, strict=True))


def test_close_scores_are_told_apart():
    # 1 and 1 + 2^-10 are the same in bfloat16 as a score; as float32 logits the larger one wins.
    router = routers.build("token-choice", dim=2, num_experts=2, k=1)
    assert isinstance(router, SparseRouter)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 2.0**-10]]))
    x = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    assert pairs(router.bfloat16()(x).chosen[0]) == {(0, 1)}


@pytest.mark.parametrize("name", [*LEARNT, "soft"])
def test_float64_stays_float64(name):
    routing = route(build(name), batch())
    assert routing.logits is not None
    assert routing.logits.dtype == torch.float64
    assert maps(routing)[1].dtype == torch.float64


# Gradients


@pytest.mark.parametrize("name", [n for n in LEARNT if n not in ("custom",)])
def test_the_choice_has_no_gradient_and_the_weights_have(name):
    router = build(name)
    given = batch()
    x = given.x.clone().requires_grad_()
    routing = route(router, given.with_x(x))
    assert isinstance(routing, SparseRouting)
    assert not routing.chosen.requires_grad
    routing.weight_of_row.square().sum().backward()
    for tensor in (x, *router.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.any()
    assert x.grad is not None
    assert not x.grad[~routing.chosen.any(2)].any()  # tokens without a row learn nothing


def test_the_soft_router_mixes_tokens_as_they_came():
    # Directions are normalised, so that a token ten times as long has the same logits; what is
    # mixed into the slots is not. (The 1e-6 under the root differs by a relative 1e-8 or so.)
    router = build("soft", slots=2)
    assert isinstance(router, SoftRouter)
    x = torch.nn.functional.normalize(torch.randn(1, 5, 6, dtype=torch.float64), dim=-1) * 10
    one, two = router(x), router(10 * x)
    assert one.logits is not None
    assert two.logits is not None
    torch.testing.assert_close(one.logits, two.logits, rtol=0, atol=1e-7)
    torch.testing.assert_close(10 * one.dispatch(x), two.dispatch(10 * x), rtol=0, atol=1e-4)
    assert one.logits.abs().max().item() <= 1 + ROUNDING
    nn.init.constant_(router.scale, 7.0)
    torch.testing.assert_close(router(x).logits, 7 * one.logits, rtol=0, atol=1e-9)
    router(x).combine(torch.randn(8, 6, dtype=torch.float64)).square().sum().backward()
    assert router.scale.grad is not None
    assert router.scale.grad != 0
