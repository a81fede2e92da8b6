"""A loaded mixture becomes dense again: its own weights but for the MLPs, which are the dense ones.

mixture   attention' . norm' . experts
dense     attention  . norm  . MLP
restored  attention' . norm' . MLP
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import moefold
from moefold import MoEConfig, UpcycleConfig
from moefold.surgery import Form, describe_layer
from moefold.surgery.hosts.forms import FORMS
from tests.surgery.conftest import tiny_config

CONFIG = UpcycleConfig(moe=MoEConfig(num_experts=3), sites="all")
MAKE: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertModel(tiny_config()),
    "bert with a head": lambda: BertForMaskedLM(tiny_config()),
    # Its dropout is inside the MLP and is kept beside the mixture.
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=24,
        )
    ),
    # Two stacks, the MLP deep in the layer, weights tied.
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2)
    ),
}


def moved(model: Any) -> Any:
    """Stands for training: every weight is another one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def saved_and_loaded(dense: Any, tmp_path: Path) -> tuple[Any, Any]:
    """The dense model from its folder, and the mixture that was made of it, trained and loaded."""
    dense.save_pretrained(tmp_path / "dense")
    dense = type(dense).from_pretrained(tmp_path / "dense")
    model = copy.deepcopy(dense)
    moefold.upcycle(model, CONFIG)
    moefold.save(moved(model), tmp_path / "moe")
    return dense, moefold.load(tmp_path / "moe")


OPEN = """
import json, sys, transformers
for kind, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    print(json.dumps([type(model).__name__, type(model.config).__name__, [*model.state_dict()]]))
assert not any(name.startswith("moefold") for name in sys.modules)
"""


@pytest.mark.parametrize("kind", MAKE)
def test_only_the_mlps_are_the_dense_ones(kind, tmp_path):
    dense, model = saved_and_loaded(MAKE[kind](), tmp_path)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    mixed = {name: value.clone() for name, value in model.state_dict().items()}
    moefold.revert(model, dense)

    assert type(model) is type(dense)
    assert type(model.config) is type(dense.config)
    restored = model.state_dict()
    assert list(restored) == list(before)  # in the order of the dense model
    for name, value in restored.items():
        # Every weight of the mixture that has this name was left alone; the others are the MLPs'.
        assert torch.equal(value, mixed[name] if name in mixed else before[name]), name
    mlps = [name for name in before if name not in mixed]
    assert mlps
    # Copies: what becomes of the restored model is nothing to the dense one.
    moved(model)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())

    assert [str(m) for m in model.modules()] == [str(m) for m in dense.modules()]
    assert not any("moefold" in repr(vars(m)) for m in model.modules() if m is not model)
    model.save_pretrained(tmp_path / "again")
    assert "moefold" not in (tmp_path / "again" / "config.json").read_text()


def test_plain_transformers_opens_what_comes_out(tmp_path):
    command, expected = [sys.executable, "-c", OPEN], []
    for kind in ("bert with a head", "t5"):
        dense, model = saved_and_loaded(MAKE[kind](), tmp_path / kind)
        moefold.revert(model, dense)
        folder = tmp_path / kind / "again"
        model.save_pretrained(folder)
        names = type(dense).__name__, type(dense.config).__name__
        command += [names[0], str(folder)]
        expected.append([*names, [*dense.state_dict()]])
        again = type(dense).from_pretrained(folder)
        assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


