"""Inference rules in pretrained mixtures: the same choice in a full pass and token by token."""

from typing import Any

import pytest
import torch

import moefold
from moefold import routers
from moefold.routers.inference import RULES
from tests.rerouting.models import KINDS, build, texts

COMPETING: dict[str, dict[str, Any]] = {
    "unified": {"budget": 1.5},
    "expert-choice": {"capacity_factor": 2.0},
    "expert-race": {},
    "sinkhorn-expert-choice": {},
    "sinkhorn-token-choice": {},
    "sparse-transport-expert-choice": {"iterations": 4},
}


def ruled(name: str, rule: str, kind: str = "olmoe", *, exact: bool = True) -> Any:
    """A model rerouted and taught; `exact` for float64, which some experts refuse."""
    torch.manual_seed(0)
    model = build(kind)
    if exact:
        model.set_experts_implementation("eager")
        model = model.double()
    moefold.reroute(model, routers.config(name, **COMPETING[name], inference=rule))
    if rule in ("threshold", "predictor"):
        moefold.calibrate(model, [{"input_ids": torch.randint(3, 60, (4, 16))} for _ in range(4)])
    return model


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", COMPETING)
def test_no_rule_leaks(name, rule):
    found = moefold.leakage(ruled(name, rule), texts(16))
    assert found.tolerance == 1e-12  # float64
    assert set(found.leaks) == {"later", "others", "padding", "decoding"}
    assert found.clean, str(found)


@pytest.mark.parametrize("name", COMPETING)
def test_without_a_rule_the_future_leaks_and_decoding_differs(name):
    found = moefold.leakage(ruled(name, "group"), texts(16))
    assert found.later.found(found.tolerance)
    assert found.decoding is not None
    assert found.decoding.rerouted > 0
    assert "token by token         LEAKS" in str(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_the_same_token_by_token_in_every_kind(kind):
    found = moefold.leakage(ruled("unified", "prefix", kind, exact=False), texts(12))
    assert found.clean, str(found)


@pytest.mark.parametrize("rule", RULES)
def test_sequences_generate_the_same_alone_and_left_padded_in_a_batch(rule):
    model = ruled("unified", rule)
    ids = torch.randint(3, 60, (3, 9))
    mask = torch.arange(9).expand(3, 9) >= torch.tensor([[0], [4], [7]])
    settings: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = model.generate(ids * mask, attention_mask=mask.long(), **settings)[:, 9:]
    for row, real in enumerate(mask):
        own = ids[row : row + 1, real]
        alone = model.generate(own, attention_mask=torch.ones_like(own), **settings)
        assert torch.equal(together[row], alone[0, own.shape[1] :])


@pytest.mark.parametrize("rule", ["threshold", "prefix"])
def test_beams_are_the_same_with_and_without_a_cache(rule):
    # Beams change places in the cache, and what the router remembers with them.
    model = ruled("unified", rule)
    ids = torch.randint(3, 60, (2, 6))
    settings: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    settings |= {"attention_mask": torch.ones_like(ids)}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("rule", RULES)
def test_a_static_cache_generates_what_no_cache_does(rule):
    # Its room is filled step by step, so that the router must not take room for earlier tokens.
    model = ruled("unified", rule)
    ids = torch.randint(3, 60, (3, 9))
    mask = torch.arange(9).expand(3, 9) >= torch.tensor([[0], [4], [7]])
    settings: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    settings |= {"attention_mask": mask.long()}
    without = model.generate(ids * mask, use_cache=False, **settings)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(ids * mask, **static, **settings), without)


def test_without_a_rule_a_cache_is_refused_with_the_rules_that_can():
    model = ruled("unified", "group")
    with pytest.raises(
        ValueError, match=r"added to a cache of 5, .*inference='threshold', 'prefix'"
    ):
        model.generate(torch.randint(3, 60, (1, 5)), max_new_tokens=3)


def test_while_training_a_cache_is_refused_and_says_how_to_go_on():
    model = ruled("unified", "threshold").train()
    with pytest.raises(ValueError, match=r"cache of 5, .*call model\.eval\(\)"):
        model.generate(torch.randint(3, 60, (1, 5)), max_new_tokens=3)


def test_a_cache_that_the_router_has_not_seen_is_refused():
    model = ruled("unified", "token-choice")
    ids = torch.randint(3, 60, (1, 5))
    cache = model(input_ids=ids, use_cache=True).past_key_values
    moefold.revert(model)
    moefold.reroute(model, routers.config("unified", inference="prefix"))
    with pytest.raises(ValueError, match=r"the cache holds 5 tokens, of which this router.*seen 0"):
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


def test_an_untrained_predictor_is_refused():
    model = build("olmoe")
    done = moefold.reroute(model, routers.config("unified", inference="predictor"))
    assert "a predictor in every block: moefold.calibrate" in str(done)
    with pytest.raises(
        ValueError, match=r"mlp: inference='predictor', and the predictor was never"
    ):
        model(input_ids=torch.randint(3, 60, (1, 5)))


def test_predictors_are_taught_without_touching_the_model():
    model = ruled("unified", "group")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moefold.revert(model)
    moefold.reroute(model, routers.config("unified", budget=1.5, inference="predictor"))
    batches = [{"input_ids": torch.randint(3, 60, (4, 24))} for _ in range(40)]
    learnt = moefold.calibrate(model, batches)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert learnt.tokens == 40 * 96
    assert not learnt.thresholds
    for block, rows in learnt.experts_per_token.items():
        # The level follows the budget; a quarter of the text is 960 tokens.
        assert rows == pytest.approx(1.5, abs=0.2)
        # Who guesses "never" is right in 1 - 1.5 / 6 of pairs.
        assert learnt.accuracy[block] > 0.75
    assert "predictor right in" in str(learnt)
