"""Auxiliary losses: each by hand, against loops over Python numbers, and at perfect balance.

Letters: E experts, f share of the pairs asked for, P mean probability.
"""

from dataclasses import replace
from math import erf, exp, log, sqrt

import pytest
import torch
from torch import Tensor

from moefold import routers
from moefold.losses import losses
from moefold.ops.select import top
from moefold.routing import Group, Grouping, SparseRouting

ROUNDING = 1e-12  # float64: sums of some hundred numbers around 1
OF_LOGITS = ("balance", "importance", "load", "z", "similarity")
OF_SCORES = ("sequence-balance", "l1")


def loss(name: str, routing: SparseRouting) -> float:
    return losses.get(name)(routing).item()


def routing_of(
    logits: list | Tensor,
    chosen: list | Tensor,
    scores: list | Tensor | None = None,
    mask: list | Tensor | None = None,
    noisy: Tensor | None = None,
    noise_std: float = 0.0,
    group: Group = "sequence",
    wanted: list | None = None,
) -> SparseRouting:
    """A routing in float64 from the matrices that losses read, [batch, tokens, experts]."""
    logits = torch.as_tensor(logits, dtype=torch.float64)
    marks = torch.as_tensor(chosen, dtype=torch.bool)
    competed = logits.softmax(-1) if scores is None else scores
    return SparseRouting.from_choice(
        marks,
        logits.softmax(-1),
        grouping=Grouping(group, logits.shape[0], logits.shape[1]),
        logits=logits,
        scores=torch.as_tensor(competed, dtype=torch.float64),
        mask=None if mask is None else torch.as_tensor(mask, dtype=torch.bool),
        noisy_logits=noisy,
        noise_std=noise_std,
        wanted=None if wanted is None else torch.as_tensor(wanted, dtype=torch.bool),
    )


def of_probabilities(rows: list) -> Tensor:
    """Logits whose softmax is this: [batch, tokens, experts]."""
    return torch.tensor(rows, dtype=torch.float64).log()


# By hand


def test_balance_by_hand():
    # Three of four tokens ask for expert 0: f = (3/4, 1/4); P = (.7, .3).
    #   2 (3/4 * .7 + 1/4 * .3) = 1.2
    logits = of_probabilities([[[0.9, 0.1], [0.8, 0.2]], [[0.8, 0.2], [0.3, 0.7]]])
    routing = routing_of(logits, [[[1, 0], [1, 0]], [[1, 0], [0, 1]]])
    assert loss("balance", routing) == pytest.approx(1.2, abs=ROUNDING)


def test_balance_counts_what_was_asked_for_not_what_found_room():
    # The same, but capacity left expert 0 a single token.
    logits = of_probabilities([[[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.3, 0.7]]])
    kept, asked = [[[1, 0], [0, 0], [0, 0], [0, 1]]], [[[1, 0], [1, 0], [1, 0], [0, 1]]]
    routing = routing_of(logits, kept, wanted=asked)
    assert loss("balance", routing) == pytest.approx(1.2, abs=ROUNDING)


def test_sequence_balance_by_hand():
    # Scores as DeepSeek's sigmoids, not summing to 1. Sequence 0: rows (.6, .2), (.2, .6) become
    # (3/4, 1/4), (1/4, 3/4), and its tokens take one expert each: 1. Sequence 1: (.6, .2) twice and
    # both take expert 0: 2 * 1 * 3/4 = 3/2. Mean 5/4. Over the whole batch it would be
    # f = (3/4, 1/4), P = (5/8, 3/8): 9/8.
    scores = [[[0.6, 0.2], [0.2, 0.6]], [[0.6, 0.2], [0.6, 0.2]]]
    chosen = [[[1, 0], [0, 1]], [[1, 0], [1, 0]]]
    routing = routing_of(torch.zeros(2, 2, 2), chosen, scores)
    assert loss("sequence-balance", routing) == pytest.approx(5 / 4, abs=ROUNDING)


def test_sequence_balance_leaves_out_a_bias_that_only_chooses():
    # A bias made both tokens take expert 1, but expert 0 has their better scores: it is counted.
    # 2 * 1 * 3/4 = 3/2; counting the choice would give 2 * 1 * 1/4 = 1/2.
    scores = [[[0.6, 0.2], [0.6, 0.2]]]
    routing = routing_of(torch.zeros(1, 2, 2), [[[0, 1], [0, 1]]], scores)
    assert loss("sequence-balance", routing) == pytest.approx(3 / 2, abs=ROUNDING)