def test_it_can_be_upcycled_again(tmp_path, batch):
    dense, model = saved_and_loaded(MAKE["bert"](), tmp_path)
    moefold.revert(model, dense)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moefold.upcycle(model, CONFIG)
    moefold.revert(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_copies_follow_the_mixture(tmp_path):
    dense, model = saved_and_loaded(MAKE["bert"](), tmp_path)
    model.double().train()
    moefold.revert(model, dense)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(module.training for module in model.modules())
    assert {p.dtype for p in dense.parameters()} == {torch.float32}


def test_a_body_takes_the_mlps_of_a_model_with_a_head(tmp_path):
    # As where AutoModel opened a checkpoint that was saved with its head.
    whole = BertForMaskedLM(tiny_config())
    whole.save_pretrained(tmp_path / "dense")
    body = BertModel.from_pretrained(tmp_path / "dense")
    moefold.upcycle(body, CONFIG)
    moefold.save(moved(body), tmp_path / "moe")
    model = moefold.load(tmp_path / "moe")
    moefold.revert(model, BertForMaskedLM.from_pretrained(tmp_path / "dense"))
    mine, theirs = model.state_dict(), whole.state_dict()
    for name in ("intermediate.dense.weight", "output.dense.bias"):
        layer = f"encoder.layer.3.{name}"
        assert torch.equal(mine[layer], theirs[f"bert.{layer}"])


def test_a_sentence_transformer(minilm, tmp_path):
    texts = ["A router decides which expert sees a token.", "Rain."]
    model = copy.deepcopy(minilm)
    moefold.upcycle(model, UpcycleConfig(sites="last:1"))
    moefold.save(model, tmp_path / "moe")
    loaded = moefold.load(tmp_path / "moe")
    assert isinstance(loaded, SentenceTransformer)
    moefold.revert(loaded, minilm)
    # Nothing was trained: the very model again.
    before, after = minilm.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(map(torch.equal, before.values(), after.values()))
    loaded.save_pretrained(str(tmp_path / "again"), create_model_card=False)
    code = (
        "import sys\nfrom sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], device='cpu', local_files_only=True)\n"
        "assert not any(name.startswith('moefold') for name in sys.modules)\n"
        "print(model.encode(sys.argv[2:]).sum(axis=1).tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "again"), *texts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Sums of 384 float32 numbers below one, in another process with other threads.
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == pytest.approx(minilm.encode(texts).sum(axis=1).tolist(), abs=1e-4)


class Block(nn.Module):
    """A layer of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.ff = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ff(self.norm(x))


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    kind = f"{Block.__module__}.{Block.__qualname__}"
    for kept in ("_targets", "_summaries"):  # so that no other test sees this one
        monkeypatch.setattr(FORMS, kept, dict(getattr(FORMS, kept)))
    describe_layer(
        "block of test_restored",
        "a block",
        Form(layer=kind, up="ff.0", down="ff.2", activation="ff.1", pieces=("ff",), mask=None),
    )
    dense: Any = nn.Sequential(Block(), Block())
    model = copy.deepcopy(dense)
    moefold.upcycle(model, CONFIG)
    moefold.save(moved(model), tmp_path / "moe")
    loaded: Any = moefold.load(tmp_path / "moe", into=nn.Sequential(Block(), Block()))
    moefold.revert(loaded, dense)
    assert torch.equal(loaded[0].ff[0].weight, dense[0].ff[0].weight)
    assert torch.equal(loaded[0].norm.weight, dense[0].norm.weight + 1)
    assert type(loaded[0]) is Block
    with pytest.raises(ValueError, match=r"Sequential is not upcycled"):
        moefold.revert(loaded)


def refused(model: nn.Module, dense: nn.Module, message: str, **settings: bool) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        moefold.revert(model, dense, **settings)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


OTHERS = {
    "width": (
        {"intermediate_size": 32},
        r"its encoder.layer.0 would have experts of .*'expert_width': 32, .* but encoder.layer.0 "
        r"has .*'expert_width': 24",
    ),
    "activation": ({"hidden_act": "relu"}, r"'activation': 'relu'.* but encoder.layer.0 has"),
    "dim": (
        {"hidden_size": 32},
        r"encoder.layer.0.attention.self.query.weight is \[16, 16\], where it has \[32, 32\]",
    ),
    "layers": ({"num_hidden_layers": 3}, r"it has no layer encoder.layer.3; give the one that was"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_architecture_is_refused(other, tmp_path):
    _, model = saved_and_loaded(MAKE["bert"](), tmp_path)
    changes, message = OTHERS[other]
    refused(model, BertModel(tiny_config(**changes)), message, any_source=True)


def test_layers_of_another_kind_are_refused(tmp_path):
    _, model = saved_and_loaded(MAKE["bert"](), tmp_path)
    other = RobertaModel(RobertaConfig(**BertConfig.from_pretrained(tmp_path / "dense").to_dict()))
    refused(model, other, r"RobertaModel, is not what .*layer.0 is a BertLayer, its enc\S+ a R")


def test_other_files_are_refused_unless_that_is_meant(tmp_path):
    dense, model = saved_and_loaded(MAKE["bert"](), tmp_path)
    moved(copy.deepcopy(dense)).save_pretrained(tmp_path / "other")
    other = BertModel.from_pretrained(tmp_path / "other")
    refused(
        model,
        other,
        r"was read from other \(sha256 \w{12}\), the mixture was made from dense \(sha256 \w{12}\)"
        r"; give that one, or pass any_source=True \(--any-source\)",
    )
    moefold.revert(model, other, any_source=True)
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(model.state_dict()[name], other.state_dict()[name])


def test_files_that_cannot_be_compared_are_warned_of(tmp_path):
    dense, model = saved_and_loaded(MAKE["bert"](), tmp_path)
    dense.config.name_or_path = ""
    with pytest.warns(UserWarning, match=r"cannot tell whether the dense model is .*\(dense\)"):
        moefold.revert(model, dense)


def test_what_cannot_be_reverted_is_refused(tmp_path):
    dense, model = saved_and_loaded(MAKE["bert"](), tmp_path)
    with pytest.raises(ValueError, match=r"MoefoldBertModel holds .*revert\(model, dense\)"):
        moefold.revert(model)
    with pytest.raises(ValueError, match=r"BertModel is not upcycled, there is nothing to revert"):
        moefold.revert(copy.deepcopy(dense), dense)
    twin = copy.deepcopy(dense)
    moefold.upcycle(twin)
    refused(model, twin, r"a BertModel, holds mixtures itself; give the one that was upcycled")
    refused(twin, dense, r"BertModel still has the MLPs it was upcycled with; .* without a dense")
