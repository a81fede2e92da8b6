"""Opening a dense model for a verb, and sample sentences to measure it on."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from torch import nn

from moefold.surgery.encoder import pretrained_encoder, refuse_pickles, source_folder
from moefold.surgery.hosts.checkpoint import open_processor, open_whole, without_reports
from moefold.surgery.inputs import made_up_inputs
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

_LONGEST = 64
"""Tokens of a sentence that are used; a tokenizer of few words makes many of it."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A model and what makes its input: a tokenizer or processor; a SentenceTransformer has one."""

    model: nn.Module
    processor: Any = None


def open_model(source: str) -> Opened:
    """Opens a dense model: the packaged encoder, a local folder, or a name on the hub.

    Warns of weights that are not in the folder.

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
    refuse_pickles(folder)  # in its own words
    try:
        model, found = open_whole(folder)
        with without_reports():
            processor = open_processor(folder)
    except (
        *(OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError),
        *(ImportError, SafetensorError),
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cannot open {folder} as a transformer ({reason}); give a folder that save_pretrained "
            f"wrote, with config.json and whole safetensors files"
        ) from error
    _check(folder, found)
    return Opened(model, processor)


def _check(folder: Path, found: dict[str, Any]) -> None:
    """Weights that the class has no place for are nobody's loss; others are.

    Raises:
        ValueError: weights have other shapes than config.json says.
    """
    if wrong := [
        f"{key} is {list(here)}, not {list(wanted)}"
        for key, here, wanted in sorted(found["mismatched_keys"])
    ]:
        raise ValueError(
            f"the weights in {folder} are not those of its config.json: {_some(wrong)}; copy both "
            f"from the same place"
        )
    if missing := sorted(found["missing_keys"]):
        warnings.warn(
            f"{folder} lacks {_some(missing)}; what is missing starts at random numbers",
            stacklevel=2,
        )


def _some(what: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(what) - shown} more" if len(what) > shown else ""
    return f"{', '.join(what[:shown])}{more}"


def sample_inputs(opened: Opened) -> dict[str, Any] | None:
    """The sentences as the model takes them; None for one without a tokenizer or not of text only.

    Returns:
        Arguments of its forward. Padding is made here: a decoder's tokenizer may have none.
    """
    model = opened.model
    made_up = made_up_inputs(model)
    if made_up is None or "input_ids" not in made_up[0] or "pixel_values" in made_up[0]:
        return None
    if isinstance(model, SentenceTransformer):
        return dict(model.preprocess(list(SENTENCES)))
    if not isinstance(opened.processor, transformers.PreTrainedTokenizerBase):
        return None
    config = getattr(model, "config")  # noqa: B009 - a model with made-up inputs has one
    longest = min(_LONGEST, int(getattr(config, "max_position_embeddings", None) or _LONGEST) - 2)
    rows = [ids[:longest] for ids in opened.processor(list(SENTENCES))["input_ids"]]
    if max(map(max, rows)) >= config.vocab_size:  # the tokenizer of another model
        return None
    width, pad = max(map(len, rows)), opened.processor.pad_token_id or 0
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "decoder_input_ids" in made_up[0]:
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return inputs
