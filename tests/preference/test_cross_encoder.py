"""Texts read together with their context: scores, training, saving, and what is refused."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from moefold.preference import ConsistentComparator, FitConfig, Groups, agreement, fit, load, save
from moefold.preference.cross_encoder import CrossEncoderScorer, cross_encoder_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "green", "big", "small", "a"]
COLOURS = ("red", "blue", "green")


def classifier(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **{"num_labels": 1, **changes},
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def tokenizer(tmp_path) -> Any:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=16)


def asked(count: int, *, seed: int = 0) -> Any:
    """Of three colours the one that the question names is right."""
    draw = torch.Generator().manual_seed(seed)
    right = torch.randint(0, 3, (count,), generator=draw).tolist()
    return Groups.of(
        [[f"a {word}" for word in COLOURS] for _ in right],
        context=[f"big {COLOURS[one]}" for one in right],
        chosen=right,
    )


def test_a_score_is_the_classifiers_of_context_and_candidate(tokenizer):
    model = classifier()
    scorer = CrossEncoderScorer(model, tokenizer)
    with torch.no_grad():
        found = scorer(["red", "a small green"], ["big", "a"])
        for row, pair in zip(found, [("big", "red"), ("a", "a small green")], strict=True):
            ids = ["[CLS]", *pair[0].split(), "[SEP]", *pair[1].split(), "[SEP]"]
            kinds = [0] * (2 + len(pair[0].split())) + [1] * (1 + len(pair[1].split()))
            alone = model(
                input_ids=torch.tensor([[WORDS.index(word) for word in ids]]),
                token_type_ids=torch.tensor([kinds]),
            )
            assert torch.allclose(row, alone.logits[0], atol=1e-5)  # padded, or not
        assert scorer([]).shape == (0, 1)
        assert not torch.allclose(scorer(["red"]), scorer(["red"], ["big"]), atol=1e-3)
        long = scorer(["red " * 40], ["big"])
        assert torch.allclose(long, scorer(["red " * 50], ["big"]), atol=1e-5)  # its end is cut off


def test_it_learns_what_only_both_texts_say_and_is_saved(tokenizer, tmp_path):
    model = cross_encoder_model(classifier(), tokenizer, loss="listwise")
    groups, apart = asked(60), asked(30, seed=1)
    before = float(agreement(model.values(apart), apart).mean())
    fit(model, groups, FitConfig(epochs=12, batch_size=10, learning_rate=5e-3))
    values = model.values(apart)
    assert float(agreement(values, apart).mean()) > 0.95 > 0.6 > before
    model.temperature = 1.5
    save(model, tmp_path / "saved")
    again: Any = load(tmp_path / "saved")
    assert torch.allclose(again.values(apart), values, atol=1e-5)
    weights = again.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert (again.loss, again.temperature) == ("listwise", 1.5)
    assert isinstance(again.comparator, ConsistentComparator)
    (tmp_path / "saved" / "encoder" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="is not what was saved"):
        load(tmp_path / "saved")


def test_refusals(tokenizer):
    with pytest.raises(ValueError, match="the model has 3 outputs; open it with num_labels=1"):
        CrossEncoderScorer(classifier(num_labels=3), tokenizer)
    with pytest.raises(ValueError, match="there is no token to pad them with; set tokenizer"):
        CrossEncoderScorer(classifier(pad_token_id=None), tokenizer)
    with pytest.raises(ValueError, match="unknown preference loss 'pairs'"):
        cross_encoder_model(classifier(), tokenizer, loss="pairs")
