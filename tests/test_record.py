"""The record: who is heard, how often, and what is made of it."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moefold import MoE, MoEConfig, record_routing, routers
from moefold.losses import balance, z
from moefold.metrics import SCALARS, metrics
from moefold.routing import SparseRouting


class Block(nn.Module):
    """A layer of experts inside something."""

    def __init__(self, mlp: MoE):
        super().__init__()
        self.mlp = mlp


class Model(nn.Module):
    """Two layers of experts, with something in between and around."""

    def __init__(self, router: str = "token-choice"):
        super().__init__()
        config = MoEConfig(num_experts=4, expert_width=8, router=routers.config(router), losses={})
        self.embed = nn.Linear(6, 6)
        self.first = config.build(6)
        self.rest = Block(config.build(6))

    def forward(self, x, mask=None):
        return self.rest.mlp(self.first(self.embed(x), mask), mask)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 6)


def test_every_pass_leaves_one_routing_at_every_site():
    model = Model()
    with record_routing(model) as record:
        model(tokens(2, 3))
        model(tokens(1, 5))
    assert record.sites == ("first", "rest.mlp")
    assert list(record) == ["first", "rest.mlp"]
    assert len(record) == 2
    for site in record:
        # Token choice of 2: 6 and 5 tokens make 12 and 10 rows, in this order.
        assert [int(r.rows_per_expert.sum()) for r in record[site]] == [12, 10]


def test_the_routing_is_the_one_that_was_used():
    layer = MoEConfig(num_experts=4, expert_width=8).build(6)
    x = tokens(2, 3)
    with record_routing(layer) as record:
        y = layer(x)
    routing = record[""][0]
    rows = layer.experts(routing.dispatch(x), routing.rows_per_expert)
    assert torch.equal(routing.combine(rows), y)


def test_nothing_is_heard_before_and_after():
    model = Model()
    model(tokens(2, 3))
    with record_routing(model) as record:
        pass
    model(tokens(2, 3))
    assert [len(routings) for routings in record.values()] == [0, 0]
    assert model.first.sinks == ()


def test_records_nest_and_each_hears_its_own_time():
    model = Model()
    with record_routing(model) as outer:
        model(tokens(2, 3))
        with record_routing(model.first) as inner:
            model(tokens(1, 4))
        model(tokens(1, 5))
    assert [r.num_tokens for r in outer["first"]] == [6, 4, 5]
    assert [r.num_tokens for r in inner[""]] == [4]
    assert model.first.sinks == ()


def test_an_exception_closes_the_record():
    model = Model()
    opened = []

    def fail() -> None:
        with record_routing(model) as record:
            opened.append(record)
            model(tokens(2, 3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    model(tokens(2, 3))
    assert len(opened[0]["first"]) == 1
    assert model.first.sinks == ()


def test_a_model_without_a_layer_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no MoE layer to record; upcycle it first"):
        record_routing(nn.Linear(2, 2)).__enter__()


def test_an_unknown_site_names_those_there_are():
    with record_routing(Model()) as record:
        pass
    with pytest.raises(KeyError, match=r"no MoE layer at 'second'; layers: first, rest\.mlp"):
        record["second"]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recomputation_is_not_heard(reentrant: bool):
    model = Model()
    with record_routing(model) as record:
        for _ in range(2):
            x = tokens(2, 3).requires_grad_()
            checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert [len(routings) for routings in record.values()] == [2, 2]


def test_a_pass_without_gradient_is_heard():
    model = Model().eval()
    with torch.inference_mode(), record_routing(model) as record:
        model(tokens(2, 3))
    assert len(record["first"]) == 1


def test_a_copy_made_meanwhile_is_not_heard():
    # A callback that averages weights copies the model at any time. What the record holds has a
    # graph, which cannot be copied and must not be.
    model = Model()
    with record_routing(model) as record:
        model(tokens(2, 3))
        twin, revived = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        twin(tokens(2, 3))
        revived(tokens(2, 3))
        model(tokens(2, 3))
    assert len(record["first"]) == 2
    assert twin.first.sinks == revived.first.sinks == ()


def test_loss_is_the_mean_over_passes_and_the_sum_over_sites():
    model = Model()
    with record_routing(model) as record:
        model(tokens(2, 3))
        model(tokens(2, 3))
    each = [0.1 * balance(r) + 0.01 * z(r) for routings in record.values() for r in routings]
    assert len({value.item() for value in each}) == 4, "equal values would hide a wrong mean"
    want = torch.stack(each).sum().item() / 2
    got = record.loss(balance=0.1, z=0.01)
    # The same few float32 numbers added in another order.
    assert got.item() == pytest.approx(want, rel=1e-6)
    got.backward()
    for layer in (model.first, model.rest.mlp):
        gradient = layer.router.get_parameter("weight").grad
        assert gradient is not None
        assert gradient.abs().max() > 1e-4


def test_loss_names_are_spelt_with_underscores():
    with record_routing(Model()) as record:
        pass
    assert record.loss(sequence_balance=1.0) == 0.0
    with pytest.raises(ValueError, match=r"unknown loss 'balanc'; did you mean 'balance'\?"):
        record.loss(balanc=1.0)


def test_metrics_are_means_over_passes():
    model = Model("unified")
    x = tokens(2, 4)
    none = torch.zeros(2, 4, dtype=torch.bool)
    with record_routing(model) as record:
        model(x)
        model(x, none)
    first, second = record["first"]
    got = record.metrics()
    assert set(got) == {"first", "rest.mlp"}
    assert set(got["first"]) == set(SCALARS)
    for name in SCALARS:
        want = (metrics(first)[name] + metrics(second)[name]) / 2
        assert got["first"][name] == pytest.approx(want)
    # A budget of 2 pairs a token in the first pass, no token in the second.
    assert got["first"]["experts_per_token"] == 1.0


def test_a_site_that_was_not_visited_has_no_metrics():
    model = Model()
    with record_routing(model) as record:
        model.first(tokens(2, 3))
    assert record.metrics()["rest.mlp"] == {}
    assert record.loss(balance=1.0).item() == pytest.approx(balance(record["first"][0]).item())


def test_update_adapts_every_router_once_to_all_its_passes():
    model = Model("bias-balanced")
    with record_routing(model) as record:
        model(tokens(2, 3))
        model(tokens(2, 3))
    record.update()
    for site, layer in (("first", model.first), ("rest.mlp", model.rest.mlp)):
        load = sum(r.rows_per_expert for r in record[site] if isinstance(r, SparseRouting))
        assert isinstance(load, torch.Tensor)
        # Default rule and rate: a step of 1e-3 towards the mean load of 2 * 6 * 2 / 4 = 6 rows.
        want = 1e-3 * torch.sign(6.0 - load)
        assert torch.equal(layer.router.get_buffer("state"), want)
        assert want.any(), "a perfectly balanced draw would show nothing"


def test_update_without_a_pass_changes_nothing():
    model = Model("bias-balanced")
    with record_routing(model) as record:
        pass
    record.update()
    assert not model.first.router.get_buffer("state").any()


def test_clear_forgets_and_frees():
    model = Model()
    with record_routing(model) as record:
        model(tokens(2, 3))
        logits = weakref.ref(record["first"][0].logits)
        assert logits() is not None
        record.clear()
        gc.collect()
        assert logits() is None
        model(tokens(1, 2))
    assert [r.num_tokens for r in record["first"]] == [2]


def test_a_layer_that_is_used_twice_is_one_site():
    model = Model()
    model.rest.mlp = model.first
    with record_routing(model) as record:
        model(tokens(2, 3))
    assert record.sites == ("first",)
    assert len(record["first"]) == 2
