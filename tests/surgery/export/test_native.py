"""Native classes: the same logits to 1e-10 from plain transformers, which never sees moefold."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertTokenizer,
    GenerationConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeForCausalLM,
)

import moefold
from moefold.routers import score
from tests.surgery.export.models import batch, decoder, mixed

ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 77.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}

# Name: kind of dense decoder, its config, its mixtures, the format, the class that must come out.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, str]] = {
    "llama": ("llama", {}, {}, "mixtral", "MixtralForCausalLM"),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {"k": 1}, "mixtral", ""),
    "llama-rope-and-heads": (
        "llama",
        {"head_dim": 12, "rope_parameters": ROPE, "hidden_act": "gelu"},
        {"router": "mixtral"},
        "mixtral",
        "",
    ),
    "llama-unnormalised": ("llama", {"head_dim": 12}, {"renormalize": False}, "qwen2-moe", ""),
    "llama-some-layers": ("llama", {}, {"sites": "every-other"}, "qwen2-moe", ""),
    "llama-shared": ("llama", {}, {"shared_width": 8}, "qwen2-moe", ""),
    "mistral": ("mistral", {"sliding_window": 3}, {}, "mixtral", ""),
    "mistral-shared": ("mistral", {"sliding_window": 3}, {"shared_width": 8}, "qwen2-moe", ""),
    "qwen2": ("qwen2", {}, {}, "qwen2-moe", "Qwen2MoeForCausalLM"),
    "qwen2-everything": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        {"sites": "every-other", "shared_width": 8, "renormalize": False},
        "qwen2-moe",
        "",
    ),
    "qwen3": ("qwen3", {"head_dim": 12}, {}, "qwen3-moe", "Qwen3MoeForCausalLM"),
    "qwen3-everything": (
        "qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 0,
        },
        {"sites": "last:1", "renormalize": False},
        "qwen3-moe",
        "",
    ),
    "olmo2": ("olmo2", {"attention_bias": True}, {}, "flex-olmo", "FlexOlmoForCausalLM"),
    "olmo2-unnormalised": ("olmo2", {}, {"renormalize": False}, "flex-olmo", ""),
}

# What a user of plain transformers does. `eager`: the default experts of transformers, grouped
# products, do not exist in float64.
PLAIN = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

inputs, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    assert model.dtype == torch.float64
    with torch.no_grad():
        logits = model(**load_file(inputs)).logits
    save_file({"logits": logits}, folder + "/logits.safetensors")
assert "moefold" not in sys.modules
"""


def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our softmax over experts in float32, which native routers take it in whatever the model is.

    All the rest stays in float64, so that everything else must be equal to 1e-10.
    """
    monkeypatch.setattr(score.Softmax, "__call__", lambda self, x, valid: x.float().softmax(-1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every case, its own logits, and those of one plain process: name to (class, ours, theirs)."""
    place, inputs = tmp_path_factory.mktemp("exported"), batch()
    save_file(inputs, place / "inputs.safetensors")
    ours, folders = {}, []
    torch.manual_seed(0)
    for name, (kind, config, mixture, format, _) in CASES.items():
        model = mixed(decoder(kind, **config), **mixture)
        assert moefold.export(model, place / name) == format
        folders.append(str(place / name))
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            in_float32(patch)
            ours[name] = model(**inputs).logits
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(place / "inputs.safetensors"), *folders],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    real = inputs["attention_mask"].bool()
    return {
        name: (
            json.loads((place / name / "config.json").read_text()),
            ours[name][real],
            load_file(place / name / "logits.safetensors")["logits"][real],
        )
        for name in CASES
    }


@pytest.mark.parametrize("name", CASES)
def test_plain_transformers_computes_the_same_logits(exported, name):
    config, ours, theirs = exported[name]
    assert CASES[name][-1] in config["architectures"][0]
    assert ours.dtype == theirs.dtype == torch.float64
    # The tokens route apart and the logits are of order 1: 1e-10 is five orders below float32.
    assert (ours - theirs).abs().max() <= 1e-10
    assert ours.std() > 0.1


def test_only_the_precision_of_the_softmax_differs(tmp_path):
    model, inputs = mixed(decoder("llama")), batch()
    moefold.export(model, tmp_path / "native")
    native = AutoModelForCausalLM.from_pretrained(
        tmp_path / "native", experts_implementation="eager"
    )
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = model(**inputs).logits[real], native(**inputs).logits[real]
    # A softmax in float32 is off by some of its eps; two layers and their norms, which round to
    # float32 as well once their input differs, carry that on: two orders of magnitude.
    relative = (ours - theirs).norm() / ours.norm()
    assert 0 < relative <= 100 * torch.finfo(torch.float32).eps


