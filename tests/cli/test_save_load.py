"""`moefold save` and `moefold load`: a checkpoint becomes a folder that says what it is."""

import pytest
import torch
from transformers import BertConfig, BertModel

import moefold
from moefold import MoEConfig, UpcycleConfig
from moefold.cli import main


@pytest.fixture
def model() -> BertModel:
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
    )
    made = BertModel(config).eval()
    moefold.upcycle(made, UpcycleConfig(moe=MoEConfig(num_experts=3)))
    return made


def test_a_checkpoint_becomes_a_saved_folder(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "checkpoint")  # as a trainer does: no manifest
    with pytest.raises(ValueError, match=r"no moefold.json: a trainer's checkpoint"):
        moefold.load(tmp_path / "checkpoint")
    assert main(["save", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "moe")]) == 0
    loaded = moefold.load(tmp_path / "moe")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    again = ["save", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "moe")]
    assert main(again) == 2
    assert "holds an upcycled model; add --force" in capsys.readouterr().err
    assert main([*again, "--force"]) == 0


def test_load_says_what_it_is(model, tmp_path, capsys):
    moefold.save(model, tmp_path / "moe")
    assert main(["load", str(tmp_path / "moe")]) == 0
    shown = capsys.readouterr().out
    assert "every file is as it was saved" in shown
    assert "+ encoder.layer.1  3 experts of width 24, token-choice(k=2, renormalize=True)" in shown
    # The receipt of the surgery was saved with it.
    assert "measured               on random tokens" in shown
    assert "experts alike 1.000" in shown


def test_load_notices_a_change(model, tmp_path, capsys):
    moefold.save(model, tmp_path / "moe")
    with (tmp_path / "moe" / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert main(["load", str(tmp_path / "moe")]) == 2
    assert "is not what was saved: its sha256 is" in capsys.readouterr().err


def test_save_refuses_what_is_no_checkpoint_of_a_mixture(model, tmp_path, capsys):
    def save(folder: str) -> str:
        assert main(["save", str(tmp_path / folder), "--out", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "no folder at" in save("nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no model of transformers" in save("empty")
    moefold.revert(model)
    model.save_pretrained(tmp_path / "dense")
    assert "holds a dense model of type 'bert'; call moefold upcycle" in save("dense")
