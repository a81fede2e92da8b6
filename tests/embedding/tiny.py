"""A tokenizer of a few words without padding, texts of different lengths, models in float64."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.rerouting.models import build

WORDS = [
    *("[UNK]", "<s>", "</s>", ".", '"', "'", ":", "the", "a", "rain", "sun", "sea", "hill"),
    *("falls", "rises", "on", "in", "This", "sentence", "means", "one", "word", "token"),
]
TEXTS = [
    "the rain falls on the sea",
    "sun",
    "a token rises in the rain on a hill . the sun falls",
    "the hill",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or mark; no special token is added, and none is for padding."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def double(kind: str = "olmoe", **changes: object) -> Any:
    """A tiny pretrained mixture in float64; its experts one after the other, which can do that."""
    model = build(kind, **changes)
    model.set_experts_implementation("eager")
    return model.to(torch.float64)
