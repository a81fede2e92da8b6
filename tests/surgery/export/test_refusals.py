"""What cannot be exported exactly is refused: every reason, and the nearest thing that can."""

import re
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertTokenizer,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import moefold
from moefold import MoEConfig, routers
from moefold.surgery.export import graph
from moefold.surgery.export.dense import DenseMixture
from tests.surgery.export.models import decoder, mixed


def refused(model: nn.Module, folder: Any, format: str = "native", **more: Any) -> str:
    """The message; nothing may have been written."""
    with pytest.raises(ValueError, match=r"^cannot export a ") as error:
        moefold.export(model, folder / "out", format=format, **more)
    assert not (folder / "out").exists()
    return str(error.value)


def custom(**settings: Any) -> MoEConfig:
    return MoEConfig(num_experts=4, router=routers.config("custom", **settings))


ROUTERS = [
    ("token-choice", {"capacity": 3, "k": 1}, "its experts have a capacity"),
    ("bias-balanced", {}, "(BiasBalance); its combine weights are not a softmax (Sigmoid). Near"),
    ("threshold", {}, "its router chooses by Above, not the top k experts of each token"),
    ("cosine", {}, "its router's logits are cosines, not a linear map"),
    ("relu", {}, "its router chooses by Above"),
    ("random", {}, "its router is a RandomRouter, not token choice by a softmax"),
    ("custom", {"score": "unified"}, "its router scores by Unified, which does not order"),
    ("custom", {"score": "sigmoid"}, "its combine weights are not a softmax (Sigmoid)"),
    ("custom", {"weight": "one"}, "its combine weights are not a softmax (one)"),
    ("custom", {"expert_groups": 2}, "its experts lie in groups, of which a token takes the best"),
    ("bias-balanced", {"scale": 2.5}, "its combine weights are scaled by 2.5"),
]


@pytest.mark.parametrize(("router", "settings", "why"), ROUTERS)
def test_routers_that_no_native_class_has(tmp_path, router, settings, why):
    text = refused(mixed(decoder("llama"), router=router, **settings), tmp_path)
    assert text.startswith("cannot export a LlamaForCausalLM as 'mixtral': every mixture: its ")
    assert why in text
    assert text.endswith("Nearest: upcycle with router 'token-choice'")


@pytest.mark.parametrize(
    "settings",
    [
        {"router": "token-choice", "noise_std": 1.0, "jitter": 0.1, "renormalize": True},
        {"router": "custom", "score": "identity", "weight": "softmax", "normalize": "chosen"},
        {"router": "custom", "score": "sigmoid", "weight": "clean-softmax", "normalize": "all"},
    ],
)
def test_routers_that_come_to_the_same_are_not_refused(tmp_path, settings):
    # Experts are ordered alike by their logits, a sigmoid and a softmax of them. Noise is training.
    format = moefold.export(mixed(decoder("llama"), **settings), tmp_path / "out")
    assert format == ("qwen2-moe" if settings.get("normalize") == "all" else "mixtral")


def test_all_reasons_come_at_once_with_the_formats_that_can(tmp_path):
    model = mixed(decoder("qwen2"), sites="every-other", shared_width=8, renormalize=False)
    assert refused(model, tmp_path, "mixtral") == (
        "cannot export a Qwen2ForCausalLM as 'mixtral': qwen2 has biases of queries, keys and "
        "values, Mixtral no biases in attention; layers without a mixture (0), of which Mixtral "
        "has none; shared experts, of which Mixtral has none; Mixtral renormalises combine "
        "weights, and these are not. Nearest: format 'qwen2-moe' can hold it; upcycle with "
        "sites='all'; set shared_width=0; upcycle with a router that has renormalize=True"
    )


BLOCKS = [
    ("qwen3", {}, "mixtral", "qwen3 has a norm of the queries and keys of each head, Mixtral quer"),
    ("olmo2", {}, "olmoe", "olmo2 has rms norms after attention and MLP, Olmoe rms norms before"),
    ("olmo", {}, "olmoe", "olmo has layer norms without weights, Olmoe rms norms before attention"),
    ("olmo", {}, "native", "Olmoe a norm of queries and keys over all heads"),
    (
        "llama",
        {"attention_bias": True},
        "native",
        "biases of all products of attention, Mixtral no",
    ),
    ("llama", {"mlp_bias": True}, "native", "every mixture: its experts have biases"),
    ("mistral", {"sliding_window": 3}, "olmoe", "mistral attends in a sliding window, Olmoe does"),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        "native",
        "only some layers attend in a sliding window, in Qwen3Moe all or none",
    ),
]


@pytest.mark.parametrize(("kind", "config", "format", "why"), BLOCKS)
def test_blocks_that_a_native_class_does_not_have(tmp_path, kind, config, format, why):
    assert why in refused(mixed(decoder(kind, **config)), tmp_path, format)


@pytest.mark.parametrize(("format", "nearest"), [("olmoe", "flex-olmo"), ("mixtral", "flex-olmo")])
def test_what_olmo_2_can_be(tmp_path, format, nearest):
    text = refused(mixed(decoder("olmo2")), tmp_path, format)
    assert text.endswith(f"Nearest: format '{nearest}' can hold it")


def test_olmo_stays_what_it_is(tmp_path):
    text = refused(mixed(decoder("olmo")), tmp_path)
    assert text.endswith("Nearest: moefold.save and moefold.load keep it as it is")


def test_a_head_that_is_not_there(tmp_path):
    model = mixed(decoder("olmo2", AutoModelForSequenceClassification))
    text = refused(model, tmp_path)
    assert "transformers has no FlexOlmoForSequenceClassification" in text
    assert text.endswith("Nearest: use another head")


