"""Candidates of text: each is encoded once, and what was trained is what is saved and asked."""

import math
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizer

from moefold.preference import (
    FitConfig,
    Groups,
    NetConfig,
    PreferenceConfig,
    fit,
    load,
    save,
)
from moefold.preference.text import EncoderScorer, embed, text_model, with_encoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "the", "rain", "sun", "sea"]
NET = PreferenceConfig(net=NetConfig("mlp", {"hidden": 6}))


@pytest.fixture
def encoder(tmp_path) -> SentenceTransformer:
    """A BERT of two layers with a few words and mean pooling."""
    torch.manual_seed(0)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    body = Transformer(str(tmp_path / "bert"))
    return SentenceTransformer(modules=[body, Pooling(16)], device="cpu").eval()


def groups(count: int = 24) -> Groups:
    """The expert takes what is good."""
    draw = torch.Generator().manual_seed(0)
    things = ["the rain", "the sun", "the sea", "rain sun", "sea rain sun"]
    candidates, chosen = [], []
    for _ in range(count):
        order = torch.randperm(len(things), generator=draw)[:3].tolist()
        best = int(torch.randint(3, (1,), generator=draw))
        chosen.append(best)
        candidates.append(
            [f"{'good' if at == best else 'bad'} {things[n]}" for at, n in enumerate(order)]
        )
    return Groups.of(candidates, chosen=chosen)


def asked(told: Groups) -> Groups:
    """The same, where the context says whether good or bad is wanted."""
    parts = told.as_inputs()
    want = ["good" if n % 2 == 0 else "bad" for n in range(len(told))]
    texts = list(parts["candidates"])
    for n, word in enumerate(want):
        if word == "bad":
            own = slice(3 * n, 3 * n + 3)
            swapped = {"good": "bad", "bad": "good"}
            texts[own] = [
                " ".join(str(swapped.get(w, w)) for w in text.split()) for text in texts[own]
            ]
    return Groups(**{**parts, "candidates": texts, "context": want})


def test_vectors_are_the_encoders_and_each_text_is_encoded_once(encoder, monkeypatch):
    told = asked(groups(4))
    assert isinstance(told.candidates, list)
    assert isinstance(told.context, list)
    seen: list[str] = []
    before = SentenceTransformer.preprocess

    def watched(self: Any, texts: list[str], **settings: Any) -> Any:
        seen.extend(texts)
        return before(self, texts, **settings)

    monkeypatch.setattr(SentenceTransformer, "preprocess", watched)
    counted: list[tuple[int, int]] = []
    features = embed(encoder, told, at_once=3, advance=lambda *at: counted.append(at))
    assert sorted(seen) == sorted({*told.candidates, *told.context})
    assert counted[-1] == (len(seen), len(seen))
    monkeypatch.undo()
    u = encoder.encode(told.candidates, convert_to_tensor=True)
    c = encoder.encode(told.context, convert_to_tensor=True).repeat_interleave(3, 0)
    # Padding differs with the batch, which float32 sums show.
    wanted = torch.cat([u, u * c, (u - c).abs()], 1)
    torch.testing.assert_close(features.candidates, wanted, rtol=1e-4, atol=1e-5)
    assert features.context is None
    assert features.chosen is told.chosen
    plain = embed(encoder, groups(4)).candidates
    assert isinstance(plain, torch.Tensor)
    assert plain.shape == (12, 16)


@pytest.mark.parametrize("ask", [False, True])
def test_a_frozen_encoder_with_a_head(ask, encoder, tmp_path):
    told = asked(groups()) if ask else groups()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    features = embed(encoder, told)
    torch.manual_seed(1)
    head = NET.build(features)
    fit(head, features, FitConfig(epochs=40, batch_size=8, learning_rate=0.02))
    head.temperature = 0.5
    model = with_encoder(head, encoder)
    # On texts it says what the head says on their vectors.
    torch.testing.assert_close(model.values(told), head.values(features), rtol=1e-4, atol=1e-4)
    assert (model.best(told) == told.chosen).float().mean() > 0.9
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in before.items())
    assert model.temperature == 0.5
    save(model, tmp_path / "made")
    again = load(tmp_path / "made")
    assert torch.equal(again.values(told), model.values(told))
    assert again.temperature == 0.5
    scorer = again.comparator.scorer
    assert isinstance(scorer, EncoderScorer)
    assert not scorer.trained
    twice = again.state_dict()
    assert all(torch.equal(twice[name], value) for name, value in model.state_dict().items())
    suffixes = {file.suffix for file in (tmp_path / "made").rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt"}


def test_an_encoder_that_learns_too(encoder, tmp_path):
    told = groups()
    model = text_model(encoder, told, NET)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    loss = model(**told.as_inputs())["loss"]
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for name, p in encoder.named_parameters()
        # Pooling is of the last hidden states; BERT's own pooler is not asked.
        if "pooler" not in name and "position" not in name and "key.bias" not in name
    )
    history = fit(model, told, FitConfig(epochs=15, batch_size=8, learning_rate=3e-3))
    assert history.loss[-1] < 0.3 < math.log(2) < 2 * history.loss[0]
    assert (model.best(told) == told.chosen).float().mean() > 0.9
    name = "0.model.encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(encoder.state_dict()[name], before[name])
    save(model, tmp_path / "made")
    again = load(tmp_path / "made")
    assert torch.equal(again.values(told), model.values(told))
    scorer = again.comparator.scorer
    assert isinstance(scorer, EncoderScorer)
    assert scorer.trained


def test_only_an_encoder_that_is_trained_is_in_training_mode(encoder):
    def modes(trained: bool) -> tuple[bool, bool, bool]:
        scorer = EncoderScorer(encoder, nn.Linear(16, 1, bias=False), trained=trained)
        scorer.train()
        loss = scorer(["good sea", "bad sea"]).sum()
        loss.backward()
        first = next(encoder.parameters())
        return scorer.encoder.training, first.requires_grad, first.grad is not None

    assert modes(trained=False) == (False, False, False)
    assert modes(trained=True) == (True, True, True)


def test_bad_input_is_explained(encoder):
    numbers = Groups.of([torch.zeros(2, 3)], chosen=[0])
    with pytest.raises(ValueError, match=r"candidates are numbers, of shape \(2, 3\); an encoder"):
        embed(encoder, numbers)
    mirror = PreferenceConfig(net=NetConfig("mirror"), comparator="antisymmetric")
    with pytest.raises(ValueError, match="scored one by one, which a AntisymmetricComparator does"):
        text_model(encoder, groups(2), mirror)


def test_damage_inside_the_encoder_is_found(encoder, tmp_path):
    model = with_encoder(NET.build(embed(encoder, groups(2))), encoder)
    save(model, tmp_path / "made")
    (weights,) = (tmp_path / "made" / "encoder").rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match=r"encoder/.*model\.safetensors is not what was saved"):
        load(tmp_path / "made")
