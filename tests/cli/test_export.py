"""`moefold export`: its frozen flags, its example, what it writes and what it refuses."""

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
)

import moefold
from moefold import UpcycleConfig
from moefold.cli import main

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "rain"]


@pytest.fixture
def mixture():
    """The folder `llama-moe`: a saved mixture with a tokenizer."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    moefold.upcycle(model, UpcycleConfig(sites="all"), inputs=False)
    Path("vocab.txt").write_text("\n".join(WORDS))
    moefold.save(model, "llama-moe", tokenizer=BertTokenizer("vocab.txt"))
    return model


def help_of_export(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["export", "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_flags_are_frozen(capsys):
    found = re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_of_export(capsys))
    assert sorted(set(found) - {"--help"}) == ["--format", "--out"]


def test_the_example_runs(mixture, capsys):
    (example,) = re.findall(r"^\s*\$ moefold (.*)$", help_of_export(capsys), re.MULTILINE)
    assert main(example.split()) == 0
    assert capsys.readouterr().out.startswith("wrote llama-mixtral, mixtral: transformers' Mixtral")
    native = AutoModelForCausalLM.from_pretrained("llama-mixtral")
    assert isinstance(native, MixtralForCausalLM)
    ids = torch.tensor([[5, 1, 5]])
    with torch.no_grad():
        # Copies of one MLP whose weights sum to one, in float32.
        torch.testing.assert_close(native(ids).logits, mixture(ids).logits, rtol=1e-4, atol=1e-5)
    assert BertTokenizer.from_pretrained("llama-mixtral").convert_tokens_to_ids("rain") == 5


def test_the_format_is_found_if_it_is_not_said(mixture, capsys):
    assert main(["export", "llama-moe", "--out", "native"]) == 0
    assert capsys.readouterr().out.startswith("wrote native, mixtral: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama-moe", "--format", "qwen3-moe"], "llama has queries and keys without a norm"),
        (["llama-moe", "--format", "mixtrall"], "format is 'mixtrall'; allowed: "),
        (["nowhere"], "no folder at "),
        (["llama-moe", "--out", "llama-moe"], "holds an upcycled model, which an export does not"),
    ],
)
def test_what_is_refused(mixture, capsys, words, message):
    out = [] if "--out" in words else ["--out", "out"]
    assert main(["export", *words, *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moefold export: ")
    assert message in error
    assert not Path("out").exists()
