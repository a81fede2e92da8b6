"""Inference rules: what they choose, what they learn, and that they never look ahead."""

from typing import Any

import pytest
import torch

from moefold import losses, routers
from moefold.modes import competing
from moefold.routers.inference import RULES
from moefold.testing import check_router

DIM, EXPERTS = 6, 5
GROUP_CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("unified", {"budget": 1.5}),
    ("unified", {"budget": 2.0, "alpha": 0.0, "min_experts": 1, "max_experts": 3}),
    ("unified", {"budget": 2.0, "expert_score": "token-softmax"}),
    ("seq-topk", {"k": 2}),
    ("expert-choice", {"capacity_factor": 1.5}),
    ("expert-race", {"k": 2}),
    ("sinkhorn-expert-choice", {"capacity_factor": 2.0}),
    ("sinkhorn-token-choice", {"k": 2}),
    ("sparse-transport-expert-choice", {"capacity_factor": 2.0}),
]
NAMES = [f"{name}-{'-'.join(map(str, settings.values()))}" for name, settings in GROUP_CHOICES]


def build(name: str, rule: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    return routers.build(name, dim=DIM, num_experts=EXPERTS, inference=rule, **settings).double()


def teach(router, x=None):
    """A head that knows something, and levels of some text."""
    if router.predictor is not None:
        for parameter in router.predictor.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    router.train()
    x = torch.randn(8, 20, DIM, dtype=torch.float64) if x is None else x
    router.update([router(x)], at_once=True)
    return router.eval()


def tokens(batch=3, length=14):
    torch.manual_seed(2)
    return torch.randn(batch, length, DIM, dtype=torch.float64)


class Remembered:
    """The past of one stream of tokens."""

    def __init__(self):
        self.kept = None

    def scores(self):
        return self.kept

    def add(self, scores):
        self.kept = scores if self.kept is None else torch.cat([self.kept, scores], 1)


# In training.


@pytest.mark.parametrize(("name", "settings"), GROUP_CHOICES, ids=NAMES)
def test_the_group_chooses_in_training_and_while_competing(name, settings):
    with_rule, without = build(name, "threshold", **settings), build(name, "group", **settings)
    x = tokens()
    want = without(x)
    assert torch.equal(with_rule(x).weights, want.weights)
    assert with_rule.reach_now == without.reach_now != "token"
    with_rule.eval()
    assert with_rule.reach_now == "token"
    assert not torch.equal(with_rule(x).chosen, want.chosen)
    with competing(with_rule):
        assert torch.equal(with_rule(x).weights, want.weights)
    assert with_rule.is_causal
    assert not without.is_causal


# Token choice.


@pytest.mark.parametrize(
    ("name", "settings", "k"),
    [
        ("unified", {"budget": 1.5}, 2),  # halves are rounded up, as budgets are
        ("unified", {"budget": 0.4}, 1),
        ("expert-choice", {"capacity_factor": 3.0}, 3),
        ("expert-race", {"k": 2}, 2),
        ("sinkhorn-token-choice", {"k": 2}, 2),
    ],
)
def test_token_choice_takes_the_average_of_the_group(name, settings, k):
    x = tokens()
    chosen = build(name, "token-choice", **settings).eval()(x).chosen
    logits = x @ build(name, "token-choice", **settings).weight.t()
    want = torch.zeros_like(chosen).scatter(2, logits.topk(k, -1).indices, True)
    assert torch.equal(chosen, want)


# Thresholds.


@pytest.mark.parametrize(("name", "settings"), GROUP_CHOICES, ids=NAMES)
def test_a_threshold_keeps_the_rows_of_the_text_it_was_learnt_from(name, settings):
    x = tokens(8, 20)
    router = teach(build(name, "threshold", **settings), x)
    with competing(router):
        group = router(x).rows_per_expert
    alone = router(x).rows_per_expert
    if router.recipe.choice.share == "pairs":
        assert alone.sum() == group.sum()
    else:
        assert torch.equal(alone, group)
        assert router.state.shape == (EXPERTS,)


def test_a_threshold_follows_the_steps_of_training():
    router = build("unified", "threshold", budget=1.0)
    first = float(router.state)
    assert first == pytest.approx(1 / EXPERTS)
    routing = router(tokens())
    ordered = routing.scores.detach().flatten().sort(descending=True).values
    now = float((ordered[41] + ordered[42]) / 2)  # 3 x 14 tokens, one pair each
    router.update([routing])
    assert float(router.state) == pytest.approx(0.99 * first + 0.01 * now)


def test_padding_teaches_a_threshold_nothing():
    x = tokens()
    padded = torch.cat([x, torch.full((3, 4, DIM), 50.0, dtype=torch.float64)], 1)
    mask = torch.arange(18).expand(3, 18) < 14
    one, other = build("expert-choice", "threshold"), build("expert-choice", "threshold")
    one.update([one(x)])
    other.update([other(padded, mask)])
    assert torch.equal(one.state, other.state)
    other.update([other(padded, torch.zeros_like(mask))])
    assert torch.equal(one.state, other.state)


# The prefix.


@pytest.mark.parametrize(
    ("name", "settings"),
    [case for case in GROUP_CHOICES if case[0] in ("unified", "expert-choice", "seq-topk")],
    ids=str,
)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_prefix_is_what_the_group_would_choose_if_the_text_ended_there(name, settings, padding):
    settings = {**settings, "expert_score": "sigmoid"} if "expert_score" in settings else settings
    router, group = build(name, "prefix", **settings), build(name, "group", **settings)
    x, place = tokens(), torch.arange(14).expand(3, 14)
    mask = {
        "none": None,
        "left": place >= torch.tensor([[0], [5], [9]]),
        "right": place < torch.tensor([[14], [9], [5]]),
    }[padding]
    chosen = router.eval()(x, mask).chosen
    for end in range(1, 15):
        part = None if mask is None else mask[:, :end]
        want = group(x[:, :end], part).chosen[:, -1]
        assert torch.equal(chosen[:, end - 1], want), f"token {end - 1}"


@pytest.mark.parametrize(("name", "settings"), GROUP_CHOICES, ids=NAMES)
def test_a_prefix_in_pieces_is_the_prefix_at_once(name, settings):
    router = build(name, "prefix", **settings).eval()
    x, mask = tokens(), torch.arange(14).expand(3, 14) >= torch.tensor([[0], [5], [9]])
    whole = router(x, mask).weights
    for cuts in ([14], [1] * 14, [5, 1, 1, 7], [9, 5]):
        past, pieces, start = Remembered(), [], 0
        for size in cuts:
            part = slice(start, start + size)
            pieces.append(router(x[:, part], mask[:, part], past=past).weights)
            start += size
        # A product of one token sums in another order than one of many.
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=0)


