"""The saved form: every bit comes back, damage is noticed, a crash leaves the old or the new."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
)

import moefold
from moefold import MoE, MoEConfig, UpcycleConfig, routers
from moefold.surgery import saved
from moefold.surgery.hosts import auto
from moefold.surgery.hosts.layer import is_moe_layer
from tests.surgery.conftest import tiny_config


def upcycled(model: nn.Module, router: str = "token-choice", **settings: object) -> nn.Module:
    moe = MoEConfig(num_experts=4, router=routers.config(router, **settings))
    moefold.upcycle(model, UpcycleConfig(moe=moe))
    return model


def test_a_model_without_a_pooler_comes_back_without_one(tmp_path):
    model = upcycled(BertModel(tiny_config(), add_pooling_layer=False).eval())
    moefold.save(model, tmp_path / "moe")
    loaded = moefold.load(tmp_path / "moe")
    assert_same_weights(model, loaded)
    assert not any(name.startswith("pooler") for name in loaded.state_dict())


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    values, others = one.state_dict(), other.state_dict()
    assert list(values) == list(others)
    for name, value in values.items():
        assert value.dtype == others[name].dtype, name
        assert torch.equal(value, others[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("router", ["token-choice", "soft", "bias-balanced", "cosine", "threshold"])
def test_every_bit_comes_back(tiny, batch, tmp_path, router, dtype):
    model = upcycled(tiny(), router).to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("router.state"):
            buffer.uniform_()  # as training would leave it; float32 bits that bfloat16 has not
    moefold.save(model, tmp_path / "moe")
    loaded = moefold.load(tmp_path / "moe")
    assert isinstance(loaded, BertModel)
    assert type(loaded) is auto.MoefoldBertModel
    assert not loaded.training
    assert_same_weights(model, loaded)
    layer = loaded.encoder.layer[3]
    assert is_moe_layer(layer)
    moe = layer.get_submodule("moe")
    assert isinstance(moe, MoE)
    assert moe.site == "encoder.layer.3"
    with torch.no_grad():
        # The same weights at other addresses: a kernel may add in another order, no more.
        change = (model(**batch)[0] - loaded(**batch)[0]).abs().max()
    assert change <= 16 * torch.finfo(dtype).eps


def test_saving_what_was_loaded_changes_nothing(tiny, tmp_path):
    model = upcycled(tiny())
    moefold.save(model, tmp_path / "one")
    moefold.save(moefold.load(tmp_path / "one"), tmp_path / "two")
    assert_same_weights(model, moefold.load(tmp_path / "two"))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    manifests = [json.loads((tmp_path / n / "moefold.json").read_text()) for n in ("one", "two")]
    for key in ("host", "upcycle", "sites", "source"):
        assert manifests[0][key] == manifests[1][key]


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
def test_heads_come_back_with_their_class(tiny, tmp_path, kind):
    model = upcycled(kind(tiny().config).eval())
    moefold.save(model, tmp_path / "moe")
    loaded = moefold.load(tmp_path / "moe")
    assert type(loaded).__name__ == f"Moefold{kind.__name__}"
    assert_same_weights(model, loaded)


def test_the_folder_is_json_and_safetensors(tiny, tmp_path):
    moefold.save(upcycled(tiny()), tmp_path / "moe")
    names = {file.name for file in (tmp_path / "moe").iterdir()}
    assert names == {"config.json", "model.safetensors", "moefold.json"}
    manifest = json.loads((tmp_path / "moe" / "moefold.json").read_text())
    assert manifest["schema"] == 1
    assert manifest["host"] == "transformers"
    assert manifest["sites"] == ["encoder.layer.1", "encoder.layer.3"]
    config = UpcycleConfig.from_dict(manifest["upcycle"])
    assert config.moe.num_experts == 4
    assert list(tmp_path.iterdir()) == [tmp_path / "moe"]  # and nothing is left beside it


def test_transformers_opens_the_folder(tiny, tmp_path):
    model = upcycled(tiny())
    moefold.save(model, tmp_path / "moe")
    opened = AutoModel.from_pretrained(tmp_path / "moe")
    assert isinstance(opened, auto.MoefoldBertModel)
    assert_same_weights(model, opened)


def test_a_body_can_be_taken_out_of_a_head(tiny, tmp_path):
    model = upcycled(BertForMaskedLM(tiny().config).eval())
    moefold.save(model, tmp_path / "moe")
    assert isinstance(
        AutoModelForMaskedLM.from_pretrained(tmp_path / "moe"), auto.MoefoldBertForMaskedLM
    )
    body = AutoModel.from_pretrained(tmp_path / "moe", add_pooling_layer=False)
    assert_same_weights(model.get_submodule("bert"), body)


def test_a_trainers_checkpoint_says_what_it_is(tiny, tmp_path):
    # Trainers call save_pretrained themselves: what they write must not pass for a dense BERT.
    model = upcycled(tiny())
    assert isinstance(model, BertModel)
    model.save_pretrained(tmp_path / "checkpoint")
    assert_same_weights(model, AutoModel.from_pretrained(tmp_path / "checkpoint"))
    with pytest.raises(
        ValueError, match=r"has no moefold.json: a trainer's checkpoint of an upcyc"
    ):
        moefold.load(tmp_path / "checkpoint")


def test_without_moefold_the_folder_does_not_open(tiny, tmp_path):
    moefold.save(upcycled(tiny()), tmp_path / "moe")
    code = (
        "import sys, transformers\n"
        "try: transformers.AutoModel.from_pretrained(sys.argv[1])\n"
        "except ValueError as error: print('moefold_bert' in str(error))\n"
        "print('moefold' in sys.modules)\n"
        "transformers.BertModel.from_pretrained(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "moe")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "False"]
    # Nor does it pass for a BERT where somebody insists.
    assert "model of type `moefold_bert` to instantiate a model of type `bert`" in done.stderr
    assert re.search(r"intermediate\.dense\.weight.*MISSING", done.stderr)


def test_a_trainer_of_sentence_transformers_can_go_on_from_its_checkpoint(minilm, tmp_path):
    moefold.upcycle(minilm, UpcycleConfig(sites="last:1"))
    minilm.save_pretrained(str(tmp_path / "checkpoint"))
    again = SentenceTransformer(str(tmp_path / "checkpoint"))
    assert_same_weights(minilm, again)
    assert minilm.load_state_dict(again.state_dict()).missing_keys == []


def test_a_sentence_transformer_comes_back_whole(minilm, tmp_path):
    texts = ["a cat", "two dogs and a very long story about them"]
    before = minilm.encode(texts, convert_to_tensor=True)
    made = moefold.upcycle(minilm)
    assert made.chosen == tuple(f"0.model.encoder.layer.{i}" for i in (1, 3, 5))
    after = minilm.encode(texts, convert_to_tensor=True)
    # Unit vectors in float32: 1e-6 is about eight units in the last place of 1.
    assert (after - before).norm(dim=1).max() < 2e-6
    moefold.save(minilm, tmp_path / "moe")
    for loaded in (moefold.load(tmp_path / "moe"), SentenceTransformer(str(tmp_path / "moe"))):
        assert isinstance(loaded, SentenceTransformer)
        assert_same_weights(minilm, loaded)
        assert loaded.max_seq_length == minilm.max_seq_length == 256
        again = loaded.encode(texts, convert_to_tensor=True)
        assert (again - after).norm(dim=1).max() < 2e-6
    named = moefold.load(tmp_path / "moe").get_submodule("0.model.encoder.layer.5.moe")
    assert named.site == "0.model.encoder.layer.5"
    source = json.loads((tmp_path / "moe" / "moefold.json").read_text())["source"]
    assert source["name"] == "minilm"
    assert len(source["sha256"]["model.safetensors"]) == 64
    moefold.revert(minilm)
    assert torch.equal(minilm.encode(texts, convert_to_tensor=True), before)


def test_a_dense_model_is_not_saved(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"BertModel is not upcycled; call moefold.upcycle"):
        moefold.save(tiny(), tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_folders_of_others_are_not_replaced(tiny, tmp_path):
    model = upcycled(tiny())
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("ten years")
    with pytest.raises(ValueError, match=r"home is not empty and was not written by moefold"):
        moefold.save(model, tmp_path / "home")
    with pytest.raises(ValueError, match=r"thesis.txt is a file; give a folder"):
        moefold.save(model, tmp_path / "home" / "thesis.txt")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "ten years"
    (tmp_path / "empty").mkdir()
    moefold.save(model, tmp_path / "empty")
    assert_same_weights(model, moefold.load(tmp_path / "empty"))


def test_a_loaded_model_has_nothing_to_revert_to(tiny_folder, tmp_path):
    model = BertModel.from_pretrained(tiny_folder)
    moefold.save(upcycled(model), tmp_path / "moe")
    with pytest.raises(ValueError, match=r"not the dense MLPs .* load the dense model .*: dense"):
        moefold.revert(moefold.load(tmp_path / "moe"))


def test_a_config_without_its_entry_describes_nothing():
    with pytest.raises(ValueError, match="MoefoldBertConfig without its `moefold` entry"):
        auto.MoefoldBertModel(auto.MoefoldBertConfig(num_hidden_layers=1, hidden_size=12))


# Damage. Each of these spoils a good folder in one way.


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def flip_a_bit(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))


def edit_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 3'))


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_manifest(folder: Path) -> None:
    (folder / "moefold.json").unlink()


def garble_manifest(folder: Path) -> None:
    (folder / "moefold.json").write_text('{"schema": 1')


def change_manifest(folder: Path, **entries: object) -> None:
    file = folder / "moefold.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def from_the_future(folder: Path) -> None:
    change_manifest(folder, schema=2, moefold="9.0")


def other_sites(folder: Path) -> None:
    change_manifest(folder, sites=["encoder.layer.0"])


def unknown_host(folder: Path) -> None:
    change_manifest(folder, host="brat")


def files_as_a_list(folder: Path) -> None:
    change_manifest(folder, files=[])


def hash_as_a_number(folder: Path) -> None:
    change_manifest(folder, files={"config.json": 3})


def host_as_a_number(folder: Path) -> None:
    change_manifest(folder, host=3)


def sites_as_a_text(folder: Path) -> None:
    change_manifest(folder, sites="encoder")


def schema_as_a_text(folder: Path) -> None:
    change_manifest(folder, schema="first")


def manifest_as_a_list(folder: Path) -> None:
    (folder / "moefold.json").write_text("[]")


def no_sites_in_the_config(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"moefold": 3}))
    rehash(folder)


def drop_key(folder: Path) -> None:
    (folder / "moefold.json").write_text('{"schema": 1, "host": "bert", "files": {}}')


def rehash(folder: Path) -> None:
    """What somebody does who edits a file and the manifest too."""
    names = json.loads((folder / "moefold.json").read_text())["files"]
    change_manifest(folder, files={name: saved.sha256_of(folder / name) for name in names})


def lose_a_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.1.moe.router.weight"]
    save_file(weights, file, {"format": "pt"})
    rehash(folder)


def shrink_a_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["encoder.layer.1.moe.router.weight"] = torch.zeros(3, 16)
    save_file(weights, file, {"format": "pt"})
    rehash(folder)


def truncate_and_rehash(folder: Path) -> None:
    truncate(folder)
    rehash(folder)


def become_dense(folder: Path) -> None:
    BertConfig(num_hidden_layers=4).save_pretrained(folder)
    rehash(folder)


DAMAGE = {
    truncate: r"model.safetensors is not what was saved: its sha256 is [0-9a-f]{64}, .* says",
    flip_a_bit: "model.safetensors is not what was saved",
    edit_config: "config.json is not what was saved",
    lose_weights: r"lacks model.safetensors, which moefold.json lists",
    lose_manifest: "has no moefold.json: a trainer's checkpoint",
    garble_manifest: r"moefold.json is not a manifest of moefold \(JSONDecodeError",
    from_the_future: r"has schema 2, written by moefold 9.0; .* reads up to 1: upgrade moefold",
    other_sites: r"lists the sites \['encoder.layer.0'\], config.json \['encoder.layer.1', 'enc",
    unknown_host: "unknown host 'brat'; Registered: plain, sentence-transformer",
    files_as_a_list: r"moefold.json: 'files' is \[\], it must be a mapping from file names to has",
    hash_as_a_number: "'files' is .* it must be a mapping",
    host_as_a_number: "'host' is 3, it must be a name; save the model again",
    sites_as_a_text: "'sites' is 'encoder', it must be a list of names",
    schema_as_a_text: "'schema' is 'first', it must be a number",
    manifest_as_a_list: r"moefold.json is not a manifest of moefold \(TypeError",
    no_sites_in_the_config: "cannot open .*moe: ",
    drop_key: "moefold.json lacks sites; save the model again",
    lose_a_tensor: r"not those of the model .*missing_keys.*encoder.layer.1.moe.router.weight",
    shrink_a_tensor: r"encoder.layer.1.moe.router.weight",
    truncate_and_rehash: "cannot open .*incomplete metadata|cannot open",
    become_dense: r"describes a PreTrainedModel of type 'bert'; it must be a model of",
}


@pytest.mark.parametrize("spoil", DAMAGE, ids=lambda spoil: spoil.__name__)
def test_damage_is_noticed(tiny, tmp_path, spoil):
    folder = tmp_path / "moe"
    moefold.save(upcycled(tiny()), folder)
    moefold.load(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=DAMAGE[spoil]):
        moefold.load(folder)


def test_not_a_saved_folder(tiny_folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"no folder at .*nowhere; give one that moefold.save wrote"
    ):
        moefold.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no moefold.json: a dense model of type 'bert'; open it"):
        moefold.load(tiny_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no moefold.json: it holds no model"):
        moefold.load(tmp_path / "empty")


# Shards. A model that is larger than one file may be, here 20 kB, is several, with an index.


def save_in_shards(model: nn.Module, folder: Path) -> list[str]:
    moefold.save(model, folder, max_shard_size="20KB")
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(shards) >= 3
    return shards


@pytest.mark.parametrize("size", ["20KB", 20_000, " 0.02 mb"])
def test_shards_come_back(tiny, tmp_path, size):
    model = upcycled(BertForMaskedLM(tiny().config).eval())
    moefold.save(model, tmp_path / "moe", max_shard_size=size)
    shards = [file for file in (tmp_path / "moe").iterdir() if file.suffix == ".safetensors"]
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())
    assert {file.name for file in shards} == set(index["weight_map"].values())
    for file in shards:
        sizes = [value.nbytes for value in load_file(file).values()]
        assert sum(sizes) <= 20_000
    assert_same_weights(model, moefold.load(tmp_path / "moe"))
    assert_same_weights(model, AutoModelForMaskedLM.from_pretrained(tmp_path / "moe"))
    files = json.loads((tmp_path / "moe" / "moefold.json").read_text())["files"]
    assert {file.name for file in shards} | {"model.safetensors.index.json"} <= set(files)


def test_a_sentence_transformer_in_shards(projected, tmp_path):
    save_in_shards(upcycled(projected), tmp_path / "moe")
    assert_same_weights(projected, moefold.load(tmp_path / "moe"))
    assert_same_weights(projected, SentenceTransformer(str(tmp_path / "moe"), device="cpu"))
    moefold.save(projected, tmp_path / "whole")  # the size is that of one save, not the model's
    assert (tmp_path / "whole" / "model.safetensors").is_file()


def test_from_shards_to_one_file_and_back(tiny, tmp_path):
    old, new = upcycled(tiny()), upcycled(tiny(), "soft")
    shards = save_in_shards(old, tmp_path / "moe")
    moefold.save(new, tmp_path / "moe")
    assert not any((tmp_path / "moe" / name).exists() for name in shards)
    assert_same_weights(new, moefold.load(tmp_path / "moe"))
    save_in_shards(old, tmp_path / "moe")
    assert not (tmp_path / "moe" / "model.safetensors").exists()
    assert_same_weights(old, moefold.load(tmp_path / "moe"))


def move_in_the_index(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first, *_, last = index["weight_map"]
    index["weight_map"][first] = index["weight_map"][last]
    file.write_text(json.dumps(index))


def lose_from_the_index(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    lost = next(n for n, f in index["weight_map"].items() if f.startswith("model-00001"))
    there = index["weight_map"][lost]
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != there}
    file.write_text(json.dumps(index))
    rehash(folder)


def lose_the_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def flip_a_bit_of_the_second(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def add_a_shard(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "model-00009-of-00009.safetensors")


SHARD_DAMAGE = {
    move_in_the_index: "model.safetensors.index.json is not what was saved: its sha256 is",
    lose_from_the_index: r"the weights in .* are not those of the model it describes: .*missing",
    lose_the_index: "lacks model.safetensors.index.json, which moefold.json lists",
    flip_a_bit_of_the_second: r"model-00002-of-0000\d.safetensors is not what was saved",
    add_a_shard: r"holds model-00009-of-00009.safetensors, which moefold.json does not list",
}


@pytest.mark.parametrize("spoil", SHARD_DAMAGE, ids=lambda spoil: spoil.__name__)
def test_damage_to_shards_is_noticed(tiny, tmp_path, spoil):
    save_in_shards(upcycled(tiny()), tmp_path / "moe")
    spoil(tmp_path / "moe")
    with pytest.raises(ValueError, match=SHARD_DAMAGE[spoil]):
        moefold.load(tmp_path / "moe")


@pytest.mark.parametrize("size", [0, -1, True, "5", "0GB", "many GB", "5 potatoes"])
def test_what_is_no_size(tiny, tmp_path, size):
    with pytest.raises(ValueError, match=r"max_shard_size is .*; it must be a number of bytes, or"):
        moefold.save(upcycled(tiny()), tmp_path / "moe", max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_no_library_is_one_file(tmp_path):
    from transformers.models.bert.modeling_bert import BertEncoder

    model = BertEncoder(tiny_config())  # a module like any other, with layers of a known form
    moefold.upcycle(model, inputs=False)
    with pytest.raises(ValueError, match=r"max_shard_size is 10, but a BertEncoder is of no libr"):
        moefold.save(model, tmp_path / "moe", max_shard_size=10)
    assert list(tmp_path.iterdir()) == []


# Crashes.


@pytest.mark.parametrize("step", ["_sync", "_put_in_place", "_exchange", "sha256_of"])
def test_a_failed_save_leaves_the_old_folder(tiny, tmp_path, monkeypatch, step):
    old, new = upcycled(tiny()), upcycled(tiny())
    moefold.save(old, tmp_path / "moe")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(saved, step, fail)
    with pytest.raises(OSError, match="disk full"):
        moefold.save(new, tmp_path / "moe")
    monkeypatch.undo()
    assert_same_weights(old, moefold.load(tmp_path / "moe"))
    assert list(tmp_path.iterdir()) == [tmp_path / "moe"]


@pytest.mark.parametrize("exchange", [True, False])
def test_saving_again_replaces_everything(tiny, tmp_path, monkeypatch, exchange):
    if not exchange:  # as on a system that cannot swap two folders
        monkeypatch.setattr(saved, "_exchange", lambda *_: False)
    old, new = upcycled(tiny()), upcycled(tiny(), "soft")
    moefold.save(old, tmp_path / "moe")
    (tmp_path / "moe" / "left.txt").write_text("from an older version")
    moefold.save(new, tmp_path / "moe")
    assert_same_weights(new, moefold.load(tmp_path / "moe"))
    assert not (tmp_path / "moe" / "left.txt").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "moe"]


def test_between_two_renames_the_old_folder_is_found(tiny, tmp_path, monkeypatch):
    old, new = upcycled(tiny()), upcycled(tiny())
    folder = tmp_path / "moe"
    moefold.save(old, folder)
    monkeypatch.setattr(saved, "_exchange", lambda *_: False)
    rename, calls = Path.rename, []

    def die_at_the_second(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        moefold.save(new, folder)
    monkeypatch.undo()
    assert not folder.exists()
    assert_same_weights(old, moefold.load(folder))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_killed_at_any_moment(tiny, tmp_path):
    # Children save the second model over the first and are killed after a random time, some before,
    # some in the middle, some after. What is there then is one of the two, whole.
    old, new = upcycled(tiny()), upcycled(tiny(), "expert-choice")
    folder = tmp_path / "moe"
    start = time.perf_counter()
    moefold.save(new, folder)
    takes = time.perf_counter() - start
    moefold.save(old, folder)
    seen = []
    for _ in range(12):
        child = os.fork()
        if child == 0:
            try:
                moefold.save(new, folder)
            finally:
                os._exit(0)
        time.sleep(random.uniform(0, 1.2 * takes))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = moefold.load(folder)
        is_new = "expert-choice" in (folder / "moefold.json").read_text()
        assert_same_weights(new if is_new else old, found)
        seen.append(is_new)
        moefold.save(old, folder)
    assert len(seen) == 12


def test_what_a_killed_process_left_is_swept_when_it_is_old(tiny, tmp_path):
    folder = tmp_path / "moe"
    fresh, stale = tmp_path / ".moe.moefold-a", tmp_path / ".moe.moefold-b"
    for place in (fresh, stale):
        (place / "new").mkdir(parents=True)
        (place / "new" / "model.safetensors").write_text("half of")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(stale, (two_days_ago, two_days_ago))
    moefold.save(upcycled(tiny()), folder)
    moefold.load(folder)
    # The fresh one may belong to a process that is still writing.
    assert sorted(path.name for path in tmp_path.iterdir()) == [fresh.name, "moe"]


@pytest.mark.parametrize("exchange", [True, False])
def test_saves_at_the_same_time(tiny, tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(saved, "_exchange", lambda *_: False)
    models = [upcycled(tiny()) for _ in range(4)]
    together, sync = threading.Barrier(len(models)), saved._sync

    def meet(new: Path) -> None:  # everybody has written, nobody has put anything in place
        together.wait()
        sync(new)

    monkeypatch.setattr(saved, "_sync", meet)
    for _ in range(3):
        with ThreadPoolExecutor(len(models)) as pool:
            list(pool.map(lambda model: moefold.save(model, tmp_path / "moe"), models))
        found = moefold.load(tmp_path / "moe").state_dict()["encoder.layer.1.moe.router.weight"]
        weights = [m.state_dict()["encoder.layer.1.moe.router.weight"] for m in models]
        assert any(torch.equal(found, weight) for weight in weights)
        assert [path.name for path in tmp_path.iterdir()] == ["moe"]


# Places.


def test_a_link_stays_a_link(tiny, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "moe").symlink_to(disk / "run-1")  # leads nowhere yet
    for model in (upcycled(tiny()), upcycled(tiny())):
        moefold.save(model, tmp_path / "moe")
        assert (tmp_path / "moe").is_symlink()
        assert_same_weights(model, moefold.load(tmp_path / "moe"))
        assert_same_weights(model, moefold.load(disk / "run-1"))
    assert [path.name for path in disk.iterdir()] == ["run-1"]


def test_the_current_directory_is_not_pulled_away(tiny, tmp_path, monkeypatch):
    model = upcycled(tiny())
    inside = tmp_path / "moe" / "inside"
    moefold.save(model, tmp_path / "moe")
    inside.mkdir()
    monkeypatch.chdir(inside)
    with pytest.raises(ValueError, match=r"inside is the current directory; give a folder"):
        moefold.save(model, ".")
    with pytest.raises(ValueError, match=r"moe is above the current directory; give"):
        moefold.save(model, "..")
    moefold.save(model, "here")
    assert_same_weights(model, moefold.load("here"))


def test_the_folder_can_be_read_by_whom_the_umask_lets(tiny, tmp_path):
    (tmp_path / "other").mkdir()
    moefold.save(upcycled(tiny()), tmp_path / "moe")
    assert (tmp_path / "moe").stat().st_mode == (tmp_path / "other").stat().st_mode


# Modules in folders of their own.


@pytest.fixture
def projected(tiny, tmp_path):
    """A SentenceTransformer with a Dense module, saved; its weights are in `2_Dense`."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    tiny(vocab_size=5).save_pretrained(tmp_path / "bert")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    inner = Transformer(str(tmp_path / "bert"), model_kwargs={"use_safetensors": True})
    model = SentenceTransformer(
        modules=[inner, Pooling(16), Dense(16, 4, activation_function=nn.Tanh())], device="cpu"
    )
    return model.eval()