def test_importance_by_hand():
    # Sums of probability: (1.5, .5), mean 1, standard deviation 1/2: (1/2)^2.
    logits = of_probabilities([[[0.9, 0.1], [0.6, 0.4]]])
    assert loss("importance", routing_of(logits, [[[1, 0], [1, 0]]])) == pytest.approx(0.25)


def test_importance_is_judged_by_group():
    # Two sequences, each fond of another expert: (1/2)^2 by sequence, nothing over the batch.
    logits = of_probabilities([[[0.75, 0.25]], [[0.25, 0.75]]])
    chosen = [[[1, 0]], [[0, 1]]]
    by_sequence = routing_of(logits, chosen)
    assert loss("importance", by_sequence) == pytest.approx(0.25, abs=ROUNDING)
    by_batch = routing_of(logits, chosen, group="batch")
    assert loss("importance", by_batch) == pytest.approx(0.0, abs=ROUNDING)


def test_load_by_hand():
    # One token, top-1, noise of standard deviation 1/2. Noisy logits (1, 0): tau = 1. Clean logits
    # (1, 1/2): chances 1 - Phi(0) = 1/2 and 1 - Phi(1) = .1586553.
    tail = (1 - erf(1 / sqrt(2))) / 2
    routing = routing_of(
        [[[1.0, 0.5]]],
        [[[1, 0]]],
        noisy=torch.tensor([[[1.0, 0.0]]], dtype=torch.float64),
        noise_std=0.5,
    )
    mean = (0.5 + tail) / 2
    assert loss("load", routing) == pytest.approx(((0.5 - tail) / 2 / mean) ** 2, abs=ROUNDING)


def test_load_takes_the_threshold_of_the_last_choice():
    # Top-2 of (3, 1, 0): tau = 1. At clean logits of 1 every expert has a chance of 1/2: balance.
    routing = routing_of(
        [[[1.0, 1.0, 1.0]]],
        [[[1, 1, 0]]],
        noisy=torch.tensor([[[3.0, 1.0, 0.0]]], dtype=torch.float64),
        noise_std=0.1,
    )
    assert loss("load", routing) == pytest.approx(0.0, abs=ROUNDING)


def test_z_by_hand():
    # logsumexp of (log 2, log 2) is log 4, of (0, log 3) too, of (0, 0) log 2.
    logits = [[[log(2), log(2)], [0.0, log(3)], [0.0, 0.0]]]
    routing = routing_of(logits, [[[1, 0], [0, 1], [1, 0]]])
    expected = (2 * log(4) ** 2 + log(2) ** 2) / 3
    assert loss("z", routing) == pytest.approx(expected, abs=ROUNDING)


def test_similarity_by_hand():
    # P = (3/4, 1/4), (1/4, 3/4): P'P has 5/8 on the diagonal and 3/8 off it.
    logits = of_probabilities([[[0.75, 0.25], [0.25, 0.75]]])
    # One expert each: M'M is the identity, W too: (5/8 + 5/8) / 2.
    alone = routing_of(logits, [[[1, 0], [0, 1]]])
    assert loss("similarity", alone) == pytest.approx(5 / 8, abs=ROUNDING)
    # Both experts for both: W is 1 everywhere, and the four entries of P'P sum to 2.
    together = routing_of(logits, [[[1, 1], [1, 1]]])
    assert loss("similarity", together) == pytest.approx(1.0, abs=ROUNDING)
    # Expert 0 for both, expert 1 for one: M'M is 2, 1, 1, 1. The diagonal (2, 1) has mean 3/2:
    # W = 4/3 and 2/3; off it W = 1 and 1. (4/3 + 2/3) 5/8 + 2 * 3/8 = 2, over 2 experts.
    mixed = routing_of(logits, [[[1, 0], [1, 1]]])
    assert loss("similarity", mixed) == pytest.approx(1.0, abs=ROUNDING)


def test_l1_by_hand():
    # ReLU scores of two tokens: (1, 0, 2), (3, 0, 0). Shares of tokens: 1, 0, 1/2; mean scores:
    # 2, 0, 1. 3 (1 * 2 + 1/2 * 1) = 7.5, times the strength.
    scores = [[[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]]]
    routing = routing_of(torch.zeros(1, 2, 3), [[[1, 0, 1], [1, 0, 0]]], scores)
    assert loss("l1", routing) == pytest.approx(7.5, abs=ROUNDING)
    strength = torch.tensor(0.125, dtype=torch.float64)
    assert loss("l1", replace(routing, l1_strength=strength)) == pytest.approx(7.5 / 8)