def test_mixtures_that_differ(tmp_path):
    other = MoEConfig(num_experts=3, router=routers.config("token-choice", k=1, renormalize=True))
    model = mixed(decoder("llama"), moe_at={r"layers\.1": other})
    text = refused(model, tmp_path)
    assert "the mixtures differ in num_experts (3, 4); the mixtures differ in k (1, 2)" in text
    assert text.endswith("give all mixtures the same num_experts; give all mixtures the same k")


def test_one_wrong_mixture_is_named(tmp_path):
    model = mixed(decoder("llama"), moe_at={r"layers\.1": custom(score="sigmoid")})
    assert "'mixtral': model.layers.1: its combine weights are not a softmax" in refused(
        model, tmp_path
    )


def test_a_decoder_of_another_kind(tmp_path):
    config = Phi3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )
    assert "no native mixture of transformers has the layers of a Phi3ForCausalLM" in refused(
        mixed(Phi3ForCausalLM(config)), tmp_path
    )


@pytest.mark.parametrize("format", ["native", "mixtral"])
def test_an_encoder_is_told_of_graphs(tmp_path, tiny, format):
    pytest.importorskip("onnxruntime")
    assert refused(mixed(tiny()), tmp_path, format) == (
        f"cannot export a BertModel as '{format}': no native mixture of transformers has the "
        f"layers of a BertModel. Nearest: format 'torch-export' can hold it; format 'onnx' can "
        f"hold it"
    )


def test_a_sentence_transformer_is_told_of_what_is_in_it(tmp_path):
    decoder("llama", AutoModel).save_pretrained(tmp_path / "dense")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nrain\n")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "dense")
    body = Transformer(str(tmp_path / "dense"))
    pooling = Pooling(body.get_embedding_dimension())
    model = SentenceTransformer(modules=[body, pooling], device="cpu")
    mixed(model)  # pyright: ignore
    text = refused(model, tmp_path)
    assert "has the layers of a SentenceTransformer. Nearest: export the transformer in it" in text
    assert moefold.export(body.model, tmp_path / "out") == "mixtral"


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_a_decoder_has_no_graph(tmp_path, format):
    text = refused(mixed(decoder("llama")), tmp_path, format)
    assert "model.layers.0, model.layers.1: decodes, with a cache that a graph does not" in text
    assert "Nearest: format 'mixtral' can hold it; format 'qwen2-moe' can hold it" in text


def test_an_encoder_decoder_has_no_graph(tmp_path):
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0
    )
    text = refused(mixed(T5ForConditionalGeneration(config)), tmp_path, "torch-export")
    assert "'torch-export': it encodes and decodes. Nearest: export its encoder by itself" in text


@pytest.mark.parametrize(
    ("router", "settings", "why"),
    [
        ("random", {}, "encoder.layer.1: its router, a RandomRouter, gives no matrix of weights"),
        ("expert-choice", {"group": 4}, "its groups of 4 tokens fix the number of tokens"),
    ],
)
def test_mixtures_without_a_graph(tmp_path, tiny, router, settings, why):
    model = mixed(tiny(), sites="every-other", router=router, **settings)
    assert why in refused(model, tmp_path, "torch-export")


def test_a_plan_that_runtimes_round_otherwise(tmp_path, tiny):
    text = refused(mixed(tiny(), router="sparse-transport-expert-choice"), tmp_path, "onnx")
    assert "its router iterates a transport plan, which other runtimes round to another" in text
    assert "Nearest: format 'torch-export' can hold it; upcycle with router 'expert-choice'" in text


def test_a_model_that_does_not_say_what_it_takes(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(graph, "made_up_inputs", lambda model: None)
    text = refused(mixed(tiny()), tmp_path, "torch-export")
    assert "a BertModel does not say what it takes. Nearest: pass inputs, its keyword" in text


def test_packages_that_are_missing(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(graph, "find_spec", lambda name: None)
    text = refused(mixed(tiny()), tmp_path, "onnx")
    assert "onnx, onnxscript, onnxruntime not installed. Nearest: format 'torch-export' can" in text
    assert text.endswith("pip install 'moefold[export]'")


def test_formats_are_known(tmp_path, tiny):
    with pytest.raises(ValueError, match=r"^format is 'mixtrall'; allowed: 'native', .* Did you "):
        moefold.export(mixed(tiny()), tmp_path / "out", format="mixtrall")


def test_a_dense_model_is_not_exported(tmp_path):
    model = decoder("llama")
    assert isinstance(model, LlamaForCausalLM)
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM is not upcycled; call moefold.upcy"):
        moefold.export(model, tmp_path / "out")


def test_a_full_folder_is_left_alone(tmp_path):
    model = mixed(decoder("llama"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("the only copy")
    with pytest.raises(ValueError, match=r"full is not empty and was not written by moefold"):
        moefold.export(model, tmp_path / "full")
    moefold.save(model, tmp_path / "moe")
    with pytest.raises(ValueError, match=r"moe holds an upcycled model, which an export does not"):
        moefold.export(model, tmp_path / "moe")
    moefold.export(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"out is not empty and was not written by moefold"):
        moefold.export(model, tmp_path / "out")


def test_a_graph_is_put_back_when_tracing_fails(tmp_path, tiny, monkeypatch):
    def broken(self: DenseMixture, x: torch.Tensor, mask: object = None) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DenseMixture, "forward", broken)
    model = mixed(tiny()).train()
    modules = dict(model.named_modules())
    with pytest.raises(RuntimeError, match=re.escape("out of memory")):
        moefold.export(model, tmp_path / "out", format="torch-export")
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in model.modules())
