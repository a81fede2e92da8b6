"""Leaks are found where there are some, and none where there are none."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moefold
from moefold import MoEConfig, UpcycleConfig, routers
from tests.rerouting.models import build, texts


def rerouted(name: str, **settings: object):
    model = build("olmoe")
    moefold.reroute(model, routers.config(name, **settings))
    return moefold.leakage(model, texts(40))


@pytest.mark.parametrize("name", ["unified", "expert-choice"])
def test_the_future_leaks_through_a_sequence(name):
    found = rerouted(name)
    assert found.later.rerouted > 0
    assert found.later.found(found.tolerance)
    assert not found.others.found(found.tolerance)
    assert not found.padding.found(found.tolerance)
    assert not found.clean
    assert "later tokens           LEAKS" in str(found)


def test_other_sequences_leak_through_a_batch():
    found = rerouted("unified", group="batch")
    assert found.others.rerouted > 0
    assert found.later.rerouted > 0


def test_other_sequences_leak_where_positions_compete_but_not_the_future():
    # Every position by itself: of a later one nothing is seen. The sequences are of one length, so
    # that the first halves that are compared have the same competitors.
    model = build("olmoe")
    moefold.reroute(model, routers.config("unified", group="position"))
    found = moefold.leakage(model, {"input_ids": torch.randint(3, 60, (2, 40))})
    assert found.others.rerouted > 0
    assert not found.later.found(found.tolerance)


def test_nothing_leaks_through_token_choice():
    found = rerouted("mixtral")
    assert found.clean
    assert (found.later.rerouted, found.others.rerouted, found.padding.rerouted) == (0, 0, 0)
    # 20 and 10 tokens of the first halves; 40 of the first sequence; all 60 real ones.
    assert (found.later.tokens, found.others.tokens, found.padding.tokens) == (30, 40, 60)
    assert "clean" in str(found)


def test_faithful_padding_leaks():
    model = build("olmoe")
    moefold.reroute(model, routers.config("unified", budget=1.5), faithful=True)
    assert moefold.leakage(model, texts(40)).padding.rerouted > 0


def test_an_upcycled_decoder_in_float64():
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).double().eval()
    moefold.upcycle(model, UpcycleConfig(moe=MoEConfig(num_experts=4), sites="all"))
    found = moefold.leakage(model, texts(40))
    assert found.clean
    assert found.tolerance == 1e-12


def test_training_mode_is_left_as_it_was():
    model = build("olmoe").train()
    moefold.leakage(model, texts())
    assert model.training


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"input_ids of shape None; give at least two sequences"),
        ({"input_ids": torch.ones(1, 5).long()}, r"shape torch.Size\(\[1, 5\]\); give at least"),
        (
            {
                "input_ids": torch.ones(2, 3).long(),
                "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
            },
            r"padded on the left; pad them on the right",
        ),
    ],
)
def test_refusals(inputs, message):
    with pytest.raises(ValueError, match=message):
        moefold.leakage(build("olmoe"), inputs)
