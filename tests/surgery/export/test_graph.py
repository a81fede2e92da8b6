"""Graphs of encoders: any batch and length, and experts that the example never used."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from transformers import BertModel, BertTokenizer, ViTConfig, ViTModel

import moefold
from moefold import Copies, MoEConfig, UpcycleConfig, record_routing, routers

pytestmark = pytest.mark.compile  # traced shapes are no numbers to the typing hook

# What somebody does who has torch and nothing else.
PLAIN = """
import sys
import torch
from safetensors.torch import load_file, save_file

program = torch.export.load(sys.argv[1] + "/model.pt2").module()
for number in map(str, range(int(sys.argv[2]))):
    made = program(**load_file(f"inputs-{number}.safetensors"))
    save_file(made, f"outputs-{number}.safetensors")
assert not {"moefold", "transformers"} & set(sys.modules)
"""


def upcycled(model: nn.Module, router: str = "token-choice", **settings: Any) -> nn.Module:
    moe = MoEConfig(num_experts=8, router=routers.config(router, **settings))
    birth = Copies(copy_noise_std=0.3, router_std=0.5)
    moefold.upcycle(model, UpcycleConfig(moe=moe, sites="all", birth=birth), inputs=False)
    return model.eval()


def tokens(*lengths: int) -> dict[str, Tensor]:
    """Sequences of so many real tokens, padded on the right."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return {"input_ids": torch.randint(5, 60, mask.shape), "attention_mask": mask.long()}


# Other numbers of sequences and of tokens than the example's; single ones too.
OTHERS = [(9, 3, 1, 7, 4), (30,), (2, 2), (1,)]


def used(model: nn.Module, *batches: dict[str, Tensor]) -> dict[str, set[int]]:
    """Which experts have a row, by site."""
    with record_routing(model) as record, torch.no_grad():
        for inputs in batches:
            model(**inputs)
    return {
        site: {e for one in routings for e in one.rows_per_expert.nonzero().flatten().tolist()}
        for site, routings in record.items()
    }


def assert_same(found: Tensor, wanted: Tensor) -> None:
    # Float32, two layers: some hundreds of roundings of numbers of order 1, and what a kernel of
    # another runtime sums in another order. A token that lost an expert is off by order 1.
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-4
    assert wanted.std() > 0.05


def in_plain_torch(folder: Path, place: Path, batches: list[dict[str, Tensor]]) -> list[Any]:
    for number, inputs in enumerate(batches):
        save_file(inputs, place / f"inputs-{number}.safetensors")
    words = [sys.executable, "-c", PLAIN, str(folder), str(len(batches))]
    done = subprocess.run(words, capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    return [load_file(place / f"outputs-{number}.safetensors") for number in range(len(batches))]


def in_onnxruntime(folder: Path, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(folder / "model.onnx"))
    names = [output.name for output in session.get_outputs()]
    made = []
    for inputs in batches:
        values = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        made.append(dict(zip(names, map(torch.from_numpy, values), strict=True)))
    return made


def test_a_program_runs_in_plain_torch(tiny, tmp_path):
    model, example, others = (
        upcycled(tiny(num_hidden_layers=2)),
        tokens(3, 2),
        [tokens(*n) for n in OTHERS],
    )
    seen, wanted_by_others = used(model, example), used(model, *others)
    # The point of it: tracing records what the example does.
    assert all(wanted_by_others[site] - seen[site] for site in seen)
    format = moefold.export(model, tmp_path / "out", format="torch-export", inputs=example)
    assert format == "torch-export"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.pt2"]
    found = in_plain_torch(tmp_path / "out", tmp_path, others)
    for inputs, made in zip(others, found, strict=True):
        with torch.no_grad():
            wanted = model(**inputs)
        real = inputs["attention_mask"].bool()
        assert set(made) == {"last_hidden_state", "pooler_output"}
        assert_same(made["last_hidden_state"][real], wanted.last_hidden_state[real])
        assert_same(made["pooler_output"], wanted.pooler_output)


@pytest.mark.parametrize(
    ("router", "settings"), [("token-choice", {"capacity_factor": 1.0}), ("expert-choice", {})]
)
def test_onnx(tiny, tmp_path, router, settings):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, example = upcycled(tiny(num_hidden_layers=2), router, **settings), tokens(4, 2)
    others = [tokens(*lengths) for lengths in OTHERS if max(lengths) > 2]
    assert moefold.export(model, tmp_path / "out", format="onnx", inputs=example) == "onnx"
    for inputs, made in zip(others, in_onnxruntime(tmp_path / "out", others), strict=True):
        with torch.no_grad():
            wanted = model(**inputs)
        real = inputs["attention_mask"].bool()
        assert_same(made["last_hidden_state"][real], wanted.last_hidden_state[real])


@pytest.mark.parametrize("router", ["soft", "unified", "switch", "expert-choice"])
def test_programs_of_other_routers(tiny, tmp_path, router):
    # A router that looks beyond a token asks whether sequences are packed, by comparing neighbours:
    # such a program takes three tokens or more.
    model = upcycled(tiny(num_hidden_layers=2), router)
    others = [tokens(*lengths) for lengths in OTHERS if max(lengths) > 2]
    moefold.export(model, tmp_path / "out", format="torch-export")  # of made-up inputs
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    for inputs in others:
        with torch.no_grad():
            wanted = model(**inputs).last_hidden_state
        real = inputs["attention_mask"].bool()
        assert_same(program(**inputs)["last_hidden_state"][real], wanted[real])


def test_a_vision_model_takes_any_batch(tmp_path):
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=4,
    )
    model = upcycled(ViTModel(config))
    moefold.export(model, tmp_path / "out", format="torch-export")
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    for size in (1, 5):
        pixels = torch.randn(size, 3, 16, 16)
        with torch.no_grad():
            wanted = model(pixels).last_hidden_state
        assert_same(program(pixel_values=pixels)["last_hidden_state"], wanted)