# At balance, the documented values


@pytest.mark.parametrize("k", [1, 2, 3])
def test_values_at_balance(k):
    # Four experts, four tokens; token t takes experts t .. t + k - 1. Whatever k is, balance is 1.
    chosen = torch.zeros(1, 4, 4, dtype=torch.bool)
    for token in range(4):
        chosen[0, token, [(token + i) % 4 for i in range(k)]] = True
    even = torch.zeros(1, 4, 4, dtype=torch.float64)
    routing = routing_of(even, chosen, noisy=torch.where(chosen, 1.0, 0.0).double(), noise_std=1.0)
    assert loss("balance", routing) == pytest.approx(1.0, abs=ROUNDING)
    assert loss("sequence-balance", routing) == pytest.approx(1.0, abs=ROUNDING)
    assert loss("importance", routing) == pytest.approx(0.0, abs=ROUNDING)
    assert loss("load", routing) == pytest.approx(0.0, abs=ROUNDING)
    assert loss("z", routing) == pytest.approx(log(4) ** 2, abs=ROUNDING)


def test_collapse_costs_as_many_times_as_there_are_experts():
    # All tokens on expert 0 with certainty: balance E, importance (std / mean)^2 = E - 1.
    logits = torch.zeros(1, 6, 4, dtype=torch.float64)
    logits[..., 0] = 100.0
    chosen = torch.zeros(1, 6, 4, dtype=torch.bool)
    chosen[..., 0] = True
    routing = routing_of(logits, chosen)
    assert loss("balance", routing) == pytest.approx(4.0, abs=ROUNDING)
    assert loss("sequence-balance", routing) == pytest.approx(4.0, abs=ROUNDING)
    assert loss("importance", routing) == pytest.approx(3.0, abs=ROUNDING)


# Against loops


def random_routing(seed: int, group: Group = "sequence") -> SparseRouting:
    """Some masked tokens, one fully masked sequence, none to three experts for each token."""
    torch.manual_seed(seed)
    logits = torch.randn(3, 5, 4, dtype=torch.float64).requires_grad_()
    noisy = logits + 0.5 * torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.rand(3, 5) < 0.7
    mask[1], mask[2, 0] = False, True
    chosen = (torch.rand(3, 5, 4) < 0.5) & mask.unsqueeze(-1)
    wanted = (chosen | (torch.rand(3, 5, 4) < 0.2)) & mask.unsqueeze(-1)
    return SparseRouting.from_choice(
        chosen,
        logits.softmax(-1),
        grouping=Grouping(group, 3, 5),
        logits=logits,
        noisy_logits=noisy,
        noise_std=0.5,
        scores=logits.sigmoid(),
        wanted=wanted,
        mask=mask,
    )


def real_tokens(routing: SparseRouting) -> list[tuple[int, int]]:
    assert routing.mask is not None
    return [(b, t) for b, t in routing.mask.nonzero().tolist()]


def groups_of(routing: SparseRouting) -> list[list[tuple[int, int]]]:
    """Real tokens of each group that has any."""
    found: dict[int, list[tuple[int, int]]] = {}
    label = {"sequence": lambda b, t: b, "batch": lambda b, t: 0, "position": lambda b, t: t}
    for b, t in real_tokens(routing):
        found.setdefault(label[str(routing.grouping.group)](b, t), []).append((b, t))
    return list(found.values())


def slow_agreement(rows: list[list[float]], asked: list[list[bool]]) -> float:
    pairs = sum(map(sum, asked))
    experts = range(len(rows[0]))
    share = [sum(row[e] for row in asked) / max(pairs, 1) for e in experts]
    mean = [sum(row[e] for row in rows) / len(rows) for e in experts]
    return len(experts) * sum(f * p for f, p in zip(share, mean, strict=True))


def slow_variation(mass: list[float]) -> float:
    mean = sum(mass) / len(mass)
    return sum((m - mean) ** 2 for m in mass) / len(mass) / mean**2


