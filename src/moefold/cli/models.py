"""Opening a dense model for a verb, and what it says about a few sentences."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from moefold.surgery.encoder import pretrained_encoder, refuse_pickles, source_folder
from moefold.surgery.saved import MANIFEST

SENTENCES = (
    "A router decides which expert sees a token.",
    "The ferry leaves the harbour at noon.",
    "def area(radius): return pi * radius ** 2",
    "How long does bread dough have to rest before it goes into the oven?",
    "Rain.",
    "She read the letter twice, put it back into its envelope, and said nothing until the evening.",
)
"""Of different lengths, so that a batch of them is padded."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A model and what turns text into its input; a SentenceTransformer does that by itself."""

    model: nn.Module
    tokenizer: Any = None


def open_model(source: str) -> Opened:
    """Opens a dense model: the packaged encoder, a local folder, or a name on the hub.

    Raises:
        ValueError: there is no such model, it cannot be opened, or it is upcycled already.
    """
    # Bars of a library inside a verb that shows its own progress, or none.
    transformers.utils.logging.disable_progress_bar()
    folder = source_folder(source)
    if folder is not None and (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} holds an upcycled model; give the dense one it was made from")
    if folder is None or (folder / "modules.json").is_file():
        return Opened(pretrained_encoder(source))
    return _open_transformer(folder)


def _open_transformer(folder: Path) -> Opened:
    refuse_pickles(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = (config.get("architectures") or ["AutoModel"])[0]
        model = getattr(transformers, name, transformers.AutoModel).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
        tokenizer = None
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot open {folder} as a transformer ({reason})") from error
    return Opened(model.eval(), tokenizer)


@torch.no_grad()
def outputs(opened: Opened) -> Float[Tensor, "..."]:
    """What the model makes of the sentences: embeddings, or hidden states of the real tokens.

    Without a tokenizer the input is made of random token ids, some of them masked.
    """
    model = opened.model
    if isinstance(model, SentenceTransformer):
        made = model.encode(list(SENTENCES), convert_to_tensor=True, show_progress_bar=False)
        assert isinstance(made, Tensor)
        return made.clone()
    if opened.tokenizer is not None:
        inputs = dict(opened.tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))
    else:
        generator = torch.Generator().manual_seed(0)
        config = getattr(model, "config")  # noqa: B009 - a transformers model has one
        ids = torch.randint(config.vocab_size, (4, 16), generator=generator)
        mask = torch.arange(16) < torch.tensor([[16], [12], [5], [1]])
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
    first = model(**inputs)[0]
    return first[inputs["attention_mask"].bool()] if first.ndim == 3 else first


def relative_change(before: Float[Tensor, "..."], after: Float[Tensor, "..."]) -> float:
    """Length of the difference, as a share of the length of what was there before."""
    return float((after - before).double().norm() / before.double().norm())