@pytest.fixture
def sentences(tiny, tmp_path) -> SentenceTransformer:
    tiny(num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "rain", "falls", "on", "the", "sea"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "dense")
    body = Transformer(str(tmp_path / "dense"))
    model = SentenceTransformer(modules=[body, Pooling(16)], device="cpu")
    upcycled(model)
    return model


def test_a_whole_sentence_transformer(sentences, tmp_path):
    out, texts = tmp_path / "out", ["rain", "rain falls on the sea", "the sea falls"]
    moefold.export(sentences, out, format="torch-export", tokenizer=sentences.tokenizer)
    program = torch.export.load(out / "model.pt2").module()
    encoded = BertTokenizer.from_pretrained(out)(texts, padding=True, return_tensors="pt")
    made = program(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
    wanted = sentences.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    assert isinstance(wanted, Tensor)
    assert_same(made["sentence_embedding"], wanted)


class Tagger(nn.Module):
    """A model of no library that returns a tensor."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(16, 3)

    def forward(self, words: Tensor, real: Tensor) -> Tensor:
        return self.head(self.bert(input_ids=words, attention_mask=real)[0])


def test_a_model_of_no_library_needs_inputs(tiny, tmp_path):
    model = upcycled(Tagger(tiny(num_hidden_layers=2)))
    with pytest.raises(ValueError, match=r"a Tagger does not say what it takes"):
        moefold.export(model, tmp_path / "out", format="torch-export")
    example = tokens(3, 2)
    named = {"words": example["input_ids"], "real": example["attention_mask"]}
    moefold.export(model, tmp_path / "out", format="torch-export", inputs=named)
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    other = tokens(9, 9, 9)
    with torch.no_grad():
        wanted = model(other["input_ids"], other["attention_mask"])
    made = program(words=other["input_ids"], real=other["attention_mask"])
    assert_same(made["output"], wanted)


def test_the_model_is_put_back(tiny, tmp_path):
    model = upcycled(tiny(num_hidden_layers=2)).train()
    modules, inputs = dict(model.named_modules()), tokens(4, 2)
    model.eval()
    with torch.no_grad():
        before = model(**inputs)[0]
    model.train()
    moefold.export(model, tmp_path / "out", format="torch-export")
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in model.modules())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], before)


def test_what_onnx_has_no_word_for(tiny, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")

    def refuse(*args: object, **kwargs: object) -> None:
        raise torch.onnx.OnnxExporterError("No ONNX function found for aten.erfinv\nmore")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    message = (
        r"^cannot export a BertModel as 'onnx': torch.onnx cannot convert it \(No ONNX function "
        r"found for aten.erfinv\). Nearest: format 'torch-export' can hold it$"
    )
    with pytest.raises(ValueError, match=message):
        moefold.export(upcycled(tiny(num_hidden_layers=2)), tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()
