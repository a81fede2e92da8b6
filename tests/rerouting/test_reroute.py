"""Another router in a pretrained mixture: the model's own function, ours, and back."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

import moefold
from moefold import routers
from moefold.rerouting import find_blocks, recipes
from moefold.rerouting.layer import REROUTER, own_routing
from moefold.routing import SparseRouting
from tests.rerouting.models import KINDS, build, texts

KINDS_IDS = list(KINDS)


def logits(model: Any, inputs: dict) -> torch.Tensor:
    """Of the real tokens."""
    with torch.no_grad():
        made = model(**inputs, use_cache=False).logits
    return made[inputs["attention_mask"].bool()]


def first_choice(record: moefold.Record) -> torch.Tensor:
    """What the first block chose in the only pass."""
    (routing,) = next(iter(record.values()))
    assert isinstance(routing, SparseRouting)
    return routing.chosen


@pytest.mark.parametrize("kind", KINDS_IDS)
def test_token_choice_is_the_untouched_model(kind):
    model, inputs = build(kind), texts()
    before = logits(model, inputs)
    made = moefold.reroute(model, "token-choice")
    assert made.k == 2
    assert torch.equal(logits(model, inputs), before)
    # And it is our code that ran: the choice is recorded, two experts for each real token.
    with moefold.record_routing(model) as record:
        logits(model, inputs)
    (routing,) = record[f"{made.blocks[0]}.{REROUTER}"]
    assert int(routing.rows_per_expert.sum()) == 2 * int(inputs["attention_mask"].sum())


@pytest.mark.parametrize("kind", KINDS_IDS)
def test_rows_compute_what_indices_compute(kind):
    # The model's own choice, given to the experts as rows: the same function, other sums.
    model, inputs = build(kind), texts()
    before = logits(model, inputs)
    made = moefold.reroute(model, "token-choice")
    for name in made.blocks:
        model.get_submodule(f"{name}.{REROUTER}").forward = by_rows
    after = logits(model, inputs)
    # float32, logits of a few units, sums of 16 to 24 products in two layers.
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-4)


def by_rows(hidden, native, experts, shape, mask, past):
    """What a rerouter does with a routing, for the model's own choice."""
    scores, weights, indices = native
    routing = own_routing(scores.reshape(*shape, -1), weights, indices, None)
    rows = routing.dispatch(hidden.reshape(*shape, -1))
    expert = routing.expert_of_row.unsqueeze(1)
    made = experts(rows, expert, torch.ones_like(expert, dtype=weights.dtype))
    return routing.combine(made).reshape(hidden.shape)


@pytest.mark.parametrize("kind", KINDS_IDS)
def test_unified_routing_spends_its_budget_and_reverts(kind):
    model, inputs = build(kind), texts()
    before, state = logits(model, inputs), copy.deepcopy(model.state_dict())
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    made = moefold.reroute(model, routers.config("unified", budget=1.5))
    # Nothing is copied: the same parameters, and no others.
    assert model.state_dict().keys() == state.keys()
    with moefold.record_routing(model) as record:
        after = logits(model, inputs)
    assert not torch.allclose(after, before, atol=1e-3)
    for name in made.blocks:
        (routing,) = record[f"{name}.{REROUTER}"]
        assert isinstance(routing, SparseRouting)
        # 24 and 12 real tokens, 1.5 experts for each on average, in each sequence by itself.
        assert routing.chosen.sum((1, 2)).tolist() == [36, 18]
        assert not routing.chosen[1, 12:].any()
    moefold.revert(model)
    assert torch.equal(logits(model, inputs), before)
    assert [(n, id(m), type(m)) for n, m in model.named_modules()] == modules


def test_gradients_reach_the_gate():
    model, inputs = build("olmoe").train(), texts()
    moefold.reroute(model, routers.config("unified", budget=2.0))
    model(**inputs, use_cache=False).logits.square().mean().backward()
    gate = model.get_submodule("model.layers.0.mlp.gate")
    assert isinstance(gate.weight, nn.Parameter)
    assert gate.weight.grad is not None
    assert gate.weight.grad.abs().max() > 0


def test_a_budget_of_one_token_is_token_choice():
    # USMoE with one token in the group chooses the top k of that token, whatever alpha is.
    model = build("olmoe")
    inputs = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 1).long()}
    moefold.reroute(model, "token-choice")
    with moefold.record_routing(model) as record:
        logits(model, inputs)
    expected = first_choice(record)
    moefold.revert(model)
    moefold.reroute(model, routers.config("unified", budget=2.0, alpha=0.3))
    with moefold.record_routing(model) as record:
        logits(model, inputs)
    # The first layer sees the same hidden state; later ones what the first made of it.
    assert torch.equal(first_choice(record), expected)


