"""The saved form of a rerouted model: the untouched checkpoint, the router, and what it learnt."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertModel, OlmoeForCausalLM

import moefold
from moefold import routers
from moefold.rerouting import load_rerouted, rerouting_of, save_rerouted
from moefold.rerouting.layer import REROUTER, Rerouter
from moefold.rerouting.saved import LEARNT, learnt_in, take_over
from moefold.surgery import saved
from moefold.surgery.encoder import sha256_of
from moefold.surgery.saved import REROUTED
from tests.rerouting.models import KINDS, build, texts
from tests.surgery.conftest import tiny_config

THRESHOLD = routers.config("threshold", budget=1.5)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    values, others = one.state_dict(), other.state_dict()
    assert list(values) == list(others)
    for name, value in values.items():
        assert value.dtype == others[name].dtype, name
        assert torch.equal(value, others[name]), name


def calibrated(kind: str = "olmoe", dtype: torch.dtype = torch.float32) -> nn.Module:
    # A kernel for bfloat16 wants rows of 16 bytes.
    width = {"moe_intermediate_size": 16} if "moe_intermediate_size" in KINDS[kind][1] else {}
    model = build(kind, **width).to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # which transformers keeps in float32
            buffer.data = buffer.data.float()
    moefold.reroute(model, THRESHOLD)
    moefold.calibrate(model, [texts(), texts()])
    return model


def test_what_is_in_the_folder(tmp_path):
    model = calibrated()
    untouched = {name for name in model.state_dict() if f".{REROUTER}." not in name}
    moefold.save(model, tmp_path / "one")
    assert {file.name for file in (tmp_path / "one").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *(REROUTED, LEARNT),
    }
    manifest = json.loads((tmp_path / "one" / REROUTED).read_text())
    assert manifest["schema"] == 1
    assert manifest["model"] == "OlmoeForCausalLM"
    assert manifest["router"] == {"name": "threshold", "settings": {"budget": 1.5}}
    assert manifest["faithful"] is False
    assert manifest["blocks"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    blocks = ("model.layers.0.mlp", "model.layers.1.mlp")
    learnt = load_file(tmp_path / "one" / LEARNT)
    assert sorted(learnt) == [f"{block}.router.state" for block in blocks]
    for block in blocks:
        rerouter = model.get_submodule(f"{block}.{REROUTER}")
        assert isinstance(rerouter, Rerouter)
        assert torch.equal(learnt[f"{block}.router.state"], rerouter.router.state)  # pyright: ignore
    # Without moefold it is the model it was: its class, its names, no word of ours.
    opened: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "one", output_loading_info=True, use_safetensors=True
    )
    plain, found = opened
    assert type(plain) is OlmoeForCausalLM
    assert not any(found.values())
    assert set(plain.state_dict()) == untouched
    assert "moefold" not in (tmp_path / "one" / "config.json").read_text()


@torch.no_grad()
def run(model: Any, inputs: dict) -> tuple[torch.Tensor, moefold.Record]:
    with moefold.record_routing(model) as record:
        return model(**inputs, use_cache=False).logits, record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_comes_back(kind, dtype, tmp_path):
    model, inputs = calibrated(kind, dtype), texts()
    moefold.save(model, tmp_path / "moe")
    loaded = moefold.load(tmp_path / "moe")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same_weights(model, loaded)
    assert rerouting_of(loaded) == rerouting_of(model)
    before, one = run(model, inputs)
    after, other = run(loaded, inputs)
    real = inputs["attention_mask"].bool()
    # The same weights at other addresses: a kernel may add in another order, no more. Logits of a
    # few units through two layers.
    assert torch.allclose(after[real], before[real], rtol=0, atol=64 * torch.finfo(dtype).eps)
    if dtype == torch.float32:
        for site, (routing,) in one.items():
            assert torch.equal(routing.chosen, other[site][0].chosen)  # pyright: ignore
    # What is loaded can be taken back, and then it is the model of the class.
    moefold.revert(loaded)
    moefold.revert(model)
    assert_same_weights(model, loaded)


def test_settings_come_back(tmp_path):
    model = build("mixtral")
    router = routers.config("unified", budget=1.25, alpha=0.25, max_experts=2)
    moefold.reroute(model, router, faithful=True)
    moefold.save(model, tmp_path / "moe")
    assert not (tmp_path / "moe" / LEARNT).exists()  # there is nothing to learn
    found = rerouting_of(moefold.load(tmp_path / "moe"))
    assert found is not None
    assert (found.config, found.faithful) == (router, True)
    model = build("mixtral")
    moefold.reroute(model, "token-choice")
    moefold.save(model, tmp_path / "moe")
    loaded = moefold.load(tmp_path / "moe")
    own = rerouting_of(loaded)
    assert own is not None
    assert own.config is None
    assert own.router == "the model's own top 2"


def test_a_predictor_comes_back(tmp_path):
    model = build("olmoe")
    moefold.reroute(model, routers.config("unified", budget=1.5, inference="predictor"))
    for value in learnt_in(model).values():
        value.normal_()  # it shares its memory with the predictor's
    moefold.save(model, tmp_path / "moe")
    loaded = moefold.load(tmp_path / "moe")
    assert any(".predictor." in name for name in learnt_in(loaded))
    assert_same_weights(model, loaded)


def test_saving_what_was_loaded_changes_nothing(tmp_path):
    moefold.save(calibrated(), tmp_path / "one")
    moefold.save(moefold.load(tmp_path / "one"), tmp_path / "two")
    for name in ("model.safetensors", LEARNT, REROUTED):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_shards_and_tied_weights_come_back(tmp_path):
    model = build("olmoe", tie_word_embeddings=True)
    moefold.reroute(model, THRESHOLD)
    moefold.save(model, tmp_path / "moe", max_shard_size="10KB")
    assert len(list((tmp_path / "moe").glob("model-*.safetensors"))) >= 3
    loaded: Any = moefold.load(tmp_path / "moe")
    assert_same_weights(model, loaded)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_one_kind_of_folder_replaces_the_other(tmp_path):
    bert = BertModel(tiny_config()).eval()
    moefold.upcycle(bert, moefold.UpcycleConfig())
    moefold.save(calibrated(), tmp_path / "moe")
    moefold.save(bert, tmp_path / "moe")
    assert isinstance(moefold.load(tmp_path / "moe"), BertModel)
    assert not (tmp_path / "moe" / REROUTED).exists()
    moefold.save(calibrated(), tmp_path / "moe")
    assert type(moefold.load(tmp_path / "moe")) is OlmoeForCausalLM


def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch):
    model = calibrated()
    moefold.save(model, tmp_path / "moe")
    before = {file.name: sha256_of(file) for file in (tmp_path / "moe").iterdir()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "_sync", fail)
    moefold.reroute(other := build("olmoe"), THRESHOLD)
    with pytest.raises(OSError, match="No space left"):
        moefold.save(other, tmp_path / "moe")
    assert {file.name: sha256_of(file) for file in (tmp_path / "moe").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["moe"]


def test_between_two_renames_the_old_folder_is_found(tmp_path):
    # Where a system cannot exchange folders, a process may die after it moved the old one away.
    moefold.save(calibrated(), tmp_path / "moe")
    place = tmp_path / ".moe.moefold-abc"
    place.mkdir()
    (tmp_path / "moe").rename(place / "old-00")
    assert type(moefold.load(tmp_path / "moe")) is OlmoeForCausalLM


def edit(folder: Path, **changes: object) -> None:
    file = folder / REROUTED
    manifest = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in manifest.items() if v != "gone"}))


def rehash(folder: Path) -> None:
    names = [file.name for file in folder.iterdir() if file.name != REROUTED]
    edit(folder, files={name: sha256_of(folder / name) for name in names})


def altered(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def altered_thresholds(folder: Path) -> None:
    learnt = load_file(folder / LEARNT)
    save_file({name: value + 1 for name, value in learnt.items()}, folder / LEARNT)


def one_threshold_too_few(folder: Path) -> None:
    learnt = load_file(folder / LEARNT)
    learnt.popitem()
    save_file(learnt, folder / LEARNT)
    rehash(folder)


def no_thresholds(folder: Path) -> None:
    (folder / LEARNT).unlink()
    rehash(folder)


def thresholds_of_another_shape(folder: Path) -> None:
    learnt = load_file(folder / LEARNT)
    save_file({name: torch.zeros(6) for name in learnt}, folder / LEARNT)
    rehash(folder)


def cut_off(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    rehash(folder)


def a_weight_is_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    rehash(folder)


def fewer_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    rehash(folder)


def a_file_more(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def newer(folder: Path) -> None:
    edit(folder, schema=2, moefold="9.0")


def unknown_router(folder: Path) -> None:
    edit(folder, router={"name": "unfied", "settings": {}})


def unknown_setting(folder: Path) -> None:
    edit(folder, router={"name": "unified", "settings": {"bugdet": 2}})


def too_large_a_budget(folder: Path) -> None:
    edit(folder, router={"name": "unified", "settings": {"budget": 7}})


def router_as_a_text(folder: Path) -> None:
    edit(folder, router="unified")


def faithful_as_a_text(folder: Path) -> None:
    edit(folder, faithful="no")


def no_blocks(folder: Path) -> None:
    edit(folder, blocks="gone")


def garbled(folder: Path) -> None:
    (folder / REROUTED).write_text("{")


DAMAGE = {
    altered: r"model.safetensors is not what was saved: .* moefold_rerouting.json says",
    altered_thresholds: r"moefold_rerouting.safetensors is not what was saved",
    one_threshold_too_few: r"what was learnt is not that of these routers: model.layers.*missing",
    no_thresholds: r"model.layers.0.mlp.router.state, model.layers.1.mlp.router.state missing",
    thresholds_of_another_shape: r"model.layers.0.mlp.router.state, .* of another shape; reroute",
    cut_off: r"cannot open .*moe",
    a_weight_is_missing: r"not those of the OlmoeForCausalLM .*'missing_keys': \['model.norm",
    fewer_layers: r"lists the blocks .*'model.layers.1.mlp'\], the model has \['model.layers.0",
    a_file_more: r"holds adapter_config.json, which moefold_rerouting.json does not list",
    newer: r"has schema 2, written by moefold 9.0; this is .* reads up to 1: upgrade moefold",
    unknown_router: r"moefold_rerouting.json: unknown router 'unfied'",
    unknown_setting: r"router 'unified' has no setting 'bugdet'. Did you mean 'budget'",
    too_large_a_budget: r"moefold_rerouting.json: model.layers.0.mlp: budget is 7",
    router_as_a_text: r"'router' is 'unified', it must be a router with its settings, or null for",
    faithful_as_a_text: r"'faithful' is 'no', it must be true or false; save the model again",
    no_blocks: r"moefold_rerouting.json lacks blocks; save the model again",
    garbled: r"moefold_rerouting.json is not a manifest of moefold \(JSONDecodeError",
}


@pytest.mark.parametrize("spoil", DAMAGE, ids=lambda spoil: spoil.__name__)
def test_damage_is_noticed(tmp_path, spoil):
    moefold.save(calibrated(), tmp_path / "moe")
    spoil(tmp_path / "moe")
    with pytest.raises(ValueError, match=DAMAGE[spoil]):
        moefold.load(tmp_path / "moe")


def test_refusals(tmp_path):
    model = build("olmoe")
    with pytest.raises(ValueError, match=r"OlmoeForCausalLM is not rerouted; call moefold.reroute"):
        save_rerouted(model, tmp_path / "moe")
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"plain has no moefold_rerouting.json: "):
        load_rerouted(tmp_path / "plain")
    moefold.reroute(model, THRESHOLD)
    with pytest.raises(ValueError, match=r"plain is not empty and was not written by moefold"):
        moefold.save(model, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"max_shard_size is 'big'; it must be a number of bytes"):
        moefold.save(model, tmp_path / "moe", max_shard_size="big")
    moefold.save(model, tmp_path / "moe")
    with pytest.raises(ValueError, match=r"moe holds a rerouted model, .* leave `into` out"):
        moefold.load(tmp_path / "moe", into=build("olmoe"))

    class Mine(OlmoeForCausalLM):
        pass

    mine = Mine(model.config)
    moefold.reroute(mine, THRESHOLD)
    with pytest.raises(ValueError, match=r"a Mine is of no class of transformers, by which its"):
        moefold.save(mine, tmp_path / "mine")
    moefold.revert(model)
    assert rerouting_of(model) is None  # it remembers nothing
    with pytest.raises(ValueError, match=r"what was learnt .*: a, b left over; reroute with the"):
        take_over(mine, {**learnt_in(mine), "a": torch.zeros(1), "b": torch.zeros(1)})