def slow(name: str, routing: SparseRouting) -> float:
    """Every loss by loops over real tokens."""
    assert routing.logits is not None
    assert routing.noisy_logits is not None
    assert routing.scores is not None
    assert routing.wanted is not None
    logits, noisy = routing.logits.tolist(), routing.noisy_logits.tolist()
    scores, asked = routing.scores.tolist(), routing.wanted.tolist()
    chosen = routing.chosen.tolist()
    real, experts = real_tokens(routing), range(routing.num_experts)

    def softmax(b: int, t: int) -> list[float]:
        powers = [exp(value) for value in logits[b][t]]
        return [power / sum(powers) for power in powers]

    def chance(b: int, t: int, e: int) -> float:
        k = max(sum(asked[b][t]), 1)
        tau = sorted(noisy[b][t], reverse=True)[k - 1]
        return (1 - erf((tau - logits[b][t][e]) / routing.noise_std / sqrt(2))) / 2

    if name == "balance":
        return slow_agreement([softmax(*r) for r in real], [asked[b][t] for b, t in real])
    if name == "sequence-balance":
        each = []
        for sequence in {b for b, _ in real}:
            tokens = [t for b, t in real if b == sequence]
            rows = [[s / sum(scores[sequence][t]) for s in scores[sequence][t]] for t in tokens]
            best = []
            for t in tokens:  # the best scores of the token, as many as it asked for
                order = sorted(range(len(rows[0])), key=lambda e, t=t: -scores[sequence][t][e])
                taken = order[: int(sum(asked[sequence][t]))]
                best.append([e in taken for e in range(len(rows[0]))])
            each.append(slow_agreement(rows, best))
        return sum(each) / len(each)
    if name in ("importance", "load"):
        each = []
        for group in groups_of(routing):
            mass = [
                sum(softmax(b, t)[e] if name == "importance" else chance(b, t, e) for b, t in group)
                for e in experts
            ]
            each.append(slow_variation(mass))
        return sum(each) / len(each)
    if name == "z":
        return sum(log(sum(map(exp, logits[b][t]))) ** 2 for b, t in real) / len(real)
    if name == "l1":
        total = 0.0
        for e in experts:
            share = sum(asked[b][t][e] for b, t in real) / len(real)
            total += share * sum(scores[b][t][e] for b, t in real) / len(real)
        return len(experts) * total
    alike = [[sum(softmax(*r)[i] * softmax(*r)[j] for r in real) for j in experts] for i in experts]
    both = [
        [sum(chosen[b][t][i] * chosen[b][t][j] for b, t in real) for j in experts] for i in experts
    ]
    on = sum(both[i][i] for i in experts)
    off = sum(both[i][j] for i in experts for j in experts if i != j)
    count = len(experts)
    total = sum(both[i][i] * count / on * alike[i][i] for i in experts)
    total += sum(
        both[i][j] * (count**2 - count) / off * alike[i][j]
        for i in experts
        for j in experts
        if i != j
    )
    return total / count


@pytest.mark.parametrize("name", [*OF_LOGITS, *OF_SCORES])
@pytest.mark.parametrize("group", ["sequence", "batch", "position"])
def test_every_loss_is_its_loop(name, group):
    for seed in range(10):
        routing = random_routing(seed, group)
        assert loss(name, routing) == pytest.approx(slow(name, routing), rel=1e-10)


@pytest.mark.parametrize("name", [*OF_LOGITS, *OF_SCORES])
def test_the_gradient_is_that_of_the_loop(name):
    # Central differences of the loop, with steps of 1e-6: their error is 1e-12 of the third
    # derivative, and rounding of 1e-16 over the step, 1e-10.
    routing = random_routing(0)
    assert routing.logits is not None
    assert routing.noisy_logits is not None
    (gradient,) = torch.autograd.grad(losses.get(name)(routing), routing.logits)
    assert gradient.any()
    assert routing.mask is not None
    assert not gradient[~routing.mask].any()
    logits, noise = routing.logits.detach(), (routing.noisy_logits - routing.logits).detach()

    def at(moved: Tensor) -> float:
        there = replace(routing, logits=moved, noisy_logits=moved + noise, scores=moved.sigmoid())
        return slow(name, there)

    for b, t in real_tokens(routing)[:4]:
        for e in range(4):
            step = torch.zeros_like(logits)
            step[b, t, e] = 1e-6
            numeric = (at(logits + step) - at(logits - step)) / 2e-6
            assert gradient[b, t, e].item() == pytest.approx(numeric, abs=1e-8)


