"""What each kind of comparator guarantees: signs, circles, biases, and the network of 1988."""

from typing import Any

import pytest
import torch
from torch import nn

from moefold.preference import (
    AntisymmetricComparator,
    ConsistentComparator,
    FreeComparator,
    Groups,
    group_scores,
    log_odds,
    pairs_of,
    preference_loss,
    tournament,
)
from moefold.preference.scorers import LinearScorer, MirrorNet, MLPScorer, PairMLP
from tests.preference.common import comparator, random_groups


def nets(features: int) -> dict[str, Any]:
    return {
        "consistent": ConsistentComparator(MLPScorer(features, hidden=6)),
        "antisymmetric": AntisymmetricComparator(MirrorNet(features, hidden=6)),
        "any net": AntisymmetricComparator(PairMLP(features, hidden=6, activation="relu")),
    }


@pytest.mark.parametrize("kind", nets(1))
def test_swapping_changes_the_sign_exactly(kind):
    for seed in range(20):
        torch.manual_seed(seed)
        net = nets(4)[kind].double()
        a, b = torch.randn(2, 30, 4, dtype=torch.float64)
        assert (net(a, b) + net(b, a)).abs().max() <= 1e-12
        assert net(a, a).abs().max() <= 1e-12
        # Floating-point subtraction itself is antisymmetric, so the probabilities add up too.
        assert (net(a, b).sigmoid() + net(b, a).sigmoid() - 1).abs().max() <= 1e-12


def test_a_free_comparator_promises_nothing():
    torch.manual_seed(0)
    net: Any = FreeComparator(PairMLP(4)).double()
    a, b = torch.randn(2, 30, 4, dtype=torch.float64)
    assert (net(a, b) + net(b, a)).abs().max() > 1e-2


def test_a_consistent_comparator_has_no_circles():
    for seed in range(30):
        groups = random_groups(5, seed=seed, most=9)
        assert tournament(comparator(seed=seed), groups).cyclic_triples == 0.0


ROCK_PAPER_SCISSORS = Groups.of(
    [
        [one.tolist(), other.tolist()]
        for one, other in torch.eye(3)[torch.tensor([[1, 0], [2, 1], [0, 2]])]
    ],
    chosen=[0, 0, 0],
)  # paper beats rock, scissors beat paper, rock beats scissors


def trained(net: Any) -> float:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        preference_loss(net, ROCK_PAPER_SCISSORS).backward()
        optimizer.step()
    return float(preference_loss(net, ROCK_PAPER_SCISSORS).detach())


def test_a_circle_is_learnt_by_the_antisymmetric_form_only():
    torch.manual_seed(0)
    assert trained(AntisymmetricComparator(MirrorNet(3))) < 0.05
    # The three log-odds of a consistent comparator add up to zero, so that the mean of their
    # softplus is at least softplus(0) = log 2, by convexity.
    assert trained(ConsistentComparator(MLPScorer(3))) >= torch.log(torch.tensor(2.0)) - 1e-4


def test_an_output_bias_gets_no_gradient():
    torch.manual_seed(0)
    net: Any = ConsistentComparator(
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    ).double()
    for loss in ("pair-logistic", "pair-squared", "listwise", "plackett-luce"):
        net.zero_grad()
        preference_loss(net, random_groups(), loss).backward()
        # The gradients of a pair's two halves are one number with two signs.
        assert net.scorer[2].bias.grad.abs().max() <= 1e-15
        assert net.scorer[0].bias.grad.abs().max() > 1e-4


def test_adding_a_constant_to_the_scores_changes_nothing():
    class Shifted(nn.Module):
        def __init__(self, scorer: nn.Module) -> None:
            super().__init__()
            self.scorer = scorer

        def forward(self, x):
            return self.scorer(x) + 100.0

    net = comparator()
    moved = ConsistentComparator(Shifted(net.scorer))
    groups = random_groups()
    for loss in ("pair-logistic", "listwise", "plackett-luce"):
        found = preference_loss(moved, groups, loss)
        # Of scores near 100 the differences have 1e-14 of rounding.
        assert torch.allclose(found, preference_loss(net, groups, loss), atol=1e-12)