def test_a_prefix_of_one_token_is_token_choice():
    x = tokens(3, 1)
    chosen = build("unified", "prefix", budget=2.0).eval()(x).chosen
    router = build("unified", "token-choice", budget=2.0)
    assert torch.equal(chosen, router.eval()(x).chosen)


# Predictors.


def test_an_untrained_predictor_is_refused():
    router = build("unified", "predictor").eval()
    router.site = "layers.3.mlp"
    with pytest.raises(ValueError, match=r"layers\.3\.mlp: inference='predictor', and the.*never"):
        router(tokens())
    router.train()(tokens())  # training needs no prediction


def test_a_predictor_learns_what_the_group_chooses():
    # Tokens of two kinds, the second with logits three times as large: under one budget the
    # second kind takes more pairs, which a token alone can tell.
    router = build("unified", "predictor", budget=1.5)
    router.weight.requires_grad_(False)
    optimizer = torch.optim.Adam(router.predictor.parameters(), lr=1e-2)

    def batch():
        x = torch.randn(4, 32, DIM, dtype=torch.float64)
        return x * torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(16)[:, None]

    first = None
    for _ in range(120):
        routing = router(batch())
        loss = losses.losses.get("membership")(routing)
        first = first if first is not None else float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        router.update([routing])
    assert first == pytest.approx(0.6931, abs=1e-3)  # ln 2: an untrained head does not know
    x = batch()
    with competing(router.eval()):
        want = router(x).chosen
    right = float((router(x).chosen == want).double().mean())
    often = float(torch.maximum(want.double().mean(), 1 - want.double().mean()))
    assert right > 0.9 > often, (right, often)


def test_the_membership_loss_by_hand_and_for_the_head_alone():
    router = teach(build("unified", "predictor")).train()
    x = tokens().requires_grad_()
    mask = torch.arange(14).expand(3, 14) < torch.tensor([[14], [9], [0]])
    routing = router(x, mask)
    loss = losses.losses.get("membership")(routing)
    sure = routing.predicted[mask].sigmoid()
    right = torch.where(routing.chosen[mask], sure, 1 - sure)
    torch.testing.assert_close(loss, -right.log().mean())
    loss.backward()
    assert x.grad is None
    assert router.weight.grad is None
    assert router.predictor.out.weight.grad.abs().sum() > 0


def test_without_a_predictor_there_is_no_membership_loss():
    assert float(losses.losses.get("membership")(build("unified", "group")(tokens()))) == 0.0


# All rules.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name", ["unified", "expert-choice", "seq-topk", "expert-race", "sinkhorn-expert-choice"]
)
def test_rules_keep_the_contract_of_routers(name, rule):
    def factory(dim, num_experts, **settings):
        router: Any = routers.routers.get(name)(dim, num_experts, inference=rule, **settings)
        if router.predictor is not None:
            torch.nn.init.normal_(router.predictor.out.weight, std=0.1)
        return router

    exceptions = {"same in training": "the group chooses in training"}
    if rule == "predictor":
        exceptions |= {
            "relabelling experts": "the head's hidden layer knows experts by their numbers",
            "gradient reaches parameters": "the predictor learns by its own loss",
        }
    report = check_router(factory, exceptions=exceptions)
    assert {"reach is honest", "causality is honest", "padding gets no row"} <= set(report.ran)


def test_a_level_stays_in_full_precision_and_starts_again():
    router = teach(build("expert-choice", "threshold")).bfloat16()
    assert router.state.dtype == torch.float32
    router.reset_parameters()
    assert torch.equal(router.state, torch.full((EXPERTS,), 1 / EXPERTS))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("unified", {"inference": "thresholds"}, r"inference is 'thresholds'.*mean 'threshold'"),
        (
            "custom",
            {"inference": "prefix"},
            r"inference is a rule for routers that look at a group.*one token already",
        ),
        (
            "expert-choice",
            {"inference": "token-choice", "capacity": 3},
            r"capacity is 3 rows of an expert.*give capacity_factor, or another",
        ),
        (
            "unified",
            {"inference": "prefix", "capacity": 3},
            r"inference is 'prefix', and capacity bounds.*inference='threshold'",
        ),
    ],
)
def test_a_rule_that_cannot_stand_for_the_choice_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        routers.build(name, dim=DIM, num_experts=EXPERTS, **settings)
