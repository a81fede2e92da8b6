"""Hosts to operate on: tiny random BERTs saved by the real class, and the real sentence encoder."""

import copy
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel
from transformers.utils import logging

from moefold.surgery.encoder import MINILM_PACKAGE, pretrained_encoder


def tiny_config(**changes: object) -> BertConfig:
    settings = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        # Larger than usual, so that the MLPs matter to the output of so small a model.
        "initializer_range": 0.3,
    }
    return BertConfig(**{**settings, **changes})


@pytest.fixture(autouse=True)
def _no_bars():
    """Progress bars share a lock with every child; one that is killed would never give it back."""
    logging.disable_progress_bar()


@pytest.fixture
def tiny() -> Callable[..., BertModel]:
    """Makes a tiny BertModel in evaluation mode; keyword arguments change its config."""
    return lambda **changes: BertModel(tiny_config(**changes)).eval()


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A folder that the real class saved."""
    folder = tmp_path / "dense"
    BertModel(tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three sequences of 7, 4 and 1 real tokens."""
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    return {"input_ids": torch.randint(60, (3, 7)), "attention_mask": mask.long()}


@pytest.fixture(scope="session")
def _minilm():
    try:
        importlib.metadata.version(MINILM_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {MINILM_PACKAGE} is not installed")
    return pretrained_encoder()


@pytest.fixture
def minilm(_minilm):
    """The real encoder, a copy of its own for each test."""
    return copy.deepcopy(_minilm)