def test_two_halves_with_opposite_signs_are_the_network_of_1988():
    # z = w . tanh(U a + c) - w . tanh(U b + c), by hand, with the gradient of softplus(-z).
    net = comparator(3, hidden=4)
    u, c, w = net.scorer.hidden.weight, net.scorer.hidden.bias, net.scorer.out.weight[0]
    a, b = torch.randn(2, 3, dtype=torch.float64)
    preference_loss(net, Groups.of([torch.stack([b, a])], chosen=[1])).backward()
    with torch.no_grad():
        ha, hb = torch.tanh(u @ a + c), torch.tanh(u @ b + c)
        slope = -torch.sigmoid(-(w @ ha - w @ hb))
        ga, gb = w * (1 - ha**2), w * (1 - hb**2)
        assert torch.allclose(net.scorer.out.weight.grad[0], slope * (ha - hb), atol=1e-14)
        wanted = slope * (torch.outer(ga, a) - torch.outer(gb, b))
        assert torch.allclose(u.grad, wanted, atol=1e-14)
        assert torch.allclose(c.grad, slope * (ga - gb), atol=1e-14)


def test_a_difference_net_is_no_scorer_unless_linear():
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)

        def forward(self, a, b):
            return self.out(torch.tanh(self.hidden(a - b)))

    # Odd in a - b, hence antisymmetric, and still it goes in circles.
    net: Any = FreeComparator(Difference()).double()
    with torch.no_grad():
        net.net.hidden.weight.copy_(torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, -9.0]]))
        net.net.out.weight.copy_(torch.tensor([[1.0, 1.0, 1.0]]))
    a, b, c = torch.tensor([[[2.0, -1.0]], [[1.0, -2.0]], [[0.0, 0.0]]], dtype=torch.float64)
    signs = [float(z.detach()) for z in (net(a, b), net(b, c), net(c, a))]
    assert min(signs) > 0.9, signs  # a over b, b over c, c over a


def test_every_comparison_of_pairs_is_that_of_its_candidates():
    groups = random_groups(9)
    pairs = pairs_of(groups)
    torch.manual_seed(0)
    for net in (comparator(), AntisymmetricComparator(MirrorNet(5)).double()):
        z = log_odds(net, groups, pairs)
        for n in range(len(pairs)):
            a, b = (
                groups.candidates[int(end[n])].unsqueeze(0) for end in (pairs.winner, pairs.loser)
            )
            # Sums of few products, in another order.
            assert torch.allclose(z[n], net(a, b)[0], atol=1e-13)


def test_a_context_is_given_to_every_candidate_of_its_group():
    torch.manual_seed(0)
    groups = random_groups(4, context=torch.randn(4, 2, dtype=torch.float64))
    net: Any = ConsistentComparator(MLPScorer(5, 2)).double()
    rows = groups.context[groups.group_of_candidate]
    wanted = net.scorer(groups.candidates, rows).squeeze(1)
    assert torch.equal(group_scores(net, groups), wanted)
    other: Any = AntisymmetricComparator(MirrorNet(5, 2)).double()
    assert log_odds(other, groups, pairs_of(groups)).isfinite().all()


def test_texts_go_to_the_scorer_as_they_are():
    class Length(nn.Module):
        def forward(self, texts, context):
            return (
                torch.tensor([len(t) - len(c) for t, c in zip(texts, context, strict=True)]) * 1.0
            )

    groups: Any = Groups.of([["aaa", "a"], ["b", "bb"]], chosen=[0, 1], context=["xx", ""])
    net: Any = ConsistentComparator(Length())
    assert group_scores(net, groups).tolist() == [1.0, -1.0, 1.0, 2.0]
    assert float(preference_loss(net, groups)) < 0.5


def test_refusals():
    class Wide(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 2)

    groups = random_groups(2)
    with pytest.raises(ValueError, match=r"Wide returned \(\d+, 2\) for \d+ candidates or pairs"):
        group_scores(ConsistentComparator(Wide()), groups)
    with pytest.raises(ValueError, match="FreeComparator gives no candidate a number of its own"):
        preference_loss(FreeComparator(PairMLP(5)), groups, "listwise")
    assert group_scores(ConsistentComparator(LinearScorer(5)).double(), groups).ndim == 1
