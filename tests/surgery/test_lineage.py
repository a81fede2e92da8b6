"""Where every parameter came from: names that are found without building the dense model again."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import moefold
from moefold import MoEConfig, UpcycleConfig
from moefold.surgery.lineage import origins
from tests.surgery.conftest import tiny_config

DECODER: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def bert() -> Any:
    return BertForMaskedLM(tiny_config(num_hidden_layers=2))


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**DECODER))


def phi3() -> Any:
    return Phi3ForCausalLM(Phi3Config(**DECODER))


def t5() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(**sizes, num_layers=2, feed_forward_proj="gated-gelu")
    )


@pytest.mark.parametrize(
    ("build", "site", "expected"),
    [
        pytest.param(
            bert,
            "bert.encoder.layer.1",
            {
                "router.weight": (),
                "experts.up_proj": ("intermediate.dense.weight",),
                "experts.up_proj_bias": ("intermediate.dense.bias",),
                "experts.down_proj": ("output.dense.weight",),
                "experts.down_proj_bias": ("output.dense.bias",),
            },
            id="bert",
        ),
        pytest.param(
            llama,
            "model.layers.1",
            {
                "router.weight": (),
                "experts.gate_up_proj": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
                "experts.down_proj": ("mlp.down_proj.weight",),
            },
            id="llama, gated",
        ),
        pytest.param(
            phi3,
            "model.layers.1",
            {
                "router.weight": (),
                "experts.gate_up_proj": ("mlp.gate_up_proj.weight",),
                "experts.down_proj": ("mlp.down_proj.weight",),
            },
            id="phi3, fused",
        ),
        pytest.param(
            t5,
            "decoder.block.1",
            {
                "router.weight": (),
                "experts.gate_up_proj": (
                    "layer.2.DenseReluDense.wi_0.weight",
                    "layer.2.DenseReluDense.wi_1.weight",
                ),
                "experts.down_proj": ("layer.2.DenseReluDense.wo.weight",),
            },
            id="t5, in a list",
        ),
    ],
)
def test_experts_come_from_the_maps_of_their_mlp(build, site, expected):
    model = build()
    dense = {name: tuple(p.shape) for name, p in model.named_parameters()}
    moefold.upcycle(model, UpcycleConfig(moe=MoEConfig(num_experts=2)), inputs=False)
    found = moefold.lineage(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    there = {
        name.removeprefix(f"{site}.moe."): tuple(s.removeprefix(f"{site}.") for s in sources)
        for name, sources in found.items()
        if name.startswith(f"{site}.moe.")
    }
    assert there == expected
    assert all(sources == (name,) for name, sources in found.items() if ".moe." not in name)
    # Nothing is lost and nothing comes from nowhere; the order is that of the dense model, tied
    # weights once, which the numbers in a state dict are counted by.
    assert {source for sources in found.values() for source in sources} == set(dense)
    before = origins(model)[1]
    assert [(name, p.shape) for name, p in before.items()] == list(dense.items())


@pytest.mark.parametrize("build", [bert, t5])
def test_a_deep_copy_and_a_loaded_model_have_the_same_lineage(build, tmp_path):
    model = build()
    moefold.upcycle(model, UpcycleConfig(moe=MoEConfig(num_experts=2)), inputs=False)
    wanted = moefold.lineage(model)
    assert moefold.lineage(copy.deepcopy(model)) == wanted
    moefold.save(model, tmp_path / "moe")
    with torch.device("meta"):
        dense = build()
    assert moefold.lineage(moefold.load(tmp_path / "moe"), dense) == wanted


def test_a_shared_expert_is_new_and_a_missing_bias_has_no_source():
    model: Any = LlamaForCausalLM(LlamaConfig(**DECODER))
    for layer in model.model.layers:
        layer.mlp.down_proj.bias = nn.Parameter(torch.zeros(16))
    config = UpcycleConfig(moe=MoEConfig(num_experts=2, shared_width=4), sites="last:1")
    moefold.upcycle(model, config, inputs=False)
    found = moefold.lineage(model)
    experts = "model.layers.1.moe.experts."
    assert found[f"{experts}down_proj_bias"] == ("model.layers.1.mlp.down_proj.bias",)
    assert found[f"{experts}gate_up_proj_bias"] == ()
    assert all(not s for name, s in found.items() if ".moe.shared." in name)
    assert any(".moe.shared." in name for name in found)


def test_a_dense_model_has_none(tiny):
    with pytest.raises(ValueError, match=r"BertModel is not upcycled: no layer of it is a mixture"):
        moefold.lineage(tiny())


def test_a_part_of_what_was_upcycled_needs_the_dense_part(tiny):
    model = BertForMaskedLM(tiny().config)
    moefold.upcycle(model, inputs=False)
    match = r"BertModel does not hold the dense modules it was made from .*; pass .* as `dense`"
    with pytest.raises(ValueError, match=match):
        moefold.lineage(model.bert)
    assert "encoder.layer.1.moe.experts.up_proj" in moefold.lineage(
        model.bert, BertForMaskedLM(tiny_config()).bert
    )


def test_a_dense_model_that_is_another(tiny):
    model = tiny()
    moefold.upcycle(model, inputs=False)
    with pytest.raises(ValueError, match=r"the BertModel passed as `dense` is upcycled itself"):
        moefold.lineage(model, model)
    match = r"the dense LlamaForCausalLM has no encoder, which the mixture at encoder.layer.1 was"
    with pytest.raises(ValueError, match=match):
        moefold.lineage(model, llama())
    match = (
        r"word_embeddings.weight is \[60, 16\] in the upcycled model, and in the dense one \[61, 1"
    )
    with pytest.raises(ValueError, match=match):
        moefold.lineage(model, tiny(vocab_size=61))
    headless = tiny()
    headless.pooler = None
    match = (
        r"pooler.dense.weight is \[16, 16\] in the upcycled model, and in the dense one not there"
    )
    with pytest.raises(ValueError, match=match):
        moefold.lineage(model, headless)
