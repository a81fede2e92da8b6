"""Losses on ragged groups, each against a loop over the groups, in values and gradients."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional

from moefold.preference import (
    ConsistentComparator,
    Groups,
    pairs_of,
    preference_loss,
    preference_losses,
)
from moefold.preference.scorers import LinearScorer
from tests.preference.common import comparator, one_by_one, random_groups

OWN = "moefold.preference.losses"  # studies may have registered more


def labelled(kind: str, count: int = 12, **parts: Any) -> Any:
    groups = random_groups(count, **parts)
    draw = torch.Generator().manual_seed(3)
    size = len(groups.candidates)
    if kind == "chosen":
        return groups
    if kind == "utilities":
        # Whole numbers, so that there are ties; the first two of a group differ.
        values = torch.randint(0, 4, (size,), generator=draw).double()
        values[groups.starts] = 7.0
        return Groups(
            candidates=groups.candidates, lengths=groups.lengths, utilities=values, **parts
        )
    ranks = torch.cat([torch.randperm(n, generator=draw) // 2 for n in groups.lengths.tolist()])
    if kind == "partial":
        ranks = ranks.where(ranks < 2, -1)
    return Groups(candidates=groups.candidates, lengths=groups.lengths, ranks=ranks, **parts)


def better(groups: Any, n: int) -> list[tuple[int, int]]:
    """Pairs of candidates of a group of which the first is better, by a look at every two."""
    own = slice(int(groups.starts[n]), int(groups.starts[n] + groups.lengths[n]))
    size = int(groups.lengths[n])
    found = []
    for i in range(size):
        for j in range(size):
            if groups.chosen is not None:
                is_better = i == int(groups.chosen[n]) and j != i
            elif groups.ranks is not None:
                one, other = groups.ranks[own].tolist()[i], groups.ranks[own].tolist()[j]
                is_better = one != -1 and (other == -1 or one < other)
            else:
                is_better = bool(groups.utilities[own][i] > groups.utilities[own][j])
            if is_better:
                found.append((i, j))
    return found


def looped(name: str, scores: Tensor, groups: Any, **settings: Any) -> Tensor:
    """The definition, group by group."""
    parts = []
    for n, (s, best) in enumerate(one_by_one(groups, scores, groups.best)):
        pairs = better(groups, n)
        if name in ("pair-logistic", "pair-squared"):
            margin = settings.get("margin", 0.0)
            if not pairs:  # all are tied
                parts.append(torch.zeros((), dtype=s.dtype))
                continue
            z = torch.stack([s[i] - s[j] for i, j in pairs])
            each = functional.softplus(margin - z)
            if name == "pair-squared":
                each = (1 - z.sigmoid()).square()
            if settings.get("by_utility"):
                own = groups.utilities.split(groups.lengths.tolist())[n]
                each = each * torch.stack([own[i] - own[j] for i, j in pairs])
            parts.append(each.mean() if settings.get("per_group", True) else each.sum())
        elif name == "listwise":
            parts.append(-s.softmax(0)[best].sum().log())
        elif name == "listnet":
            wanted = groups.utilities.split(groups.lengths.tolist())[n] / settings["temperature"]
            parts.append(functional.cross_entropy(s, wanted.softmax(0)))
        elif name == "plackett-luce":
            parts.append(_luce(s, places(groups, n)))
        else:
            parts.append(_lambda(s, groups.utilities.split(groups.lengths.tolist())[n]))
    each = torch.stack(parts)
    weights = torch.ones(len(each)) if groups.weights is None else groups.weights
    return (each * weights.to(each)).sum() / weights.sum()


def places(groups: Any, n: int) -> list[int]:
    own = slice(int(groups.starts[n]), int(groups.starts[n] + groups.lengths[n]))
    if groups.chosen is not None:
        return [0 if i == int(groups.chosen[n]) else -1 for i in range(int(groups.lengths[n]))]
    if groups.ranks is not None:
        return groups.ranks[own].tolist()
    values = groups.utilities[own].tolist()
    return [sorted(set(values), reverse=True).index(v) for v in values]


def _luce(s: Tensor, ranks: list[int]) -> Tensor:
    total = torch.zeros((), dtype=s.dtype)
    for i, rank in enumerate(ranks):
        if rank != -1:
            left = [j for j, other in enumerate(ranks) if other == -1 or other >= rank]
            total = total + s[left].logsumexp(0) - s[i]
    return total


def _lambda(s: Tensor, utility: Tensor) -> Tensor:
    gain = utility - utility.min()
    order = s.detach().argsort(descending=True, stable=True).tolist()
    discount = [1 / math.log2(2 + order.index(i)) for i in range(len(s))]
    ideal = sum(g / math.log2(2 + p) for p, g in enumerate(sorted(gain.tolist(), reverse=True)))
    total = torch.zeros((), dtype=s.dtype)
    for i in range(len(s)):
        for j in range(len(s)):
            if utility[i] > utility[j]:
                change = abs(float(gain[i] - gain[j]) * (discount[i] - discount[j])) / ideal
                total = total + change * functional.softplus(s[j] - s[i])
    return total


CASES = [
    *((name, kind, {}) for name in ("pair-logistic", "pair-squared", "listwise", "plackett-luce")
      for kind in ("chosen", "ranks", "partial", "utilities")),
    ("pair-logistic", "chosen", {"per_group": False}),
    ("pair-logistic", "chosen", {"margin": 0.5}),
    ("pair-logistic", "utilities", {"by_utility": True}),
    ("pair-squared", "ranks", {"per_group": False}),
    ("lambda-rank", "utilities", {}),
    ("listnet", "utilities", {"temperature": 0.7}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "settings"), CASES)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_a_loss_is_its_definition_group_by_group(name, kind, settings, weighted):
    parts: dict[str, Any] = {"weights": torch.arange(1.0, 13.0)} if weighted else {}
    groups = labelled(kind, **parts)
    net = comparator()
    found = preference_loss(net, groups, name, **settings)
    gradient = torch.autograd.grad(found, list(net.parameters()))
    wanted = looped(name, net.scores(groups.candidates), groups, **settings)
    wanted_gradient = torch.autograd.grad(wanted, list(net.parameters()))
    # The same sums of a few hundred float64 terms in another order.
    assert torch.allclose(found, wanted, atol=1e-12, rtol=1e-12)
    for one, other in zip(gradient, wanted_gradient, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_every_loss_is_compared_with_its_definition():
    own = [n for n in preference_losses.names() if preference_losses.get(n).__module__ == OWN]
    assert {name for name, _, _ in CASES} == set(own)


def test_listnet_is_listwise_when_it_is_cold():
    groups = random_groups(6)
    draw = torch.Generator().manual_seed(1)
    utility = torch.rand(len(groups.candidates), generator=draw, dtype=torch.float64)
    told = Groups(candidates=groups.candidates, lengths=groups.lengths, utilities=utility)
    net = comparator()
    cold = preference_loss(net, told, "listnet", temperature=1e-5)
    assert torch.allclose(cold, preference_loss(net, told, "listwise"), atol=1e-12)


@pytest.mark.parametrize("name", ["pair-logistic", "pair-squared", "listwise", "plackett-luce"])
def test_the_order_of_candidates_and_groups_does_not_matter(name):
    groups = random_groups(9)
    net = comparator()
    turned = []
    for n in torch.randperm(9).tolist():
        one = groups.take([n])
        order = torch.randperm(int(one.lengths[0]))
        chosen = int((order == one.chosen[0]).nonzero())
        turned.append(Groups.of([one.candidates[order]], chosen=[chosen]))
    found = preference_loss(net, Groups.concatenate(turned), name)
    assert torch.allclose(found, preference_loss(net, groups, name), atol=1e-13)


def test_with_one_alternative_pair_and_list_are_one_loss():
    groups = random_groups(20, most=2)
    net = comparator()
    made = [preference_loss(net, groups, name) for name in ("pair-logistic", "listwise")]
    assert torch.allclose(made[0], made[1], atol=1e-13)
    one, other = (torch.autograd.grad(loss, list(net.parameters())) for loss in made)
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(one, other, strict=True))


def test_a_choice_has_no_pairs_among_the_losers():
    groups: Any = Groups.of([torch.zeros(4, 1), torch.zeros(2, 1)], chosen=[2, 0])
    pairs = pairs_of(groups)
    assert list(zip(pairs.winner.tolist(), pairs.loser.tolist(), strict=True)) == [
        (2, 0), (2, 1), (2, 3), (4, 5),
    ]  # fmt: skip
    assert pairs.group.tolist() == [0, 0, 0, 1]
    assert pairs.weight.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])


def test_centring_settles_the_constant_and_nothing_else():
    groups = random_groups(30)
    net: Any = ConsistentComparator(torch.nn.Linear(5, 1)).double()
    plain = preference_loss(net, groups)
    means = torch.stack([s.mean() for (s,) in one_by_one(groups, net.scores(groups.candidates))])
    found = preference_loss(net, groups, centring=0.1)
    assert torch.allclose(found - plain, 0.1 * means.square().mean(), atol=1e-13)
    found.backward()
    assert float(net.scorer.bias.grad) == pytest.approx(0.2 * float(means.detach().mean()))


def test_centring_evaluates_the_net_once():
    # Under dropout a second evaluation would be of another net.
    groups = random_groups(9)
    net: Any = ConsistentComparator(nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 1))).double()
    torch.manual_seed(0)
    plain = preference_loss(net, groups)
    torch.manual_seed(0)
    found = preference_loss(net, groups, centring=0.1)
    torch.manual_seed(0)
    scores = net.scores(groups.candidates)
    means = torch.stack([s.mean() for (s,) in one_by_one(groups, scores)])
    assert torch.allclose(found - plain, 0.1 * means.square().mean(), atol=1e-13)


def test_groups_that_weigh_nothing_teach_nothing():
    groups = random_groups(3, weights=torch.zeros(3))
    for name in ("pair-logistic", "listwise", "plackett-luce"):
        net = comparator()
        loss = preference_loss(net, groups, name)
        loss.backward()
        assert float(loss.detach()) == 0
        assert not any(p.grad is not None and p.grad.any() for p in net.parameters())
    assert float(preference_loss(comparator(), groups.take([])).detach()) == 0


def test_a_linear_scorer_finds_the_utility_of_maximum_likelihood():
    # A conditional logit: of each group one is drawn by softmax of its utility.
    draw = np.random.default_rng(0)
    utility = np.array([1.0, -2.0, 0.5])
    bodies, chosen = [], []
    for size in draw.integers(2, 6, 400):
        x = draw.normal(size=(size, 3))
        p = np.exp(x @ utility)
        bodies.append(x)
        chosen.append(int(draw.choice(size, p=p / p.sum())))
    groups: Any = Groups.of(bodies, chosen=chosen)

    def negative_log_likelihood(w: np.ndarray) -> float:
        each = [x @ w for x in bodies]
        return sum(np.log(np.exp(s).sum()) - s[c] for s, c in zip(each, chosen, strict=True))

    wanted = minimize(negative_log_likelihood, np.zeros(3), method="BFGS", options={"gtol": 1e-9}).x
    net: Any = ConsistentComparator(LinearScorer(3)).double()
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = preference_loss(net, groups, "listwise")
        loss.backward()
        return loss

    optimizer.step(closure)
    found = net.scorer.out.weight[0].detach().numpy()
    # BFGS stops by differences of values, which knows its minimum to about 1e-6.
    assert np.allclose(found, wanted, atol=1e-5)
    assert np.allclose(found, utility, atol=0.3)  # of 400 choices the standard error is about 0.1


def test_refusals():
    net, groups = comparator(), random_groups(3)
    with pytest.raises(
        ValueError, match=r"unknown preference loss 'pair-logistics'.*pair-logistic"
    ):
        preference_loss(net, groups, "pair-logistics")
    with pytest.raises(ValueError, match="'listwise' has no setting 'margin'; it has none"):
        preference_loss(net, groups, "listwise", margin=1.0)
    with pytest.raises(ValueError, match="'lambda-rank' needs utilities of all candidates"):
        preference_loss(net, groups, "lambda-rank")
    with pytest.raises(ValueError, match="no utilities to weigh pairs by"):
        preference_loss(net, groups, by_utility=True)
    with pytest.raises(ValueError, match="'listnet' needs utilities of all candidates"):
        preference_loss(net, groups, "listnet")
    with pytest.raises(ValueError, match="temperature is 0; it must be positive"):
        preference_loss(net, labelled("utilities"), "listnet", temperature=0)
    bare = Groups(candidates=groups.candidates, lengths=groups.lengths)
    for name in ("pair-logistic", "listwise", "plackett-luce"):
        with pytest.raises(ValueError, match="say nothing of which candidates are better"):
            preference_loss(net, bare, name)
