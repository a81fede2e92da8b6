"""A saved model comes back bit by bit, or the folder says what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moefold import routers
from moefold.preference import (
    AntisymmetricComparator,
    ConsistentComparator,
    Groups,
    NetConfig,
    PreferenceConfig,
    PreferenceModel,
    load,
    pair_nets,
    save,
    scorers,
)
from moefold.preference.saved import MANIFEST, is_saved

NETS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"hidden": 5, "activation": "relu"},
    "mixture": {"num_experts": 3, "router": routers.config("token-choice", k=2), "over": "context"},
    "mirror": {"hidden": 4},
    "pair-mlp": {"hidden": 4},
}
KIND = {"mirror": "antisymmetric", "pair-mlp": "free"}


def groups() -> Groups:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 2, 4])
    return Groups(
        candidates=torch.randn(9, 3, generator=draw) * 5 + 1,
        lengths=lengths,
        chosen=torch.tensor([0, 1, 3]),
        context=torch.randn(3, 2, generator=draw),
    )


def built(name: str = "mlp") -> PreferenceModel:
    torch.manual_seed(3)
    config = PreferenceConfig(
        net=NetConfig(name, NETS[name]),
        comparator=KIND.get(name, "consistent"),
        loss_settings={"margin": 0.25},
        standardize=True,
    )
    model = config.build(groups())
    model.temperature = 0.1 + 0.2
    return model


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@pytest.mark.parametrize("name", [*scorers.names(), *pair_nets.names()])
def test_every_built_in_net_comes_back_bit_by_bit(name, tmp_path):
    model = built(name)
    save(model, tmp_path / "made")
    again = load(tmp_path / "made")
    assert same_bits(model, again)
    assert torch.equal(model.values(groups()), again.values(groups()))
    assert again.temperature == model.temperature
    assert again.preference_config == model.preference_config
    assert (again.loss, again.loss_settings) == ("pair-logistic", {"margin": 0.25})
    assert not again.training
    # Saved again, it is the same files.
    save(again, tmp_path / "twice")
    for file in ("model.safetensors", MANIFEST):
        assert (tmp_path / "made" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


def test_a_model_in_float64_stays_in_it(tmp_path):
    model = built().double()
    save(model, tmp_path / "made")
    assert same_bits(model, load(tmp_path / "made"))


class Own(nn.Module):
    def __init__(self, hidden: int = 2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_a_scorer_of_ones_own(tmp_path):
    model = PreferenceModel(ConsistentComparator(Own()), loss="listwise")
    save(model, tmp_path / "made")
    again = load(tmp_path / "made", scorer=Own())
    assert same_bits(model, again)
    assert again.loss == "listwise"
    # Or the comparator around it.
    assert same_bits(model, load(tmp_path / "made", scorer=ConsistentComparator(Own())))
    with pytest.raises(ValueError, match=r"made holds a model whose scorer is not of moefold;"):
        load(tmp_path / "made")
    words = r"are not those of the ConsistentComparator that they are for: comparator\.scorer\.net"
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "made", scorer=Own(hidden=3))
    words = "are not those of the AntisymmetricComparator that they are for"
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "made", scorer=AntisymmetricComparator(Own()))
    save(built(), tmp_path / "built")
    with pytest.raises(ValueError, match="is built from its own config; leave out scorer"):
        load(tmp_path / "built", scorer=Own())


def test_a_folder_is_replaced_as_a_whole_and_never_a_foreign_one(tmp_path, monkeypatch):
    folder = tmp_path / "made"
    save(built("mlp"), folder)
    (folder / "page.html").write_text("what was written beside it")
    assert same_bits(load(folder), built("mlp"))  # a page does no harm
    save(built("linear"), folder)
    assert same_bits(load(folder), built("linear"))
    assert {file.name for file in folder.iterdir()} == {MANIFEST, "model.safetensors"}
    assert [file.name for file in tmp_path.iterdir()] == ["made"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            save(built("mlp"), folder)
    assert same_bits(load(folder), built("linear"))
    assert [file.name for file in tmp_path.iterdir()] == ["made"]
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_text("meow")
    with pytest.raises(ValueError, match=r"photos is not empty and holds no model of preferences"):
        save(built(), foreign)
    with pytest.raises(ValueError, match=r"cat\.jpg is a file; give a folder"):
        save(built(), foreign / "cat.jpg")
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="made is the current directory; give a folder inside it"):
        save(built(), ".")
    with pytest.raises(ValueError, match="is above the current directory"):
        save(built(), tmp_path)
    assert (foreign / "cat.jpg").read_text() == "meow"


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    folder = tmp_path / "made"
    with pytest.raises(ValueError, match=r"no folder at .*made; give one that"):
        load(folder)
    folder.mkdir()
    with pytest.raises(ValueError, match=f"made has no {MANIFEST}: it holds no model"):
        load(folder)
    assert not is_saved(folder)
    save(built(), folder)
    assert is_saved(folder)
    weights = folder / "model.safetensors"
    whole, told = weights.read_bytes(), (folder / MANIFEST).read_text()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was saved: its sha256"):
        load(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"made lacks model\.safetensors, which moefold_pref"):
        load(folder)
    weights.write_bytes(whole)

    def manifest(**changes: Any) -> None:
        (folder / MANIFEST).write_text(json.dumps({**json.loads(told), **changes}))

    manifest(schema=2)
    with pytest.raises(ValueError, match=r"has schema 2, written by moefold .* reads up to 1: up"):
        load(folder)
    manifest(model={"net": {"name": "mlp"}, "novelty": 1})
    with pytest.raises(ValueError, match=r"preference\.json describes no model \(.*novelty"):
        load(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"preference\.json is no manifest \("):
        load(folder)
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match=r"lacks encoder, files, loss, loss_settings, model, sch"):
        load(folder)
    (folder / MANIFEST).write_text(told)
    assert same_bits(load(folder), built())


def test_nothing_but_safetensors_and_json(tmp_path):
    save(built(), tmp_path / "made")
    suffixes = {file.suffix for file in Path(tmp_path).rglob("*") if file.is_file()}
    assert suffixes == {".json", ".safetensors"}
