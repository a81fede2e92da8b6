"""CompeteSMoE: results that choose, a gate that learns to foresee them.

Letters: a affinity, w weight, p softmax of the gate, q softmax of the affinities.
"""

from dataclasses import replace
from math import log

import pytest
import torch
from torch import Tensor

import moefold
from moefold import MoE, MoEConfig, record_routing, routers
from moefold.losses import losses
from moefold.metrics import metrics
from moefold.rerouting.reroute import recipes
from moefold.routers import SparseRouter
from moefold.routers.compete import ByResults, Competition
from moefold.routing import Routing, SparseRouting
from moefold.testing.layer_probe import mlp
from moefold.testing.probe import untyped

ROUNDING = 1e-12  # float64: sums of a few dozen numbers around 1


def layer(**settings) -> MoE:
    given = {"k": 2, "rate": 1.0, **settings}
    own = given.pop("losses", {})
    torch.manual_seed(0)
    return (
        MoEConfig(
            num_experts=5,
            expert_width=6,
            router=routers.config("compete", **given),
            activation="tanh",
            losses=own,
        )
        .build(4, site="layer.3")
        .double()
    )


def gate(moe: MoE) -> SparseRouter:
    assert isinstance(moe.router, SparseRouter)
    return moe.router


def build(**settings) -> SparseRouter:
    given = {"dim": 2, "num_experts": 3, "rate": 1.0, **settings}
    router = routers.build("compete", **given)
    assert isinstance(router, SparseRouter)
    return router


def sparse(routing: Routing) -> SparseRouting:
    assert isinstance(routing, SparseRouting)
    return routing


