"""A transformer inside somebody's own module: cut there, and still able to say what it is."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertConfig, BertModel

import moefold
from moefold import UpcycleConfig
from tests.surgery.hosts.cases import CASES


class Tagger(nn.Module):
    """An encoder with a head of its own; no library can build it from a config."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            initializer_range=0.3,
        )
        self.encoder = BertModel(config)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(input_ids).last_hidden_state)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(60, (2, 7))


def test_the_inner_model_is_signed(ids, tmp_path):
    model = Tagger().double().eval()
    config = model.encoder.config
    with torch.no_grad():
        before = model(ids)
        made = moefold.upcycle(model, inputs={"input_ids": ids})
        # Renormalised copies: float64 rounding, of outputs about 1.
        assert (model(ids) - before).abs().max() < 1e-12
    assert made.chosen == ("encoder.encoder.layer.1",)
    model.encoder.save_pretrained(tmp_path / "inner")
    inner = AutoModel.from_pretrained(tmp_path / "inner")
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(inner.state_dict()[name], value), name
    moefold.revert(model)
    assert model.encoder.config is config
    with torch.no_grad():
        assert torch.equal(model(ids), before)


def test_the_whole_is_loaded_into_a_dense_one(ids, tmp_path):
    model, dense = Tagger().eval(), Tagger()
    moefold.upcycle(model, inputs=False)
    moefold.save(model, tmp_path / "moe")
    loaded = moefold.load(tmp_path / "moe", into=dense)
    assert loaded is dense
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_tower_and_a_half_say_what_they_are(tmp_path):
    clip: Any = CASES["clip"].build()
    t5: Any = CASES["t5"].build()
    towers = {"tower": clip.text_model, "half": t5.encoder}
    before = {name: part.config for name, part in towers.items()}
    for model in (clip, t5):
        moefold.upcycle(model, UpcycleConfig(sites="all"), inputs=False)
    # As a whole, saved and loaded, and from there again: parts of a loaded model are signed too.
    moefold.save(clip, tmp_path / "clip")
    loaded: Any = moefold.load(tmp_path / "clip")
    loaded.text_model.save_pretrained(tmp_path / "tower")
    tower = AutoModel.from_pretrained(tmp_path / "tower")
    for name, value in clip.text_model.state_dict().items():
        assert torch.equal(tower.state_dict()[name].to(value), value), name
    assert set(t5.encoder.config.moefold["sites"]) == {"block.0", "block.1"}
    for model in (clip, t5):
        moefold.revert(model)
    assert all(part.config is before[name] for name, part in towers.items())
