"""`moefold revert`: a saved mixture and the model it was made from become a dense model."""

import importlib.metadata
import re
import shlex

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

import moefold
from moefold import UpcycleConfig
from moefold.cli import VERBS, main
from moefold.cli.revert import EXAMPLE
from moefold.surgery.encoder import MINILM_PACKAGE, pretrained_encoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "rain", "token", "."]


@pytest.fixture
def folders(tmp_path):
    """A dense model and a mixture made of it, trained since, each with a tokenizer."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    BertModel(config).save_pretrained("dense")
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained("dense")
    model = BertModel.from_pretrained("dense")
    moefold.upcycle(model, UpcycleConfig(sites="last:1"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    moefold.save(model, "moe", tokenizer=tokenizer)


def test_the_verb_is_listed_with_its_flags(capsys):
    assert "revert" in VERBS
    with pytest.raises(SystemExit) as stop:
        main(["revert", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"$ {EXAMPLE}" in shown
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown)) - {"--help"}
    assert flags == {"--any-source", "--dense", "--out"}


@pytest.mark.usefixtures("folders")
def test_a_dense_folder_comes_out(tmp_path, capsys):
    assert main(["revert", "moe", "--dense", "dense", "--out", "sub/again"]) == 0
    shown = capsys.readouterr().out
    assert "BertModel: encoder.layer.1 are dense again, as in dense" in shown
    assert "wrote sub/again" in shown
    dense, again = (BertModel.from_pretrained(name).state_dict() for name in ("dense", "sub/again"))
    assert list(dense) == list(again)
    for name, value in again.items():
        mlp = name.startswith(("encoder.layer.1.intermediate", "encoder.layer.1.output.dense"))
        assert torch.equal(value, dense[name] if mlp else dense[name] + 1), name
    assert "moefold" not in (tmp_path / "sub/again/config.json").read_text()
    assert AutoTokenizer.from_pretrained("sub/again")("the rain.")["input_ids"] == [2, 5, 7, 9, 3]
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["again"]  # nothing beside it


REFUSED = {
    "moe --dense dense --out full": "full is not empty; give a new or an empty folder",
    "moe --dense dense --out vocab.txt": "vocab.txt is a file; give a folder",
    "moe --dense moe --out new": "moe holds an upcycled model; give the dense one it was made from",
    "moe --dense other --out new": "was read from other (sha256 ",
    "dense --dense dense --out new": "dense has no moefold.json: a dense model of type 'bert'",
    "nowhere --dense dense --out new": "no folder at nowhere; give one that moefold.save wrote",
    "moe --dense nowhere --out new": "no folder at 'nowhere'",
    "moe --dense narrow --out new": "is not what this MoefoldBertModel was made from: upcycled the",
}


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_explained_and_nothing_is_written(line, tmp_path, capsys):
    config = BertConfig.from_pretrained("dense")
    BertModel(config).save_pretrained("other")
    config.intermediate_size = 20
    BertModel(config).save_pretrained("narrow")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(["revert", *shlex.split(line)]) == 2
    error = capsys.readouterr().err
    assert REFUSED[line] in error
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("folders")
def test_other_files_are_taken_when_that_is_said(capsys):
    other = BertModel(BertConfig.from_pretrained("dense"))
    other.save_pretrained("other")
    words = ["revert", "moe", "--dense", "other", "--out", "again"]
    assert main(words) == 2
    assert "(--any-source) to take these MLPs" in capsys.readouterr().err
    assert main([*words, "--any-source"]) == 0
    name = "encoder.layer.1.output.dense.weight"
    found = BertModel.from_pretrained("again").state_dict()[name]
    assert torch.equal(found, other.state_dict()[name])


@pytest.mark.usefixtures("folders")
def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BertModel, "save_pretrained", fail)
    before = sorted(tmp_path.rglob("*"))
    assert main(["revert", "moe", "--dense", "dense", "--out", "again"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_example_runs_after_that_of_upcycle():
    try:
        importlib.metadata.version(MINILM_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {MINILM_PACKAGE} is not installed")
    assert main(["upcycle", "minilm", "--out", "minilm-moe", "--sites", "last:1"]) == 0
    assert main(EXAMPLE.split()[1:]) == 0
    again = SentenceTransformer("minilm-again", device="cpu", local_files_only=True)
    before, after = pretrained_encoder().state_dict(), again.state_dict()
    assert list(before) == list(after)
    assert all(map(torch.equal, before.values(), after.values()))