def test_weights_of_every_module_are_hashed(projected, tmp_path):
    folder = tmp_path / "moe"
    moefold.save(upcycled(projected), folder)
    assert_same_weights(projected, moefold.load(folder))
    file = folder / "2_Dense" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"2_Dense/model.safetensors is not what was saved"):
        moefold.load(folder)


def test_every_file_is_hashed(projected, tmp_path):
    folder = tmp_path / "moe"
    moefold.save(upcycled(projected), folder)
    manifest = json.loads((folder / "moefold.json").read_text())
    found = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    assert set(manifest["files"]) == found - {"moefold.json"}
    for name in manifest["files"]:
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept + b" ")
        with pytest.raises(ValueError, match=f"{re.escape(name)} is not what was saved"):
            moefold.load(folder)
        (folder / name).write_bytes(kept)
    (folder / "NOTES.md").write_text("a note")  # nothing reads it
    moefold.load(folder)
    (folder / "adapter_config.json").write_text("{}")  # transformers would
    with pytest.raises(ValueError, match=r"holds adapter_config.json, which moefold.json does not"):
        moefold.load(folder)


def test_no_pickle_is_read_where_safetensors_are_gone(projected, tmp_path):
    folder = tmp_path / "moe"
    moefold.save(upcycled(projected), folder)
    weights = folder / "2_Dense" / "model.safetensors"
    torch.save(load_file(weights), folder / "2_Dense" / "pytorch_model.bin")
    weights.unlink()
    names = json.loads((folder / "moefold.json").read_text())["files"]
    del names["2_Dense/model.safetensors"]
    change_manifest(folder, files=names)
    with pytest.raises(ValueError, match=r"2_Dense/pytorch_model.bin is a pickle.* safetensors"):
        moefold.load(folder)
