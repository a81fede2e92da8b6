"""`plan` and `upcycle` on folders of every kind: text with a tokenizer and without, pixels, both.

A folder is as the real class saves it, and what a verb prints is all that is printed.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import moefold
from moefold.cli import main
from moefold.cli.models import SENTENCES, open_model, sample_inputs

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "rain", "token", "."]
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS: dict[str, Any] = {**SMALL, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
SPECIAL: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}

HOSTS: dict[str, Callable[[], Any]] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**PIXELS)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ),
    "clip": lambda: CLIPModel(
        CLIPConfig(
            text_config={**SMALL, **SPECIAL, "vocab_size": 32, "intermediate_size": 32},
            vision_config=PIXELS,
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, **SPECIAL, vocab_size=32, intermediate_size=32)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8,
            bos_token_id=2, eos_token_id=3,
        )
    ),
}  # fmt: skip


def saved(name: str, *, tokenizer: bool = False, padding: bool = True) -> str:
    """The folder of a host."""
    HOSTS[name]().save_pretrained(name)
    if tokenizer:
        Path("vocab.txt").write_text("\n".join(WORDS))
        backend = BertTokenizer("vocab.txt").backend_tokenizer
        special = {"pad_token": "[PAD]"} if padding else {}
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)
        fast.save_pretrained(name)
    return name


@pytest.mark.parametrize(
    ("name", "tokenizer", "inputs"),
    [
        ("vit", False, "random pixels"),
        ("clip", False, "random tokens and random pixels"),
        ("clip", True, "random tokens and random pixels"),
        ("t5", False, "random tokens"),
        ("t5", True, "6 sample sentences"),
        ("llama", False, "random tokens"),
        ("llama", True, "6 sample sentences"),
        ("gpt2", True, "6 sample sentences"),
    ],
)
def test_every_kind_of_folder_is_upcycled_with_a_receipt(name, tokenizer, inputs, capfd):
    saved(name, tokenizer=tokenizer)
    capfd.readouterr()  # what saving it printed
    assert main(["plan", name, "--sites", "all"]) == 0
    planned, noise = capfd.readouterr()
    assert noise == ""
    assert main(["upcycle", name, "--out", "moe", "--sites", "all"]) == 0
    shown, noise = capfd.readouterr()
    assert noise == ""
    assert shown.startswith(planned)
    off = re.search(rf"measured +on {inputs}: the output of the model is off by (\S+) of", shown)
    assert off is not None
    assert float(off.group(1)) < 1e-5  # renormalised copies: float32 rounding, relative
    assert Path("moe/tokenizer.json").exists() == tokenizer
    assert main(["load", "moe"]) == 0
    shown, noise = capfd.readouterr()
    assert noise == ""
    assert f"measured               on {inputs}" in shown


def test_the_sentences_as_a_tokenizer_without_padding_cuts_them():
    opened = open_model(saved("gpt2", tokenizer=True, padding=False))
    inputs = sample_inputs(opened)
    assert inputs is not None
    # 8 positions, two kept free; "Rain." is its two words, and the rest of the row padding.
    assert inputs["input_ids"].shape == (len(SENTENCES), 6)
    rain = SENTENCES.index("Rain.")
    words = opened.processor("Rain.")["input_ids"]
    assert inputs["input_ids"][rain].tolist() == words + [0] * (6 - len(words))
    assert inputs["attention_mask"][rain].tolist() == [1] * len(words) + [0] * (6 - len(words))


def test_a_tokenizer_with_more_words_than_the_model_is_not_used():
    saved("gpt2", tokenizer=True)
    tokenizer = json.loads(Path("gpt2/tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["rain"] = 40  # of 32
    Path("gpt2/tokenizer.json").write_text(json.dumps(tokenizer))
    assert sample_inputs(open_model("gpt2")) is None


def test_an_image_processor_goes_along_and_comes_back():
    saved("vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("vit")
    wanted = json.loads(Path("vit/preprocessor_config.json").read_text())["size"]
    assert main(["upcycle", "vit", "--out", "moe"]) == 0
    assert main(["upcycle", "vit", "--out", "streamed", "--stream"]) == 0
    assert main(["revert", "moe", "--dense", "vit", "--out", "dense"]) == 0
    assert main(["save", "moe", "--out", "again"]) == 0
    for folder in ("moe", "streamed", "dense", "again"):
        found = json.loads((Path(folder) / "preprocessor_config.json").read_text())
        assert found["size"] == wanted


def test_routers_of_some_sites(capsys):
    saved("t5")
    words = ["--sites", "all", "--router", "mixtral"]
    words += ["--router-at", r"encoder\..*=expert-choice(capacity-factor=1, group=sequence)"]
    words += ["--router-at", r"encoder\..*=soft", "--router-at", r"block\.1=token-choice(k=3)"]
    assert main(["upcycle", "t5", "--out", "moe", *words]) == 0
    assert "rows per token         mixtral (causal): 2.00" in capsys.readouterr().out
    loaded: Any = moefold.load("moe")
    section = loaded.config.moefold
    found = {name: moe["router"] for name, moe in section["sites"].items()}
    choice = {"name": "expert-choice", "settings": {"capacity_factor": 1, "group": "sequence"}}
    assert found["encoder.block.0"] == found["encoder.block.1"] == choice
    assert found["decoder.block.0"] == {"name": "mixtral", "settings": {}}
    # As for --router token-choice, which keeps the function unless told otherwise.
    settings = {"k": 3, "renormalize": True}
    assert found["decoder.block.1"] == {"name": "token-choice", "settings": settings}


def test_what_is_said_of_all_routers_is_said_once(capsys):
    saved("t5")
    assert main(["plan", "t5"]) == 0
    assert capsys.readouterr().out.count("rows per token         2.00\n") == 1
    assert main(["plan", "t5", "--router-at", r"decoder\..*=token-choice(k=4)"]) == 0
    shown = capsys.readouterr().out
    assert "rows per token         token-choice(k=2, renormalize=True): 2.00" in shown
    assert "rows per token         token-choice(k=4, renormalize=True) (causal): 4.00" in shown


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What transformers logs; where it prints that was settled when it was imported."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger, before = logging.getLogger("transformers"), transformers.utils.logging.get_verbosity()
    logger.addHandler(handler)
    transformers.utils.logging.set_verbosity_warning()
    yield messages
    logger.removeHandler(handler)
    transformers.utils.logging.set_verbosity(before)


def altered(alter: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The folder `llama` with other weights."""
    saved("llama")
    weights = load_file("llama/model.safetensors")
    alter(weights)
    save_file(weights, "llama/model.safetensors", metadata={"format": "pt"})


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.filterwarnings("default")
def test_weights_that_are_missing_are_named(capfd):
    altered(lambda weights: weights.pop(UP))
    capfd.readouterr()
    assert main(["plan", "llama"]) == 0
    wanted = f"moefold plan: llama lacks {UP}; what is missing starts at random numbers\n"
    assert capfd.readouterr().err == wanted


