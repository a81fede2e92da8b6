"""Statistics of a routing: each by hand on one small layout, then on the routings of routers."""

from dataclasses import replace
from math import log

import pytest
import torch
from torch import Tensor

from moefold import metrics, routers
from moefold.routing import Grouping, SoftRouting, SparseRouting

ROUNDING = 1e-12

# Two sequences of three tokens, four experts; the last token is padding.
#
#              e0   e1   e2   e3
#   token 0   .6*   .3   .1   .0        * has a row, its weight is the score
#   token 1   .5*   .4*  .1   .0
#   token 2   .4*   .3*  .2*  .1
#   token 3   .7    .1   .1   .1        asked for e0, which was full
#   token 4   .9*   .1   .0   .0
#   token 5   padding; scores 9 everywhere
SCORES = [
    [[0.6, 0.3, 0.1, 0.0], [0.5, 0.4, 0.1, 0.0], [0.4, 0.3, 0.2, 0.1]],
    [[0.7, 0.1, 0.1, 0.1], [0.9, 0.1, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]],
]
CHOSEN = [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]]
WANTED = [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]]
MASK = [[True, True, True], [True, True, False]]


def example() -> SparseRouting:
    scores = torch.tensor(SCORES, dtype=torch.float64)
    return SparseRouting.from_choice(
        torch.tensor(CHOSEN, dtype=torch.bool),
        scores,
        scores=scores,
        logits=scores,
        wanted=torch.tensor(WANTED, dtype=torch.bool),
        mask=torch.tensor(MASK),
    )


def soft_example(mask: Tensor | None = None) -> SoftRouting:
    """One sequence of two tokens; expert 0 returns .75 and .5 of them, expert 1 the rest."""
    logits = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.float64).log()[None, ..., None]
    combine = logits.exp()
    if mask is not None:
        combine = combine * mask[:, :, None, None]
    return SoftRouting(
        dispatch_weight=logits.softmax(1),
        combine_weight=combine,
        grouping=Grouping("sequence", 1, 2),
        logits=logits,
        mask=mask,
    )


# By hand


def test_load_and_its_worst():
    # Rows 4, 2, 1, 0 of 7; the mean share is 1/4.
    expected = [4 / 7, 2 / 7, 1 / 7, 0]
    assert metrics.load(example()).tolist() == pytest.approx(expected, abs=ROUNDING)
    assert metrics.max_violation(example()) == pytest.approx(4 * 4 / 7 - 1, abs=ROUNDING)
    assert metrics.dead_experts(example()) == 1


def test_margin():
    # Best minus second: .3, .1, .1, .6, .8 of five real tokens.
    assert metrics.margin(example()) == pytest.approx((0.3 + 0.1 + 0.1 + 0.6 + 0.8) / 5)


def test_experts_of_tokens():
    # Seven rows of five real tokens; token 3 has none; one of eight pairs was turned away.
    assert metrics.experts_per_token(example()) == pytest.approx(7 / 5)
    assert metrics.uncovered(example()) == pytest.approx(1 / 5)
    assert metrics.dropped(example()) == pytest.approx(1 / 8)


def test_routed_mass():
    # .6 + .9 + .9 + 0 + .9 of five real tokens.
    assert metrics.routed_mass(example()) == pytest.approx(3.3 / 5)


def of_logits(*rows: list[float]) -> SparseRouting:
    """One sequence of tokens with these logits, who all take every expert."""
    logits = torch.tensor([rows], dtype=torch.float64)
    return SparseRouting.from_choice(torch.ones_like(logits).bool(), logits, logits=logits)


def test_entropy():
    # One token is undecided between two of four experts, the other certain: half of log 2.
    routing = of_logits([0.0, 0.0, -1e4, -1e4], [0.0, -1e4, -1e4, -1e4])
    assert metrics.entropy(routing) == pytest.approx(log(2) / 2 / log(4), abs=ROUNDING)


@pytest.mark.parametrize("experts", [2, 3, 7])
def test_entropy_of_the_undecided_is_one(experts):
    assert metrics.entropy(of_logits([5.0] * experts)) == pytest.approx(1.0, abs=ROUNDING)


