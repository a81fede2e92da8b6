"""What routers learn without gradient: a bias, a threshold, the strength of a penalty."""

import pytest
import torch
from torch import nn

from moefold import routers
from moefold.routers import SoftRouter, SparseRouter
from moefold.routers.adapt import Adapt, AdaptiveL1, BiasBalance, RunningThreshold
from moefold.routing import SparseRouting
from tests.routers.common import build, exact, pairs, state_of, untyped

ADAPTIVE = ("bias-balanced", "threshold", "relu")
FLOAT32 = 1e-6  # a state is float32, 6e-8 of its value, and an update adds a few roundings


def routing_of(chosen: list[list[int]], scores: list[list[float]] | None = None) -> SparseRouting:
    """One sequence in which every token takes the marked experts, by the given scores."""
    marks = torch.tensor([chosen], dtype=torch.bool)
    competed = torch.zeros(marks.shape) if scores is None else torch.tensor([scores])
    return SparseRouting.from_choice(marks, competed, scores=competed)


def padded(routing: SparseRouting) -> SparseRouting:
    """The same routing with a padding token behind it, whose score is large and not chosen."""
    batch, tokens, experts = routing.chosen.shape
    assert routing.scores is not None
    scores = torch.cat([routing.scores, torch.full((batch, 1, experts), 99.0)], 1)
    chosen = torch.cat([routing.chosen, torch.zeros(batch, 1, experts, dtype=torch.bool)], 1)
    mask = torch.arange(tokens + 1).expand(batch, -1) < tokens
    return SparseRouting.from_choice(chosen, scores, scores=scores, mask=mask)


# The bias that balances


def test_bias_moves_by_its_rate_towards_the_idle():
    # Loads 3, 1, 2, 2; mean 2: expert 0 has too much to do, expert 1 too little.
    routing = routing_of([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1]])
    rule = BiasBalance(rate=0.25)
    state = rule.update(torch.tensor([0.0, 1.0, 2.0, 3.0]), [routing])
    assert state.tolist() == [-0.25, 1.25, 2.0, 3.0]


def test_bias_moves_by_the_relative_error():
    # Loads 3, 1, 2, 2; mean 2: the error is -1/2, +1/2, 0, 0 of the mean.
    routing = routing_of([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1]])
    rule = BiasBalance(rate=0.25, rule="error")
    assert rule.update(torch.zeros(4), [routing]).tolist() == [-0.125, 0.125, 0.0, 0.0]