def test_streaming_refuses_them_and_says_no_more(capfd, logged):
    altered(lambda weights: weights.pop(UP))
    capfd.readouterr()
    assert main(["upcycle", "llama", "--out", "moe", "--stream"]) == 2
    assert re.fullmatch(rf"moefold upcycle: .* {UP} are missing; .*\n", capfd.readouterr().err)
    assert logged == []


def test_weights_nobody_asked_for_are_no_matter(capfd, logged):
    altered(lambda weights: weights.update(extra=torch.zeros(3)))
    capfd.readouterr()
    assert main(["plan", "llama"]) == 0
    assert capfd.readouterr().err == ""
    assert logged == []


def test_weights_of_another_model_are_refused(capfd):
    altered(lambda weights: weights.update({UP: torch.zeros(3, 4)}))
    capfd.readouterr()
    assert main(["plan", "llama"]) == 2
    assert capfd.readouterr().err == (
        f"moefold plan: the weights in llama are not those of its config.json: {UP} is [3, 4], not "
        f"[32, 16]; copy both from the same place\n"
    )


def test_a_truncated_file_is_named(capsys):
    saved("llama")
    file = Path("llama/model.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert main(["plan", "llama"]) == 2
    error = capsys.readouterr().err
    assert "cannot open llama as a transformer (" in error
    assert "); give a folder that save_pretrained wrote, with config.json and whole" in error
    shutil.copytree("llama", "encoder")
    Path("encoder/modules.json").write_text(
        json.dumps(
            [
                {
                    "idx": 0,
                    "name": "0",
                    "path": "",
                    "type": "sentence_transformers.models.Transformer",
                }
            ]
        )
    )
    assert main(["plan", "encoder"]) == 2
    assert "cannot open encoder as a sentence encoder (" in capsys.readouterr().err


def test_a_model_that_computes_nan_is_upcycled_and_the_receipt_says_so(capsys):
    altered(lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    assert main(["upcycle", "llama", "--out", "moe"]) == 0
    shown = capsys.readouterr().out
    assert "not measured           the dense model cannot be run on random tokens (" in shown
    assert "read back, every weight is the same" in shown  # NaN is not equal to itself