@pytest.mark.parametrize("name", [*OF_LOGITS, *OF_SCORES])
def test_padding_counts_in_no_loss(name):
    # What padding holds and whether it is there; load is noisy, so the routing is changed here and
    # not the input of a router.
    routing = random_routing(3)
    assert routing.mask is not None
    assert routing.logits is not None
    assert routing.noisy_logits is not None
    assert routing.scores is not None
    assert routing.wanted is not None
    padding = ~routing.mask.unsqueeze(-1)
    other = replace(
        routing,
        logits=torch.where(padding, 7.0, routing.logits),
        noisy_logits=torch.where(padding, -3.0, routing.noisy_logits),
        scores=torch.where(padding, 0.9, routing.scores),
        wanted=routing.wanted,
    )
    assert loss(name, other) == pytest.approx(loss(name, routing), abs=ROUNDING)


@pytest.mark.parametrize("name", ["balance", "sequence-balance"])
@pytest.mark.parametrize("shape", [(2, 7, 4), (3, 0, 4), (0, 5, 4)], ids=str)
def test_no_mask_is_a_mask_of_real_tokens(name, shape):
    logits = torch.randn(shape)
    chosen = top(logits, 2, 2)
    grads = []
    for mask in (None, torch.ones(shape[:2], dtype=torch.bool)):
        leaf = logits.clone().requires_grad_()
        routing = SparseRouting.from_choice(
            chosen, chosen.float(), logits=leaf, scores=leaf.softmax(-1), mask=mask
        )
        value = losses.get(name)(routing)
        grads.append((value, *torch.autograd.grad(value, leaf)))
    assert bool(grads[0][0]) == bool(logits.numel())
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_load_is_what_fresh_noise_does():
    # The chance of a pair is the share of fresh draws of its noise that reach the threshold of the
    # pass. 40,000 draws know a chance to 0.0025, and the squared variation of five of them, some
    # 0.2, to a few times that; four such errors are allowed.
    router = routers.build("token-choice", dim=6, num_experts=5, k=2, noise_std=5.0).double()
    routing = router.train()(torch.randn(1, 8, 6, dtype=torch.float64))
    assert isinstance(routing, SparseRouting)
    assert routing.logits is not None
    assert routing.noisy_logits is not None
    tau = routing.noisy_logits.topk(2, -1).values[..., -1:]
    fresh = routing.logits + routing.noise_std * torch.randn(40000, 8, 5, dtype=torch.float64)
    load = (fresh >= tau).double().mean(0).sum(0)
    expected = load.var(correction=0) / load.mean() ** 2
    assert loss("load", routing) == pytest.approx(expected.item(), abs=0.01)


# Everything else


@pytest.mark.parametrize("name", ["balance", "importance", "load", "z", "similarity"])
def test_losses_reach_the_router(name):
    # With noise, because load needs it. A gradient step makes each of them smaller.
    router = routers.build("token-choice", dim=6, num_experts=4, noise_std=1.0).double().train()
    x = torch.randn(2, 30, 6, dtype=torch.float64) + 0.5
    torch.manual_seed(0)
    before = losses.get(name)(router(x))
    before.backward()
    with torch.no_grad():
        for parameter in router.parameters():
            assert parameter.grad is not None
            assert parameter.grad.any()
            parameter -= 1e-3 * parameter.grad / parameter.grad.norm()
    torch.manual_seed(0)
    assert losses.get(name)(router(x)) < before


def test_load_without_noise_is_refused():
    message = r"noise_std was 0 in this pass; train with noise_std=1.0, or use 'balance'"
    router = routers.build("token-choice", dim=6, num_experts=4, noise_std=1.0)
    x = torch.randn(1, 3, 6)
    losses.get("load")(router.train()(x))
    with pytest.raises(ValueError, match=message):
        losses.get("load")(router.eval()(x))


@pytest.mark.parametrize("name", losses.names())
@pytest.mark.parametrize("router", ["soft", "hash", "random"])
def test_without_a_choice_from_logits_there_is_nothing_to_balance(name, router):
    built = routers.build(router, dim=6, num_experts=4).double().train()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    value = losses.get(name)(built(x, None, torch.zeros(2, 3, dtype=torch.long)))
    assert value.item() == 0.0
    assert value.dtype == torch.float64


def test_the_registered_losses():
    described = losses.describe()
    # routers/test_compete.py and routers/test_inference.py
    elsewhere = {"competition", "competition-hybrid", "membership"}
    assert set(described) - elsewhere == {*OF_LOGITS, *OF_SCORES}
    with pytest.raises(ValueError, match=r"'balanse'.*[Dd]id you mean 'balance'"):
        losses.get("balanse")