def test_the_error_is_relative_however_few_tokens_there_are():
    # One token, four experts: loads 1, 0, 0, 0, mean 1/4; the errors are -3 and +1 times the mean.
    rule = BiasBalance(rate=0.25, rule="error")
    state = rule.update(torch.zeros(4), [routing_of([[1, 0, 0, 0]])])
    assert state.tolist() == [-0.75, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("rule", ["sign", "error"])
def test_bias_sums_the_loads_of_a_step(rule):
    # Expert 0 leads in one pass and expert 1 in the other: over the step they are balanced.
    passes = [routing_of([[1, 0], [1, 0]]), routing_of([[0, 1], [0, 1]])]
    assert BiasBalance(rule=rule).update(torch.zeros(2), passes).tolist() == [0.0, 0.0]


def test_the_bias_chooses_and_does_not_weigh():
    # Sigmoids .5, .5, .5: the tie goes to expert 0; a bias of .1 on expert 2 turns it.
    router = exact("bias-balanced", 3, k=1, renormalize=False)
    x = torch.zeros(1, 1, 3, dtype=torch.float64)
    assert pairs(router(x).chosen[0]) == {(0, 0)}
    state = state_of(router)
    state.copy_(torch.tensor([0.0, 0.0, 0.1]))
    routing = router(x)
    assert pairs(routing.chosen[0]) == {(0, 2)}
    assert routing.weights[0, 0].tolist() == [0.0, 0.0, 0.5]


def test_the_bias_balances_what_would_collapse():
    # Every token prefers expert 0 by .2; steps of .01 have evened the loads after 30 updates.
    router = exact("bias-balanced", 2, k=1, rate=0.01)
    logit = torch.linspace(-1, 1, 64, dtype=torch.float64)
    x = torch.stack([logit + 1.0, logit.flip(0)], 1).unsqueeze(0)
    first = router(x).rows_per_expert
    for _ in range(100):
        router.update([router(x)])
    last = router(x).rows_per_expert
    assert first.tolist()[0] > 44
    assert abs(int(last[0] - last[1])) <= 4


# The threshold that follows the budget


def test_threshold_lies_between_the_last_taken_and_the_first_left():
    # Budget 1 for two tokens: two pairs, .9 and .6; the next is .4. Halfway: .5.
    routing = routing_of([[1, 0], [1, 0]], [[0.9, 0.1], [0.6, 0.4]])
    rule = RunningThreshold(budget=1.0, momentum=0.75)
    state = rule.update(torch.tensor(0.1), [routing])
    assert state.item() == pytest.approx(0.75 * 0.1 + 0.25 * 0.5, rel=FLOAT32)


def test_threshold_where_the_budget_takes_everything():
    routing = routing_of([[1, 1]], [[0.9, 0.3]])
    state = RunningThreshold(budget=2.0, momentum=0.0).update(torch.tensor(0.5), [routing])
    assert state.item() == pytest.approx(0.3, rel=FLOAT32)


def test_threshold_rounds_its_budget_as_the_unified_router_does():
    # 1.5 experts for each of three tokens are 4.5 pairs: halves are rounded up, so five of six.
    scores = [[0.6, 0.5], [0.4, 0.3], [0.2, 0.1]]
    rule = RunningThreshold(budget=1.5, momentum=0.0)
    state = rule.update(torch.tensor(0.0), [routing_of([[1, 1]] * 3, scores)])
    assert state.item() == pytest.approx(0.15, rel=FLOAT32)


def test_threshold_joins_the_passes_of_a_step():
    # Scores .9 .1 | .8 .7 | .2 .3, budget 1 for three tokens: .9 .8 .7 are taken, .3 is not.
    passes = [
        routing_of([[1, 0], [1, 1]], [[0.9, 0.1], [0.8, 0.7]]),
        routing_of([[0, 0]], [[0.2, 0.3]]),
    ]
    state = RunningThreshold(budget=1.0, momentum=0.0).update(torch.tensor(0.0), passes)
    assert state.item() == pytest.approx(0.5, rel=FLOAT32)


def test_the_threshold_router_takes_what_is_above():
    # alpha = 0: softmax scores. log 3 against 0 is .75 and .25; even logits are .5 and .5.
    router = exact("threshold", 2, budget=1.0, alpha=0.0)
    x = torch.tensor([[[3.0, 1.0], [1.0, 1.0]]], dtype=torch.float64).log()
    state = state_of(router)
    state.fill_(0.6)
    assert pairs(router(x).chosen[0]) == {(0, 0)}
    state.fill_(0.4)
    assert pairs(router(x).chosen[0]) == {(0, 0), (1, 0), (1, 1)}
    state.fill_(0.5)  # at the threshold is not above it
    assert pairs(router(x).chosen[0]) == {(0, 0)}
    assert router(x).weights[0, 0].tolist() == pytest.approx([0.75, 0.0])


def test_the_threshold_learns_the_budget():
    router = build("threshold", budget=1.5, momentum=0.5)
    for _ in range(30):
        router.update([router(torch.randn(4, 64, 6, dtype=torch.float64))])
    counts = [
        router(torch.randn(4, 64, 6, dtype=torch.float64)).rows_per_expert.sum().item() / 256
        for _ in range(20)
    ]
    # The threshold averages two batches of 256 tokens, each with a sampling error of some 5 %.
    assert sum(counts) / len(counts) == pytest.approx(1.5, rel=0.15)


# The penalty that keeps ReLU sparse


@pytest.mark.parametrize(
    ("chosen", "factor"),
    [
        ([[1, 1, 1, 0], [1, 1, 0, 0]], 2.0),  # five pairs of two tokens: denser than k = 2
        ([[1, 1, 0, 0], [1, 1, 0, 0]], 0.5),  # exactly k: sparse enough
        ([[1, 0, 0, 0], [0, 0, 0, 0]], 0.5),
    ],
    ids=["too dense", "as asked", "too sparse"],
)
def test_penalty_grows_while_too_dense(chosen, factor):
    rule = AdaptiveL1(k=2, start=1.0, factor=2.0)
    assert rule.update(torch.tensor(3.0), [routing_of(chosen)]).item() == 3.0 * factor


def test_penalty_judges_the_step_as_a_whole():
    # Three and one of two tokens together are 4 = k * tokens pairs: not too dense.
    passes = [routing_of([[1, 1, 1]]), routing_of([[1, 0, 0]])]
    rule = AdaptiveL1(k=2, start=1.0, factor=2.0)
    assert rule.update(torch.tensor(1.0), passes).item() == 0.5


def test_the_relu_router_states_its_strength():
    # The loss divides by k (the paper's 1 / k).
    router = exact("relu", 4, k=2)
    state_of(router).fill_(0.5)
    routing = router(torch.tensor([[[2.0, -1.0, 0.0, 3.0]]], dtype=torch.float64))
    assert routing.l1_strength.item() == 0.25
    assert routing.weights[0, 0].tolist() == [2.0, 0.0, 0.0, 3.0]
    assert pairs(routing.chosen[0]) == {(0, 0), (0, 3)}


# All of them


@pytest.mark.parametrize("name", ADAPTIVE)
def test_padding_does_not_move_the_state(name):
    rule = rule_of(build(name))
    scores = [[0.9, 0.2, 0.1, 0.7], [0.8, 0.3, 0.6, 0.4]]
    routing = routing_of([[1, 0, 0, 1], [1, 1, 1, 0]], scores)
    state = rule.initial(4)
    assert torch.equal(rule.update(state, [routing]), rule.update(state, [padded(routing)]))
    assert not torch.equal(rule.update(state, [routing]), state)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("rule", ["sign", "error"])
def test_a_step_without_real_tokens_leaves_the_state(name, rule):
    settings = {"rule": rule} if name == "bias-balanced" else {}
    router = build(name, **settings)
    before = state_of(router).clone()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    router.update([router(x, torch.zeros(2, 3, dtype=torch.bool))])
    assert torch.equal(state_of(router), before)
    router.update([])
    assert torch.equal(state_of(router), before)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_forward_reads_the_state_and_update_writes_it(name):
    router = build(name).train()
    before = state_of(router).clone()
    routing = router(torch.randn(2, 5, 6, dtype=torch.float64))
    assert torch.equal(state_of(router), before)
    router.update([routing])
    assert not torch.equal(state_of(router), before)
    assert not state_of(router).requires_grad


@pytest.mark.parametrize("name", [n for n in routers.names() if n not in ADAPTIVE])
def test_the_others_have_nothing_to_adapt(name):
    router = build(name)
    before = {key: value.clone() for key, value in router.state_dict().items()}
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    router.update([router(x, None, torch.randint(9, (2, 5)))])
    after = router.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert "state" not in after


# The state as a buffer


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize(
    "move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to(torch.float16)]
)
def test_the_state_stays_float32_in_half_precision(name, move):
    # 0.1001 is 0.1001 in float32 and 0.1001 + 1e-4 in bfloat16, where a rate of 1e-3 is lost.
    router = routers.build(name, dim=6, num_experts=4)
    state_of(router).fill_(0.1001)
    moved = move(nn.Sequential(router))[0]
    assert moved.weight.dtype in (torch.bfloat16, torch.float16)
    assert state_of(moved).dtype == torch.float32
    assert torch.equal(state_of(moved), torch.full_like(state_of(moved), 0.1001))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_state_follows_to_double(name):
    router = routers.build(name, dim=6, num_experts=4)
    state_of(router).fill_(0.1001)
    exact = state_of(router).double()
    assert torch.equal(state_of(router.double()), exact)
    assert state_of(router).dtype == torch.float64
    assert state_of(router.bfloat16()).dtype == torch.float32
    assert torch.equal(state_of(router).double(), exact)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_state_is_saved_and_loaded(name):
    router = build(name)
    state_of(router).fill_(0.3)
    other = build(name)
    other.load_state_dict(router.state_dict())
    assert torch.equal(state_of(other), state_of(router))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.equal(other(x).weights, router(x).weights)


@pytest.mark.parametrize("name", routers.names())
def test_a_router_made_on_meta_starts_as_any_other(name):
    with torch.device("meta"):
        router = routers.build(name, dim=6, num_experts=4)
    assert all(p.is_meta for p in (*router.parameters(), *router.buffers()))
    router.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.fill_(float("nan"))  # what to_empty leaves may be anything
    if name not in ("hash", "random"):  # they have nothing to reset
        assert isinstance(router, SparseRouter | SoftRouter)
        router.reset_parameters()
    fresh = dict(routers.build(name, dim=6, num_experts=4).named_buffers())
    for key, buffer in router.named_buffers():
        assert torch.equal(buffer, fresh[key])
        assert buffer.dtype == torch.float32
    routing = router(torch.randn(2, 5, 6), None, torch.randint(9, (2, 5)))
    assert torch.isfinite(routing.combine(routing.dispatch(torch.randn(2, 5, 6)))).all()


# Refusals


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bias-balanced", {"rate": 0.0}, "rate is 0.0; it must be a positive finite number"),
        ("bias-balanced", {"rule": "sgn"}, "rule is 'sgn'; allowed: 'sign', 'error'"),
        ("threshold", {"momentum": 1.0}, r"momentum is 1.0; it must lie in \[0, 1\)"),
        ("threshold", {"momentum": -0.1}, r"momentum is -0.1; it must lie in \[0, 1\)"),
        ("threshold", {"budget": 0.0}, "budget is 0.0; it must be a positive finite number"),
        ("threshold", {"budget": 5.0}, "budget is 5.0 experts a token, but there are only 4"),
        ("relu", {"factor": 1.0}, "factor is 1.0; it must be larger than 1"),
        ("relu", {"start": 0.0}, "start is 0.0; it must be a positive finite number"),
        ("relu", {"k": 5}, "k is 5, but there are only 4 experts"),
    ],
    ids=str,
)
def test_a_rule_out_of_its_range_is_refused(name, settings, message):
    with untyped(), pytest.raises(ValueError, match=message):
        routers.build(name, dim=6, num_experts=4, **settings)


def test_a_threshold_needs_scores():
    chosen = torch.tensor([[[True, False]]])
    routing = SparseRouting.from_choice(chosen, torch.ones(1, 1, 2))
    with pytest.raises(ValueError, match="carries no scores; adaptive routers need them"):
        RunningThreshold().update(torch.tensor(0.5), [routing])


def rule_of(router: nn.Module) -> Adapt:
    assert isinstance(router, SparseRouter)
    assert router.recipe.adapt is not None
    return router.recipe.adapt


@pytest.mark.parametrize(("k", "bound"), [(1, 1e4), (4, 1e-12)])
def test_the_strength_of_an_l1_penalty_finds_its_way_back(k, bound):
    # All four experts are always positive: too dense for k = 1, never for k = 4. Without bounds 600
    # steps of 1.2 leave float32 at either end (inf, or 0 that no factor moves again).
    rule = AdaptiveL1(k=k)
    router = routers.build("relu", dim=4, num_experts=4)
    nn.init.ones_(router.get_parameter("weight"))
    routing = router(torch.ones(1, 5, 4))
    state = rule.initial(4)
    for _ in range(600):
        state = rule.update(state, [routing])
    assert state == pytest.approx(bound, rel=1e-6)