def there(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def competition(router: SparseRouter) -> Competition:
    assert router.recipe.competition is not None
    return router.recipe.competition


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    mask = torch.rand(3, 7) < 0.7
    mask[2] = False
    return x, mask


def routed(moe: MoE, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, SparseRouting]:
    with record_routing(moe) as record:
        y = moe(x, mask)
    (routing,) = record[""]
    assert isinstance(routing, SparseRouting)
    return y, routing


def by_definition(moe: MoE, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output, affinities and weights, from every expert on every token and loops over tokens."""
    each = torch.stack([mlp(moe.experts, e, x) for e in range(5)], 2)
    affinity = torch.log1p(each.exp()).mean(-1)
    weight = torch.zeros_like(affinity)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            winners = sorted(range(5), key=lambda e: -affinity[b, t, e].item())[:k]
            total = sum(affinity[b, t, e] for e in winners)
            for e in winners:
                weight[b, t, e] = affinity[b, t, e] / total
    return (weight.unsqueeze(-1) * each).sum(2), affinity, weight


# By hand


def test_a_competition_worked_by_hand():
    # One token, three experts, results of one feature each. softplus(ln 3) = ln 4,
    # softplus(ln 7) = ln 8, softplus(0) = ln 2:
    #
    #   expert     0      1      2
    #   result     ln 3   ln 7   0
    #   affinity   2 ln2  3 ln2  1 ln2
    #   k = 2      2/5    3/5    -
    routing = sparse(build().train()(torch.zeros(1, 1, 2)))
    rows = torch.tensor([[log(3)], [log(7)], [0.0]], dtype=torch.float64)
    assert routing.rows_per_expert.tolist() == [1, 1, 1]
    settled = routing.settled(rows)
    want = torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64)
    assert torch.allclose(settled.weights[0, 0], want, atol=ROUNDING)
    assert there(settled.wanted).tolist() == [[[True, True, False]]]
    ln2 = log(2)
    affinities = torch.tensor([2 * ln2, 3 * ln2, ln2], dtype=torch.float64)
    assert torch.allclose(there(settled.logits)[0, 0], affinities, atol=ROUNDING)
    # exp(affinity) = 4, 8, 2: the softmax is 4/14, 8/14, 2/14.
    shares = torch.tensor([4, 8, 2], dtype=torch.float64) / 14
    assert torch.allclose(there(settled.scores)[0, 0], shares, atol=ROUNDING)
    # The gate said 1/3 for each: differences -1/21, 5/21, -4/21; squares 1, 25 and 16 / 441.
    assert losses.get("competition")(settled).item() == pytest.approx(42 / 441 / 3, abs=1e-7)
    # theta = 0.1 times the mean over the winners, 26 / 441 / 2.
    hybrid = 42 / 441 / 3 + 0.1 * 26 / 441 / 2
    assert losses.get("competition-hybrid")(settled).item() == pytest.approx(hybrid, abs=1e-7)
    # Balance is that of the affinities: 3 * (1/2 * 4/14 + 1/2 * 8/14).
    assert losses.get("balance")(settled).item() == pytest.approx(9 / 7, abs=ROUNDING)
    assert metrics(settled)["dropped"] == 0.0


def test_the_softplus_is_taken_of_every_feature_before_the_mean():
    # softplus(ln 3) = ln 4 and softplus(-ln 3) = ln 4/3: the mean is ln(16/3) / 2. Of the mean of
    # the results, 0, it would be ln 2.
    routing = sparse(build(num_experts=1, k=1)(torch.zeros(1, 1, 2)))
    rows = torch.tensor([[log(3), -log(3)]], dtype=torch.float64)
    assert there(routing.settled(rows).logits).item() == pytest.approx(
        log(16 / 3) / 2, abs=ROUNDING
    )


# The definition


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_competing_layer_is_its_definition_on_all_experts(k: int):
    fast, slow = layer(k=k).train(), layer(k=k).train()
    x, _ = batch()
    given, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, routing = routed(fast, given)
    want, affinity, weight = by_definition(slow, other, k)
    assert torch.allclose(y, want, atol=ROUNDING)
    assert torch.allclose(routing.weights, weight, atol=ROUNDING)
    assert torch.allclose(there(routing.logits), affinity, atol=ROUNDING)
    y.square().sum().backward()
    want.square().sum().backward()
    assert torch.allclose(there(given.grad), there(other.grad), atol=1e-11)
    for name, parameter in slow.experts.named_parameters():
        got = there(fast.experts.get_parameter(name).grad)
        assert torch.allclose(got, there(parameter.grad), atol=1e-11)


def test_the_router_loss_is_its_definition_in_values_and_gradients():
    moe = layer(losses={}).train()
    x, mask = batch()
    _, routing = routed(moe, x, mask)
    real = [tuple(place) for place in mask.nonzero().tolist()]
    p = (x @ gate(moe).weight.t()).softmax(-1)
    q = there(routing.logits).softmax(-1).detach()
    square = torch.stack([(p[place] - q[place]).square() for place in real])
    winners = torch.stack([there(routing.wanted)[place] for place in real])
    for name, want in (
        ("competition", square.mean()),
        ("competition-hybrid", square.mean() + 0.1 * square[winners].mean()),
    ):
        got = losses.get(name)(routing)
        assert torch.allclose(got, want, atol=ROUNDING)
        (fast,) = torch.autograd.grad(got, gate(moe).weight, retain_graph=True)
        (slow,) = torch.autograd.grad(want, gate(moe).weight, retain_graph=True)
        assert torch.allclose(fast, slow, atol=ROUNDING)
        for parameter in moe.experts.parameters():
            (none,) = torch.autograd.grad(got, parameter, retain_graph=True, allow_unused=True)
            assert none is None, "the affinities are a target and must get no gradient"


def test_in_a_competition_the_gate_learns_from_its_loss_only():
    x, mask = batch()
    for own, learns in (({}, False), ({"balance": 1.0}, False), ({"competition": 1.0}, True)):
        moe = layer(losses=own).train()
        moe(x, mask).square().sum().backward()
        grad = gate(moe).weight.grad
        assert (grad is not None and bool(grad.abs().max() > 1e-6)) == learns
        assert there(moe.experts.down_proj.grad).abs().max() > 1e-6


def test_in_other_passes_it_is_token_choice():
    x, mask = batch()
    moe = layer(rate=0.0).train()
    plain = routers.build("token-choice", dim=4, num_experts=5, k=2, renormalize=True).double()
    plain.load_state_dict(gate(moe).state_dict())
    for training, rate in ((True, 0.0), (False, 0.0), (False, 1.0)):
        moe = layer(rate=rate).train(training)
        _, got = routed(moe, x, mask)
        want = sparse(plain.train(training)(x, mask))
        assert torch.equal(got.weights, want.weights)
        assert torch.equal(got.chosen, want.chosen)
        assert losses.get("balance")(got) == losses.get("balance")(want)
        assert losses.get("competition")(got) == 0
    assert torch.equal(layer(rate=1.0).eval()(x, mask), layer(rate=0.0).eval()(x, mask))


def test_the_losses_of_the_authors_are_its_own():
    moe = MoEConfig(num_experts=4, router=routers.config("compete")).build(6)
    # 0.01 over k^2 = 4 ordered pairs, as released, is 0.005 over k (k - 1) = 2.
    assert moe.losses == {"balance": 0.01, "competition": 0.01, "competing-diversity": 0.005}
    one = MoEConfig(num_experts=4, router=routers.config("compete", k=1)).build(6)
    assert one.losses == {"balance": 0.01, "competition": 0.01}


# Properties


def test_experts_that_change_places_change_nothing():
    x, mask = batch()
    one, other = layer().train(), layer().train()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter[order])
    (y, routing), (z, moved) = routed(one, x, mask), routed(other, x, mask)
    assert torch.allclose(z, y, atol=ROUNDING)
    assert torch.allclose(moved.weights, routing.weights[..., order], atol=ROUNDING)
    for name in ("competition", "balance"):
        got, want = losses.get(name)(moved), losses.get(name)(routing)
        assert torch.allclose(got, want, atol=ROUNDING)


def test_padding_is_asked_nothing_and_counts_nowhere():
    own = {"competition": 1.0, "balance": 1.0, "competing-diversity": 1.0}
    x, mask = batch()
    found = []
    for junk in (0.0, float("nan")):
        moe = layer(losses=own).train()
        given = x.masked_fill(~mask.unsqueeze(-1), junk).requires_grad_()
        y, routing = routed(moe, given, mask)
        assert routing.rows_per_expert.tolist() == [int(mask.sum())] * 5
        assert (y[~mask] == 0).all()
        y.square().sum().backward()
        assert (there(given.grad)[~mask] == 0).all()
        found.append([y, there(given.grad), *(there(p.grad) for p in moe.parameters())])
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
def test_a_competition_of_few_or_none(shape):
    own = {"competition": 1.0, "balance": 1.0, "competing-diversity": 1.0, "cka": 1.0}
    moe = layer(losses=own).train()
    x = torch.randn(*shape, 4, dtype=torch.float64)
    for mask in (None, torch.zeros(shape, dtype=torch.bool)):
        y = moe(x, mask)
        assert torch.isfinite(y).all()
        y.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in moe.parameters() if p.grad is not None)


def test_ties_go_to_the_first():
    moe = layer(k=2).train()
    with torch.no_grad():
        for parameter in moe.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    _, routing = routed(moe, batch()[0])
    assert (routing.weights == torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0])).all()


def test_it_competes_in_its_share_of_passes():
    router = build(dim=4, num_experts=5, rate=0.2).train()
    x = torch.randn(1, 1, 4)
    torch.manual_seed(0)
    competed = sum(int(sparse(router(x)).rows_per_expert.sum()) == 5 for _ in range(1000))
    # 200 with a standard deviation of sqrt(1000 * .2 * .8) = 12.6; four of them.
    assert abs(competed - 200) < 51
    router.experts_compete = True
    assert sparse(router(x)).rows_per_expert.sum() == 5
    router.experts_compete = False
    assert sparse(router(x)).rows_per_expert.sum() == 2


def test_half_precision_results_are_compared_in_float32():
    # 1 and 1 + 2^-9 are the same number in bfloat16 for a softplus computed there.
    routing = sparse(build(num_experts=2, k=1)(torch.zeros(1, 1, 2)))
    rows = torch.tensor([[0.0, 3.0], [0.0, 3.0156]], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        settled = routing.settled(rows)
    assert settled.weight_of_row.dtype == there(settled.logits).dtype == torch.float32
    assert settled.weights[0, 0].tolist() == [0.0, 1.0]


def test_the_record_has_the_settled_routing():
    _, routing = routed(layer().train(), batch()[0])
    assert routing.decide is None
    rows = torch.randn(routing.token_of_row.shape[0], 4, dtype=torch.float64)
    assert routing.settled(rows) is routing
    unsettled = replace(routing, decide=ByResults(k=2))
    assert losses.get("competition")(unsettled) == 0, "nothing is known to learn from"


# Learning


def test_a_gate_learns_who_wins():
    # Frozen experts. Softmaxes of affinities are flat, so that what counts is who is largest.
    torch.manual_seed(1)
    moe = layer(k=1, losses={}).train()
    with torch.no_grad():
        for parameter in moe.experts.parameters():
            parameter.mul_(3)
    x = torch.randn(1, 400, 4, dtype=torch.float64)
    optimizer = torch.optim.Adam([gate(moe).weight], lr=0.05)

    def foreseen() -> float:
        _, truth = routed(moe, x)
        guess = sparse(gate(moe).eval()(x))
        gate(moe).train()
        return (guess.weights.argmax(-1) == truth.weights.argmax(-1)).double().mean().item()

    before, values = foreseen(), []
    for _ in range(150):
        _, routing = routed(moe, x)
        loss = losses.get("competition")(routing)
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < values[0] / 3
    # A linear gate cannot foresee all; guessing finds one in five.
    assert foreseen() > max(0.5, before + 0.1)


# In a model


def test_a_causal_host_takes_it():
    router = routers.build("compete", dim=4, num_experts=5, causal=True)
    assert isinstance(router, SparseRouter)
    assert router.reach == router.reach_in_training == "token"


def test_a_model_is_upcycled_saved_and_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    dense = transformers.BertModel(config).eval()
    ids = torch.randint(50, (2, 6))
    before = dense(ids).last_hidden_state
    moe = MoEConfig(num_experts=4, router=routers.config("compete", rate=1.0))
    model = dense
    moefold.upcycle(model, moefold.UpcycleConfig(moe=moe))
    model.eval()
    # Copies with weights that sum to one: float32 rounding through two layers of width 16.
    torch.testing.assert_close(model(ids).last_hidden_state, before, rtol=1e-4, atol=1e-5)
    model.train()
    with record_routing(model) as record:
        y = model(ids).last_hidden_state
        torch.testing.assert_close(y, before, rtol=1e-4, atol=1e-5)
    for routings in record.values():
        assert sparse(routings[0]).rows_per_expert.tolist() == [12] * 4
    y.square().sum().backward()
    gates = [gate(m).weight.grad for m in model.modules() if isinstance(m, MoE)]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in gates)
    moefold.save(model.eval(), tmp_path)
    again = moefold.load(tmp_path).eval()
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)
    again_routers = [gate(m) for m in again.modules() if isinstance(m, MoE)]
    assert all(competition(router).rate == 1.0 for router in again_routers)


def test_a_pretrained_mixture_is_not_rerouted_to_a_competition():
    # Without training nobody competes, and rerouting is without training.
    assert "compete" not in recipes(4)
    assert "mixtral" in recipes(4)


# Errors


@pytest.mark.parametrize("rate", [-0.1, 1.5, True, "often", float("nan")])
def test_a_rate_is_a_share(rate):
    with (
        untyped(),
        pytest.raises(ValueError, match=rf"rate is {rate!r}; it is a share of passes, from 0 to 1"),
    ):
        routers.build("compete", dim=4, num_experts=5, rate=rate)


def test_more_winners_than_experts_are_refused():
    with pytest.raises(ValueError, match=r"k is 6, but there are only 5 experts"):
        routers.build("compete", dim=4, num_experts=5, k=6)


def test_drawing_in_a_compiled_graph_is_refused(monkeypatch: pytest.MonkeyPatch):
    router = build(dim=4, num_experts=5, rate=0.5).train()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match=r"let moefold\.train\.CompetitionSchedule\(model, \.\.\."):
        competition(router).is_on(None)
    assert competition(router).is_on(True)


@pytest.mark.compile
@pytest.mark.filterwarnings(
    "ignore:.*torch.autograd.function.Function.* should not be instantiated:DeprecationWarning"
)
def test_a_scheduled_competition_compiles_and_an_undecided_one_says_why_not():
    own = {"competition": 1.0, "balance": 1.0, "competing-diversity": 1.0, "cka": 1.0}
    torch.compiler.reset()
    eager, fast = layer(rate=0.5, losses=own).train(), layer(rate=0.5, losses=own).train()
    call = torch.compile(fast, fullgraph=True, backend="aot_eager")
    x, mask = batch()
    for decided in (True, False, True):
        gate(eager).experts_compete = gate(fast).experts_compete = decided
        for each in (eager, fast):
            each.zero_grad()
        want, got = eager(x, mask), call(x, mask)
        torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING)
        want.square().sum().backward()
        got.square().sum().backward()
        for name, parameter in eager.named_parameters():
            torch.testing.assert_close(
                fast.get_parameter(name).grad, parameter.grad, rtol=0, atol=1e-11
            )
    gate(fast).experts_compete = None
    with pytest.raises(Exception, match=r"a compiled graph cannot; let moefold\.train\.Comp"):
        call(x, mask)
