"""Embeddings of whole models: what they are, whatever the padding and the batch, and on disk."""

import copy
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import BertConfig, BertModel
from transformers.utils import logging

import moefold
from moefold import routers
from moefold.embedding import EmbeddingConfig, MixtureEmbedding, embedder, fit, open_embedder
from moefold.embedding.pool import standardized
from moefold.rerouting.reroute import rerouting_of
from tests.embedding.tiny import TEXTS, double, tokenizer
from tests.rerouting.models import KINDS, build
from tests.surgery.decoders import decoder, upcycled

# float64; hidden states and logits of a few units, sums of at most 24 products in two layers. What
# may differ is how many zeros a sum over padding has.
EXACT = 1e-12


@pytest.fixture(autouse=True)
def _no_bars():
    logging.disable_progress_bar()


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([tokenizer()(text)["input_ids"]])


def embed(model: Any, config: EmbeddingConfig | None = None, **encoding: Any) -> np.ndarray:
    encoder = embedder(model, tokenizer(), config)
    return np.asarray(encoder.encode(TEXTS, show_progress_bar=False, **encoding))


def one_by_one(model: Any, config: EmbeddingConfig) -> np.ndarray:
    return embed(model, config, batch_size=1)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_what_the_model_itself_says(kind):
    # transformers can be asked for hidden states and logits of routers: text by text, no padding.
    model = build(kind)
    hidden = embed(model)
    routing = embed(model, EmbeddingConfig(kind="routing"))
    assert not any(module._forward_hooks for module in model.modules())
    for text, h, r in zip(TEXTS, hidden, routing, strict=True):
        with torch.no_grad():
            made = model(ids_of(text), output_hidden_states=True, output_router_logits=True)
        # float32: products of up to 24 numbers, other shapes of the same sums.
        assert np.allclose(h, made.hidden_states[-1][0, -1], rtol=1e-4, atol=1e-5)
        last = torch.cat([logits[-1] for logits in made.router_logits])
        assert np.allclose(r, last, rtol=1e-4, atol=1e-5)


def test_layers_pooling_and_softmax_by_hand():
    model = double()
    config = EmbeddingConfig(
        kind="concat",
        layer=1,
        pooling="weighted-mean",
        routing_of="softmax",
        routing_pooling="mean",
    )
    vectors = embed(model, config)
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            made = model(ids_of(text), output_hidden_states=True, output_router_logits=True)
        place = torch.arange(1, len(ids_of(text)[0]) + 1).double()
        hidden = (made.hidden_states[1][0] * place.unsqueeze(1)).sum(0) / place.sum()
        routing = torch.cat([one.softmax(-1).mean(0) for one in made.router_logits])
        assert np.allclose(vector, torch.cat((hidden, routing)), atol=EXACT)
    # The first states are the embeddings of tokens.
    first = embed(model, EmbeddingConfig(layer=0))
    assert np.allclose(first[1], model.get_input_embeddings()(ids_of("sun"))[0, 0].detach())
    assert np.array_equal(embed(model, EmbeddingConfig(layer=2)), embed(model))


ROUTERS = {
    "own": None,
    "unified": routers.config("unified", budget=1.5),
    "expert-choice": routers.config("expert-choice"),
    "bounded": routers.config("seq-topk"),
    "threshold": routers.config("threshold", budget=1.5),
}


def rerouted(router: str) -> Any:
    model = double()
    if (config := ROUTERS[router]) is not None:
        moefold.reroute(model, config)
    if router == "threshold":
        moefold.calibrate(model, [{"input_ids": torch.randint(3, 23, (4, 32))}])
    return model


@pytest.mark.parametrize("router", ROUTERS)
def test_neither_padding_nor_company_changes_a_vector(router):
    model = rerouted(router)
    for pooling in ("last", "mean", "weighted-mean"):
        config = EmbeddingConfig(kind="sum", pooling=pooling, routing_pooling=pooling)
        alone = one_by_one(model, config)
        assert np.abs(alone).max() > 0.1
        for padding in ("left", "right"):
            both = EmbeddingConfig(**{**config.to_dict(), "padding": padding})
            for size in (2, 4):
                made = embed(model, both, batch_size=size)
                assert np.abs(made - alone).max() < EXACT
    # The same measure sees a difference: another text.
    assert np.abs(alone[0] - alone[1]).max() > 1e-3


def test_a_whole_text_may_compete_under_a_causal_rule():
    model = double()
    moefold.reroute(model, routers.config("unified", budget=1.5))
    competed = embed(model)
    moefold.revert(model)
    moefold.reroute(model, routers.config("unified", budget=1.5, inference="prefix"))
    causal = embed(model)
    assert np.abs(causal - competed).max() > 1e-3
    assert np.abs(causal - one_by_one(model, EmbeddingConfig())).max() < EXACT
    assert np.array_equal(embed(model, EmbeddingConfig(compete=True)), competed)
    assert np.array_equal(embed(model), causal)  # the rule is back


