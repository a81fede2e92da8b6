"""A threshold learnt from text keeps the budget, looks at one token, and works with a cache."""

import pytest
import torch

import moefold
from moefold import routers
from moefold.rerouting.layer import REROUTER, Rerouter
from moefold.routers.sparse import LogitRouter
from moefold.routing import SparseRouting
from tests.rerouting.models import build, texts

BUDGET = 1.5


@pytest.fixture
def model():
    made = build("qwen3-moe")
    moefold.reroute(made, routers.config("threshold", budget=BUDGET))
    return made


def chosen(model, **inputs) -> list[torch.Tensor]:
    with moefold.record_routing(model) as record, torch.no_grad():
        model(**inputs)
    found = [routing for (routing,) in record.values() if isinstance(routing, SparseRouting)]
    return [routing.chosen for routing in found]


def test_the_budget_is_kept_on_other_text(model):
    found = moefold.calibrate(model, [texts(64) for _ in range(20)])
    assert found.tokens == 20 * 96
    assert set(found.thresholds) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    fresh = [texts(64) for _ in range(20)]
    taken = torch.tensor(
        [[float(c.sum()) for c in chosen(model, **inputs, use_cache=False)] for inputs in fresh]
    )
    per_token = taken.sum(0) / (20 * 96)
    # 1920 tokens whose numbers of experts vary by about one: a standard error of 0.03, and as much
    # from the text the thresholds were learnt on; three of both.
    assert ((per_token - BUDGET).abs() < 3 * 2**0.5 * 0.03).all()


def test_one_batch_gives_the_threshold_of_that_batch():
    # With one block there is nothing below that a threshold could change: the budget is met.
    model = build("qwen3-moe", num_hidden_layers=1)
    moefold.reroute(model, routers.config("threshold", budget=BUDGET))
    inputs = texts(64)
    moefold.calibrate(model, [inputs])
    (taken,) = chosen(model, **inputs, use_cache=False)
    assert int(taken.sum()) == int(BUDGET * 96)


def test_nothing_leaks_and_a_cache_chooses_as_the_full_pass(model):
    moefold.calibrate(model, [texts(64) for _ in range(4)])
    assert moefold.leakage(model, texts(40)).clean
    ids = torch.randint(3, 60, (1, 12))
    full = chosen(model, input_ids=ids, use_cache=False)
    cache, steps = None, []
    for position in range(12):
        with moefold.record_routing(model) as record, torch.no_grad():
            made = model(input_ids=ids[:, position : position + 1], past_key_values=cache)
        cache = made.past_key_values
        found = [routing for (routing,) in record.values()]
        steps.append([routing.chosen for routing in found if isinstance(routing, SparseRouting)])
    for layer, expected in enumerate(full):
        assert torch.equal(torch.cat([step[layer] for step in steps], 1), expected)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_the_state_stays_precise_when_the_model_is_cast(model):
    moefold.calibrate(model, [texts(64)])
    model.bfloat16()
    rerouter = model.get_submodule(f"model.layers.0.mlp.{REROUTER}")
    assert isinstance(rerouter, Rerouter)
    assert isinstance(rerouter.router, LogitRouter)
    assert rerouter.router.state is not None
    assert rerouter.router.state.dtype == torch.float32


def test_refusals(model):
    with pytest.raises(ValueError, match=r"0 real tokens to calibrate on; give text"):
        moefold.calibrate(model, [])
    moefold.revert(model)
    with pytest.raises(ValueError, match=r"nothing to calibrate.*inference='threshold'"):
        moefold.calibrate(model, [texts()])
