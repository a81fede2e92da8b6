"""Folders that older versions saved open today, every bit as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

import moefold
from moefold.moe import MoE

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(place.name for place in GOLDEN.iterdir() if place.is_dir())

# The same weights on another processor: its kernels sum in another order. Of the largest output,
# some tens of roundings of float32 on a way of two layers.
ROUNDINGS = 64 * torch.finfo(torch.float32).eps


@pytest.fixture(params=FOLDERS)
def golden(request) -> Path:
    return GOLDEN / request.param


def output(model: nn.Module, pair: dict[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in pair.items() if name != "output"}
    with torch.no_grad():
        if isinstance(model, SentenceTransformer):
            return model(inputs)["sentence_embedding"]
        return model(**inputs)[0]


def test_there_is_one_of_every_kind():
    kinds = {json.loads((GOLDEN / f / "saved/moefold.json").read_text())["host"] for f in FOLDERS}
    assert kinds == {"bert", "sentence-transformer"}


def test_every_weight_is_that_of_the_file(golden):
    model = moefold.load(golden / "saved")
    stored = load_file(golden / "saved" / "model.safetensors")
    prefix = "0.model." if isinstance(model, SentenceTransformer) else ""
    found = {name.removeprefix(prefix): value for name, value in model.state_dict().items()}
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
    assert sum(isinstance(module, MoE) for module in model.modules()) == 1


def test_it_computes_what_it_did(golden):
    model = moefold.load(golden / "saved")
    pair = load_file(golden / "pair.safetensors")
    error = (output(model, pair) - pair["output"]).abs().max()
    assert error <= ROUNDINGS * pair["output"].abs().max()


def test_texts_come_out_as_they_did():
    place = GOLDEN / "v0-schema1-sentence-transformer"
    with safe_open(place / "pair.safetensors", framework="pt") as pair:
        texts, expected = json.loads(pair.metadata()["texts"]), pair.get_tensor("output")
    model = moefold.load(place / "saved")
    assert isinstance(model, SentenceTransformer)
    found = model.encode(texts, convert_to_tensor=True)
    assert isinstance(found, Tensor)
    assert (found - expected).abs().max() <= ROUNDINGS * expected.abs().max()


def test_saved_again_it_is_of_todays_form(golden, tmp_path):
    model = moefold.load(golden / "saved")
    moefold.save(model, tmp_path / "again")
    manifests = [
        json.loads((place / "moefold.json").read_text())
        for place in (golden / "saved", tmp_path / "again")
    ]
    assert manifests[1]["host"] in ("transformers", "sentence-transformer")
    assert manifests[1]["sites"] == manifests[0]["sites"]
    assert manifests[1]["source"] == manifests[0]["source"]
    old, new = (
        load_file(place / "model.safetensors") for place in (golden / "saved", tmp_path / "again")
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    again = moefold.load(tmp_path / "again")
    assert type(again) is type(model)
    assert moefold.UpcycleConfig.from_dict(manifests[0]["upcycle"]).birth.kind == "copies"


def test_a_golden_folder_that_was_touched_does_not_open(golden, tmp_path):
    # The folders in the repository are as they were written, or this and all of the above fail.
    shutil.copytree(golden / "saved", tmp_path / "touched")
    file = tmp_path / "touched" / "config.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ValueError, match=r"config.json is not what was saved"):
        moefold.load(tmp_path / "touched")