def test_the_released_code_lets_padding_compete():
    model = double()
    moefold.reroute(model, routers.config("unified", budget=1.5), faithful=True)
    config = EmbeddingConfig()
    assert np.abs(embed(model, config) - one_by_one(model, config)).max() > 1e-3


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_upcycled_decoders_are_no_different(form):
    # GPT-2 has learnt positions: those of a text must not begin after its padding.
    model = upcycled(decoder(form), "token-choice", k=2)
    config = EmbeddingConfig(kind="concat", pooling="mean")
    alone = one_by_one(model, config)
    assert alone.shape == (4, 16 + 2 * 4)
    assert np.abs(embed(model, config) - alone).max() < 1e-10  # hosts sum in another order
    with torch.no_grad(), moefold.record_routing(model) as record:
        hidden = model.base_model(ids_of(TEXTS[0])).last_hidden_state
    logits: Any = [routings[0] for routings in record.values()]
    said = torch.cat([hidden[0].mean(0), *(one.logits[0, -1] for one in logits)])
    assert np.allclose(alone[0], said, atol=1e-10)


def test_rerouting_afterwards_counts_and_is_undone():
    model, texts = double(), TEXTS
    encoder = embedder(model, tokenizer(), EmbeddingConfig(kind="concat"))
    before = encoder.encode(texts)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    moefold.reroute(model, "token-choice")
    assert np.array_equal(encoder.encode(texts), before)
    moefold.revert(model)
    moefold.reroute(model, routers.config("unified", budget=1.0))
    assert np.abs(encoder.encode(texts) - before).max() > 1e-3
    moefold.revert(model)
    assert np.array_equal(encoder.encode(texts), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_similarities_of_a_sum_are_the_published_ones():
    model = double()
    parts = [torch.tensor(embed(model, EmbeddingConfig(kind=k))) for k in ("hidden", "routing")]
    made = torch.tensor(embed(model, EmbeddingConfig(kind="sum", similarity_weight=0.7)))
    cosines = [torch.nn.functional.normalize(part, dim=1) for part in parts]
    of_hidden, of_routing = (one @ one.T for one in cosines)
    assert torch.allclose(made @ made.T, of_hidden + 0.7 * of_routing, atol=EXACT)


def test_it_is_a_sentence_transformer():
    encoder = embedder(build("olmoe"), tokenizer(), EmbeddingConfig(kind="concat"))
    assert isinstance(encoder, SentenceTransformer)
    assert encoder.get_embedding_dimension() == 16 + 2 * 6
    (vector,) = encoder.encode([TEXTS[0]], normalize_embeddings=True)
    assert abs(np.linalg.norm(vector) - 1) < 1e-6
    assert np.array_equal(encoder.encode(TEXTS[0]), encoder.encode([TEXTS[0]])[0])
    assert encoder.max_seq_length == 96  # the model's positions
    encoder.max_seq_length = 2
    cut = encoder.encode([TEXTS[0], "the rain"])
    assert np.array_equal(cut[0], cut[1])


def test_an_instruction_is_put_inside_the_template():
    config = EmbeddingConfig(prompt="prompteol")
    model = double()
    encoder = embedder(model, tokenizer(), config)
    told = encoder.encode("rain", prompt="This sentence : ")
    other = embedder(
        model, tokenizer(), EmbeddingConfig(instruction="This sentence : ", prompt="prompteol")
    )
    assert np.array_equal(told, other.encode("rain"))
    assert not np.allclose(told, encoder.encode("rain"))
    # A SentenceTransformer says "" where it has no prompt for queries: the config's own stays.
    assert np.array_equal(other.encode_query("rain"), other.encode("rain"))


def test_standardizing_by_the_batch_depends_on_the_batch():
    model = double()
    config = EmbeddingConfig.published("concat")
    made = embed(model, config, batch_size=4)
    plain = EmbeddingConfig(**{**config.to_dict(), "standardize": "none"})
    assert np.allclose(made, standardized(torch.tensor(embed(model, plain))), atol=EXACT)
    assert np.abs(embed(model, config, batch_size=2) - made).max() > 0.1
    assert (one_by_one(model, config) == 0).all()  # as published: no deviation, no number, zero


def test_fitted_statistics_do_not():
    model = double()
    config = EmbeddingConfig(kind="routing", standardize="fitted")
    encoder = embedder(model, tokenizer(), config)
    with pytest.raises(ValueError, match=r"nothing was fitted yet; call moefold.embedding.fit\("):
        encoder.encode(TEXTS)
    fit(encoder, TEXTS, batch_size=3)
    made = encoder.encode(TEXTS)
    assert np.allclose(made.mean(0), 0, atol=EXACT)
    # The deviation has 1e-8 added to it.
    assert np.allclose(made.std(0, ddof=1), 1, atol=1e-6)
    assert np.abs(encoder.encode(TEXTS, batch_size=1) - made).max() < 1e-10
    with pytest.raises(ValueError, match=r"1 texts have no deviation; give at least 2 to fit"):
        fit(encoder, TEXTS[:1])


def test_fitted_statistics_are_saved(tmp_path):
    encoder = embedder(
        build("olmoe"), tokenizer(), EmbeddingConfig(kind="sum", standardize="fitted")
    )
    fit(encoder, TEXTS)
    encoder.save_pretrained(str(tmp_path / "e"), create_model_card=False)
    again = open_embedder(tmp_path / "e")
    for name, value in encoder[0].named_buffers(recurse=False):
        assert torch.equal(again[0].get_buffer(name), value)
    # float32 at other addresses.
    assert np.allclose(again.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize("form", ["stock", "unified", "threshold", "upcycled"])
def test_saved_and_opened_again(form, tmp_path):
    if form == "upcycled":
        model = upcycled(decoder("llama"), "token-choice", k=2).float()
    else:
        model = rerouted("own" if form == "stock" else form).float()
    config = EmbeddingConfig(kind="sum", prompt="prompteol")
    encoder = embedder(model, tokenizer(), config)
    before = encoder.encode(TEXTS)
    encoder.save_pretrained(str(tmp_path / "e"), create_model_card=False)
    suffixes = {file.suffix for file in (tmp_path / "e").rglob("*") if file.is_file()}
    assert suffixes == {".json", ".safetensors"}
    state = model.state_dict()
    opened = [
        open_embedder(tmp_path / "e"),
        SentenceTransformer(str(tmp_path / "e"), device="cpu", trust_remote_code=True),
    ]
    for again in opened:
        module: Any = again[0]
        assert isinstance(module, MixtureEmbedding)
        assert module.config == config
        assert module.model.state_dict().keys() == state.keys()
        assert all(torch.equal(v, state[n]) for n, v in module.model.state_dict().items())
        one, other = rerouting_of(module.model), rerouting_of(model)
        assert (one and one.config) == (other and other.config)
        # float32 at other addresses, with whatever way of computing experts is the default.
        assert np.allclose(again.encode(TEXTS), before, atol=1e-5)


def test_a_head_is_not_needed():
    model = double()
    assert np.array_equal(embed(model.model), embed(model))


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


def test_what_cannot_be_embedded_is_explained():
    tok = tokenizer()
    dense = decoder("llama")
    routing = EmbeddingConfig(kind="routing")
    with refused("kind is 'routing', but LlamaForCausalLM is dense and has no routing weights;"):
        embedder(dense, tok, routing)
    assert embed(dense).shape == (4, 16)
    with refused("layer is 3, but OlmoeForCausalLM has hidden states 0 (embeddings) to 2 (after"):
        embedder(build("olmoe"), tok, EmbeddingConfig(layer=3))
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 16)
    bert = BertModel(BertConfig(vocab_size=30, num_hidden_layers=1, num_attention_heads=2, **sizes))
    with refused("BertModel is not causal: its last token is no summary of a text. Use it as a"):
        embedder(bert, tok)
    with refused("a Linear is no model of transformers; give a causal one, such as"):
        embedder(nn.Linear(2, 2), tok)
    hashed = upcycled(decoder("llama"), "hash", by="position")
    with refused("its router has no logits of tokens by experts to make an embedding of; kind="):
        embedder(hashed, tok, routing)
    with refused("text 1 ('') has no token; leave it out"):
        embedder(build("olmoe"), tok).encode(["sun", ""])


def test_folders_of_others_are_refused(tmp_path):
    with refused(f"{tmp_path} holds no embedding of moefold"):
        open_embedder(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "a.B", "path": ""}]))
    with refused(f"{tmp_path} holds modules a.B, not an embedding of moefold; open it with"):
        open_embedder(tmp_path)
    with refused(f"{tmp_path} holds no embedding of moefold (moefold_embedding.json: "):
        MixtureEmbedding.load(str(tmp_path))
    encoder = embedder(build("olmoe"), tokenizer())
    module: Any = encoder[0]
    with refused("weights are written as safetensors only; leave safe_serialization on"):
        module.save(str(tmp_path), safe_serialization=False)
    encoder.save_pretrained(str(tmp_path / "e"), create_model_card=False)
    (tmp_path / "e" / "model" / "config.json").rename(tmp_path / "config.json")
    with refused(f"{tmp_path / 'e'} lacks model/config.json; copy the whole folder again"):
        open_embedder(tmp_path / "e")


def test_only_embedders_are_fitted():
    with refused("a SentenceTransformer of Linear has nothing to fit; give what moefold.embedding"):
        fit(SentenceTransformer(modules=[nn.Linear(2, 2)], device="cpu"), TEXTS)


def test_a_copy_is_a_model_of_its_own():
    encoder = embedder(double(), tokenizer(), EmbeddingConfig(kind="routing"))
    other = copy.deepcopy(encoder)
    module: Any = other[0]
    moefold.reroute(module.model, routers.config("unified", budget=1.0))
    assert not np.allclose(other.encode(TEXTS), encoder.encode(TEXTS))