def test_coactivation():
    # Of the four tokens of expert 0, two have expert 1 and one has expert 2; both tokens of expert
    # 1 have expert 0; expert 3 has no token.
    assert metrics.coactivation(example()).tolist() == [
        [1.0, 0.5, 0.25, 0.0],
        [1.0, 1.0, 0.5, 0.0],
        [1.0, 1.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]


def test_of_a_soft_routing():
    # Expert 0 returns 1.25 of the two tokens' mass, expert 1 .75.
    routing = soft_example()
    assert metrics.load(routing).tolist() == pytest.approx([0.625, 0.375], abs=ROUNDING)
    assert metrics.max_violation(routing) == pytest.approx(0.25, abs=ROUNDING)
    assert metrics.routed_mass(routing) == pytest.approx(1.0, abs=ROUNDING)
    assert metrics.experts_per_token(routing) == 2.0
    assert metrics.dropped(routing) == metrics.uncovered(routing) == metrics.margin(routing) == 0.0
    assert metrics.dead_experts(routing) == 0
    assert metrics.coactivation(routing).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    # Entropy of (.75, .25) and of (.5, .5), over log 2.
    certain = -(0.75 * log(0.75) + 0.25 * log(0.25)) / log(2)
    assert metrics.entropy(routing) == pytest.approx((certain + 1) / 2, abs=ROUNDING)


def test_padding_of_a_soft_routing():
    routing = soft_example(torch.tensor([[True, False]]))
    assert metrics.load(routing).tolist() == pytest.approx([0.75, 0.25], abs=ROUNDING)
    assert metrics.routed_mass(routing) == pytest.approx(1.0, abs=ROUNDING)
    certain = -(0.75 * log(0.75) + 0.25 * log(0.25)) / log(2)
    assert metrics.entropy(routing) == pytest.approx(certain, abs=ROUNDING)


def test_slots_of_an_expert_are_one_expert():
    # One token; the slots of expert 0 weigh 1 and 1, those of expert 1 weigh 1.5 and .5: two to
    # each expert of four in all, so between experts the token is undecided.
    weight = torch.tensor([[[[1.0, 1.0], [1.5, 0.5]]]], dtype=torch.float64)
    routing = SoftRouting(
        dispatch_weight=torch.ones_like(weight),
        combine_weight=weight / 4,
        grouping=Grouping("sequence", 1, 1),
        logits=weight.log(),
    )
    assert metrics.entropy(routing) == pytest.approx(1.0, abs=ROUNDING)
    assert metrics.load(routing).tolist() == pytest.approx([0.5, 0.5], abs=ROUNDING)
    assert metrics.experts_per_token(routing) == 4.0


# Spare rows and nothing at all


def test_spare_rows_count_nowhere():
    routing = example()
    spare = torch.zeros(3)
    longer = replace(
        routing,
        token_of_row=torch.cat([routing.token_of_row, spare.long()]),
        weight_of_row=torch.cat([routing.weight_of_row, spare.double()]),
    )
    assert metrics.metrics(longer) == pytest.approx(metrics.metrics(routing), abs=ROUNDING)
    assert torch.equal(metrics.load(longer), metrics.load(routing))
    assert torch.equal(metrics.coactivation(longer), metrics.coactivation(routing))


def test_nothing_has_no_statistics():
    nothing = replace(
        example(),
        token_of_row=torch.zeros(0, dtype=torch.long),
        weight_of_row=torch.zeros(0),
        rows_per_expert=torch.zeros(4, dtype=torch.long),
        wanted=torch.zeros(2, 3, 4, dtype=torch.bool),
        mask=torch.zeros(2, 3, dtype=torch.bool),
    )
    values = metrics.metrics(nothing)
    assert values.pop("dead_experts") == 4.0
    assert set(values.values()) == {0.0}
    assert metrics.load(nothing).tolist() == [0.0] * 4


def test_one_expert_is_neither_undecided_nor_ahead():
    router = routers.build("token-choice", dim=4, num_experts=1, k=1)
    routing = router(torch.randn(1, 3, 4))
    assert metrics.entropy(routing) == 0.0
    assert metrics.margin(routing) == 0.0
    assert metrics.max_violation(routing) == 0.0


# Of routers


def test_every_metric_is_a_number_without_gradient():
    router = routers.build("token-choice", dim=4, num_experts=3, capacity=2)
    routing = router(torch.randn(2, 5, 4))
    values = metrics.metrics(routing)
    assert set(values) == {
        "max_violation",
        "dead_experts",
        "entropy",
        "margin",
        "experts_per_token",
        "uncovered",
        "dropped",
        "routed_mass",
    }
    assert all(type(value) is float for value in values.values())
    assert not metrics.load(routing).requires_grad
    # Five tokens ask twice for three experts with two rows each: at most 6 of 10 found room.
    assert values["dropped"] >= 0.4
    assert values["experts_per_token"] == pytest.approx(2 * (1 - values["dropped"]))


def test_dropless_token_choice_with_shared_weights():
    router = routers.build("mixtral", dim=4, num_experts=3, k=2)
    values = metrics.metrics(router(torch.randn(2, 50, 4)))
    assert values["experts_per_token"] == 2.0
    assert values["dropped"] == values["uncovered"] == 0.0
    assert values["routed_mass"] == pytest.approx(1.0, rel=1e-6)  # float32


def test_expert_choice_is_balanced_and_may_leave_tokens_out():
    router = routers.build("expert-choice", dim=4, num_experts=4, capacity_factor=1.0)
    values = metrics.metrics(router(torch.randn(1, 40, 4)))
    assert values["max_violation"] == 0.0
    assert values["experts_per_token"] == 1.0
    assert values["uncovered"] > 0.0