def test_padding_further_changes_nothing_unless_it_is_to_be_faithful():
    inputs = texts()
    further = {name: nn.functional.pad(value, (0, 8)) for name, value in inputs.items()}
    router = routers.config("unified", budget=1.5)
    for faithful in (False, True):
        model = build("olmoe")
        moefold.reroute(model, router, faithful=faithful)
        change = (logits(model, further) - logits(model, inputs)).abs().max()
        # float32 rounding of logits of a few units; or padding that takes experts from tokens.
        assert (change < 1e-4) == (not faithful)
        assert (change > 1e-2) == faithful


def test_generation_is_refused_where_earlier_tokens_would_choose_again():
    model = build("mixtral")
    prompt = torch.randint(3, 60, (1, 6))
    moefold.reroute(model, routers.config("unified", budget=2.0))
    with pytest.raises(
        ValueError, match=r"layers.0.mlp: tokens are added to a cache of 6, .*='threshold', "
    ):
        model.generate(prompt, max_new_tokens=3, do_sample=False)
    with_recomputing = model.generate(prompt, max_new_tokens=3, do_sample=False, use_cache=False)
    assert with_recomputing.shape == (1, 9)
    moefold.revert(model)
    dense = model.generate(prompt, max_new_tokens=3, do_sample=False)
    moefold.reroute(model, "token-choice")
    assert torch.equal(model.generate(prompt, max_new_tokens=3, do_sample=False), dense)


def test_gradient_checkpointing_changes_nothing():
    model, inputs = build("qwen3-moe").train(), texts()
    moefold.reroute(model, routers.config("unified", budget=1.5))
    model(**inputs, use_cache=False).logits.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    by_layer = functools.partial(checkpoint, use_reentrant=False)
    for layer in model.model.layers:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, by_layer
    with moefold.record_routing(model) as record:
        model(**inputs, use_cache=False).logits.square().mean().backward()
    assert all(len(routings) == 1 for routings in record.values())
    for name, gradient in expected.items():
        found = model.get_parameter(name).grad
        assert found is not None
        # The same products in the same order, but for gradients that are added twice.
        assert torch.allclose(found, gradient, rtol=1e-4, atol=1e-6), name


def test_pickled_and_copied_layers_stay_rerouted():
    model, inputs = build("olmoe"), texts()
    moefold.reroute(model, routers.config("unified", budget=1.5))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), logits(model, inputs))
    moefold.revert(model)
    assert not torch.equal(logits(twin, inputs), logits(model, inputs))


def test_a_plain_statement_about_causality():
    made = moefold.reroute(build("olmoe"), "unified")
    assert "a later token can change an earlier one" in str(made)
    assert "now use unified()" in str(made)
    assert "no later token" in str(moefold.reroute(build("olmoe"), "token-choice"))


def test_blocks_are_found_by_structure():
    blocks = find_blocks(build("deepseek-v3"))
    # The first layer is dense.
    assert [block.name for block in blocks] == ["model.layers.1.mlp"]
    assert (blocks[0].num_experts, blocks[0].dim, blocks[0].k) == (8, 16, 2)
    assert blocks[0].causal


def test_what_can_and_what_cannot_take_the_logits():
    assert {"unified", "expert-choice", "seq-topk", "expert-race"} <= set(recipes(6))
    assert not {"cosine", "bias-balanced", "soft", "hash"} & set(recipes(6))


def test_refusals():
    dense = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"BertModel has no mixture .*: moefold.upcycle makes exp"):
        moefold.reroute(dense, "unified")
    model = build("olmoe")
    with pytest.raises(ValueError, match=r"mlp: .*budget is 7.0"):
        moefold.reroute(model, routers.config("unified", budget=7.0))
    with pytest.raises(ValueError, match=r"router 'cosine' cannot take the logits .*one of .*unif"):
        moefold.reroute(model, "cosine")
    with pytest.raises(ValueError, match=r"unknown router 'unifiedd'; did you mean 'unified'"):
        moefold.reroute(model, "unifiedd")
    moefold.reroute(model, "unified")
    with pytest.raises(ValueError, match=r"already changed by moefold; call moefold.revert"):
        moefold.reroute(model, "expert-choice")
