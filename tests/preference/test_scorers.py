"""Built-in nets: the mixture against a loop over its experts, and configs as data."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import moefold
from moefold.preference import (
    ConsistentComparator,
    Groups,
    NetConfig,
    agreement,
    averaged_perceptron,
    group_scores,
    pair_nets,
    preference_loss,
    scorers,
)
from moefold.preference.scorers import MixtureScorer
from moefold.routing import SparseRouting
from tests.preference.common import random_groups


def mixture(**settings: Any) -> Any:
    torch.manual_seed(0)
    return MixtureScorer(5, 2, num_experts=3, hidden=4, **settings).double()


@pytest.mark.parametrize("over", ["candidate", "context"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_mixture_is_the_weighted_sum_of_the_scorers_it_chooses(over, k):
    net: Any = MixtureScorer(
        5, 0 if over == "candidate" else 2, num_experts=3, hidden=4, over=over, balance=0.0,
        router=moefold.routers.config("token-choice", k=k),
    ).double()  # fmt: skip
    x, context = torch.randn(8, 5).double(), torch.randn(8, 2).double()
    given = (x,) if over == "candidate" else (x, context)
    by = given[-1]
    probabilities = (by @ net.router.weight.t()).softmax(1)
    inputs = torch.cat(given, 1)
    wanted = []
    for n in range(8):
        total = torch.zeros((), dtype=torch.float64)
        for e in probabilities[n].topk(k).indices.tolist():
            hidden = torch.tanh(net.hidden[e] @ inputs[n] + net.bias[e])
            total = total + probabilities[n, e] * (net.out[e] @ hidden)[0]
        wanted.append(total)
    found = net(*given)[:, 0]
    # The router scores in float32 or better: here in float64.
    assert torch.allclose(found, torch.stack(wanted), atol=1e-12)
    weight = torch.randn(8).double()
    parameters = list(net.parameters())
    one = torch.autograd.grad(found @ weight, parameters)
    other = torch.autograd.grad(torch.stack(wanted) @ weight, parameters)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(one, other, strict=True))


def test_by_the_context_a_group_has_one_expert():
    net: Any = ConsistentComparator(mixture(over="context"))
    groups = random_groups(20, context=torch.randn(20, 2).double())
    with moefold.record_routing(net) as record:
        group_scores(net, groups)
    (routing,) = record["scorer"]
    assert isinstance(routing, SparseRouting)
    chosen = routing.chosen[0].int().argmax(1)
    first = chosen[groups.starts][groups.group_of_candidate]
    assert torch.equal(chosen, first)
    assert len(set(chosen.tolist())) > 1


def test_a_candidates_score_does_not_depend_on_the_others():
    net: Any = mixture()
    x, context = torch.randn(8, 5).double(), torch.randn(8, 2).double()
    assert torch.allclose(net(x, context)[3:5], net(x[3:5], context[3:5]), atol=1e-13)


def test_the_balance_loss_rides_in_training_only():
    groups = random_groups(20, context=torch.randn(20, 2).double())
    gradients = []
    for balance in (0.0, 10.0):
        net: Any = ConsistentComparator(mixture(balance=balance))
        preference_loss(net, groups).backward()
        gradients.append(net.scorer.router.weight.grad)
    assert not torch.allclose(*gradients, atol=1e-3)
    quiet: Any = ConsistentComparator(mixture(balance=10.0)).eval()
    preference_loss(quiet, groups).backward()
    assert torch.allclose(quiet.scorer.router.weight.grad, gradients[0], atol=1e-13)


def test_the_balance_loss_counts_once_with_centring():
    groups = random_groups(20, context=torch.randn(20, 2).double())
    gradients = []
    for centring in (0.0, 1e-12):
        net: Any = ConsistentComparator(mixture(balance=10.0))
        preference_loss(net, groups, centring=centring).backward()
        gradients.append(net.scorer.router.weight.grad)
    assert torch.allclose(*gradients, atol=1e-9)


def test_a_mixture_learns_phases():
    # The sign of the context says which of two opposite utilities counts.
    torch.manual_seed(0)
    x, sign = torch.randn(600, 2, 1), torch.randn(600, 1).sign()
    chosen = ((x[:, 1, 0] > x[:, 0, 0]) == (sign[:, 0] > 0)).long()
    groups: Any = Groups.of(list(x), chosen=chosen.tolist(), context=sign)
    net: Any = ConsistentComparator(
        MixtureScorer(1, 1, num_experts=2, hidden=2, over="context", balance=0.01)
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        preference_loss(net, groups).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(agreement(group_scores(net, groups), groups).mean()) > 0.97


@pytest.mark.parametrize("name", [*scorers.names(), *pair_nets.names()])
def test_a_config_is_data_that_builds_the_same_net(name):
    settings = {"num_experts": 3, "router": moefold.routers.config("token-choice", k=2)}
    config = NetConfig(name, settings if name == "mixture" else {})
    again = NetConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    made = []
    for one in (config, again):
        torch.manual_seed(0)
        made.append(one.build(5).state_dict())
    assert list(made[0]) == list(made[1])
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NetConfig("mpl"), "unknown net 'mpl'; there are: linear, mlp, mixture, "),
        (
            NetConfig("mlp", {"width": 3}),
            "net 'mlp' has no setting 'width'; it has hidden, activation",
        ),
        (NetConfig("mlp", {"activation": "step"}), "activation is 'step'; allowed: tanh, sigmoid"),
        (
            NetConfig("mixture", {"over": "group"}),
            "over is 'group'; allowed: 'candidate', 'context'",
        ),
        (NetConfig("mixture", {"over": "context"}), "over is 'context', and the groups have none"),
        (
            NetConfig("mixture", {"router": moefold.routers.config("expert-choice")}),
            r"router expert-choice\(\) looks at the group: a candidate's score would depend",
        ),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ValueError, match=message):
        config.build(5)


OWN = [name for name in scorers.names() if scorers.get(name).__module__ == MixtureScorer.__module__]
"""Scorers of this package; an application may have registered more."""

INPUTS = {
    "float64, as NumPy makes them": torch.float64,
    "bool": torch.bool,
    "int8": torch.int8,
    "bfloat16": torch.bfloat16,
}


@pytest.mark.parametrize("dtype", INPUTS.values(), ids=list(INPUTS))
@pytest.mark.parametrize("context", [0, 2])
def test_candidates_may_be_of_any_type(dtype, context):
    for name in [*OWN, *pair_nets.names()]:
        torch.manual_seed(0)
        net = NetConfig(name).build(3, context)
        rows = [torch.tensor([[0, 1, 1], [1, 0, 1]]), torch.tensor([[1, 1, 0], [0, 0, 1]])]
        rows = rows[: 1 if name in OWN else 2]
        with_it = [torch.tensor([[1, 0], [1, 1]])] if context else []
        found = net(*(part.to(dtype) for part in rows + with_it))
        assert found.dtype == torch.float32
        assert torch.equal(found, net(*(part.float() for part in rows + with_it)))


def test_a_net_says_what_it_was_built_for():
    words = r"the net takes 7 numbers, features and context together, and was given 5 \+ {}; give"
    for name in [*OWN, "mixture by context"]:
        settings = {"over": "context"} if name == "mixture by context" else {}
        net = NetConfig(name.split()[0], settings).build(5, 2)
        with pytest.raises(ValueError, match=words.format(0)):
            net(torch.zeros(4, 5))
        with pytest.raises(ValueError, match=words.format(3)):
            net(torch.zeros(4, 5), torch.zeros(4, 3))


def separable(count: int = 100) -> Any:
    groups = random_groups(count, features=3, most=5)
    utility = groups.candidates @ torch.tensor([1.0, -1.0, 0.5]).double()
    parts = [int(u.argmax()) for u in utility.split(groups.lengths.tolist())]
    return Groups(candidates=groups.candidates, lengths=groups.lengths, chosen=torch.tensor(parts))


def test_the_perceptron_separates_what_can_be():
    groups = separable()
    net: Any = averaged_perceptron(groups, passes=30)
    assert float(agreement(group_scores(net.double(), groups), groups).mean()) > 0.97


def test_the_perceptron_by_hand():
    # w = 0: both others score as much as the chosen one; w = x_c - mean of them. Then nothing.
    groups: Any = Groups.of([[[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]], chosen=[0])
    net: Any = averaged_perceptron(groups, passes=2)
    assert net.scorer.out.weight.tolist() == [[1.0, 0.0]]
    # Of half the weight, half the step.
    light: Any = averaged_perceptron(replace(groups, weights=torch.tensor([0.5])), passes=1)
    assert light.scorer.out.weight.tolist() == [[0.5, 0.0]]
    with pytest.raises(ValueError, match="passes is 0; it must be 1 or more"):
        averaged_perceptron(groups, passes=0)
    with pytest.raises(ValueError, match="candidates of numbers without context"):
        averaged_perceptron(Groups.of([["a", "b"]], chosen=[0]))