def test_weights_are_renamed_and_nothing_else(tmp_path):
    #   layers.0.moe.router.weight         ->  layers.0.mlp.gate.weight
    #   layers.0.moe.experts.gate_up_proj  ->  layers.0.mlp.experts.gate_up_proj
    #   layers.0.moe.experts.down_proj     ->  layers.0.mlp.experts.down_proj
    model = mixed(decoder("llama"))
    moefold.export(model, tmp_path / "native", format="mixtral")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert isinstance(native, MixtralForCausalLM)
    theirs = native.state_dict()
    for name, value in model.state_dict().items():
        renamed = name.replace("moe.router", "mlp.gate").replace("moe.experts", "mlp.experts")
        assert torch.equal(value, theirs.pop(renamed)), name
    assert not theirs


def test_a_shared_expert_is_doubled_and_halved(tmp_path):
    # sigmoid(0 @ x) = 1/2, and 1/2 * (2 * down) @ h = down @ h to the last digit.
    model = mixed(decoder("qwen2"), shared_width=8)
    moefold.export(model, tmp_path / "native")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert isinstance(native, Qwen2MoeForCausalLM)
    ours, theirs = model.state_dict(), native.state_dict()
    layer = "model.layers.0"
    gate, up = ours[f"{layer}.moe.shared.gate_up_proj"][0].chunk(2)
    down = ours[f"{layer}.moe.shared.down_proj"][0]
    assert torch.equal(theirs[f"{layer}.mlp.shared_expert.gate_proj.weight"], gate)
    assert torch.equal(theirs[f"{layer}.mlp.shared_expert.up_proj.weight"], up)
    assert torch.equal(theirs[f"{layer}.mlp.shared_expert.down_proj.weight"], 2 * down)
    assert theirs[f"{layer}.mlp.shared_expert_gate.weight"].eq(0).all()


@pytest.mark.parametrize(
    ("auto", "name"),
    [(AutoModel, "MixtralModel"), (AutoModelForSequenceClassification, "MixtralForSequenceClass")],
)
def test_bodies_and_other_heads_come_along(tmp_path, monkeypatch, auto, name):
    model, inputs = mixed(decoder("llama", auto, num_labels=3)), batch()
    moefold.export(model, tmp_path / "native")
    native = auto.from_pretrained(tmp_path / "native", experts_implementation="eager")
    assert type(native).__name__.startswith(name)
    in_float32(monkeypatch)
    with torch.no_grad():
        ours, theirs = model(**inputs)[0], native(**inputs)[0]
    if ours.ndim == 3:  # hidden states: nobody attends to those of padding, which differ
        real = inputs["attention_mask"].bool()
        ours, theirs = ours[real], theirs[real]
    assert (ours - theirs).abs().max() <= 1e-10


def test_a_loaded_model_goes_out_with_its_tokenizer_and_settings(tmp_path, monkeypatch):
    model = mixed(decoder("mistral"))
    model.generation_config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    moefold.save(model, tmp_path / "moe")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nrain\n")
    loaded = moefold.load(tmp_path / "moe")
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    moefold.export(loaded, tmp_path / "native", tokenizer=tokenizer)
    assert BertTokenizer.from_pretrained(tmp_path / "native").vocab == tokenizer.vocab
    native = AutoModelForCausalLM.from_pretrained(
        tmp_path / "native", experts_implementation="eager"
    )
    in_float32(monkeypatch)
    inputs = batch()
    # The settings for generating came along, or these would be twenty tokens; with a cache.
    found = native.generate(**inputs)  # pyright: ignore
    assert found.shape == (3, 9 + 4)
    assert torch.equal(found, loaded.generate(**inputs))  # pyright: ignore


def test_the_model_is_left_as_it_was(tmp_path):
    model = mixed(decoder("qwen2"), shared_width=8).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    moefold.export(model, tmp_path / "native")
    assert model.training
    assert model.config.to_dict() == config
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(self: PreTrainedModel, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    model = mixed(decoder("llama"))
    with pytest.raises(OSError, match=r"No space left on device"):
        moefold.export(model, tmp_path / "native")
    assert not list(tmp_path.iterdir())
