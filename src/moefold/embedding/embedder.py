"""A model and a tokenizer as a SentenceTransformer: `embedder(model, tokenizer).encode(texts)`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase

from moefold.embedding.config import EmbeddingConfig
from moefold.embedding.module import SETTINGS, MixtureEmbedding


def embedder(
    model: Any, tokenizer: PreTrainedTokenizerBase, config: EmbeddingConfig | None = None
) -> SentenceTransformer:
    """A causal mixture as a SentenceTransformer: `encode`, `similarity`, `save_pretrained`.

    The model is the given one, not a copy, and stays on its device. Reroute it before or
    afterwards: every pass asks the model as it is then.

    Args:
        model: a causal model of transformers.
        tokenizer: its tokenizer.
        config: how a text becomes a vector; the last hidden state of the last token if None.

    Raises:
        ValueError: see `MixtureEmbedding`.
    """
    module = MixtureEmbedding(model, tokenizer, config)
    return SentenceTransformer(modules=[module], device=str(model.device))


def fit(encoder: SentenceTransformer, texts: Sequence[str], *, batch_size: int = 32) -> None:
    """Learns mean and deviation of every feature from text, for `standardize="fitted"`.

    Args:
        encoder: what `embedder` returned.
        texts: a few hundred of the kind that will be embedded.
        batch_size: texts per pass; the result does not depend on it.

    Raises:
        ValueError: fewer than two texts, or no encoder of ours.
    """
    module = next(iter(encoder.children()), None)
    if not isinstance(module, MixtureEmbedding):
        raise ValueError(
            f"a SentenceTransformer of {type(module).__name__} has nothing to fit; give what "
            f"moefold.embedding.embedder returned"
        )
    module.fit(texts, batch_size=batch_size)


def open_embedder(folder: str | Path) -> SentenceTransformer:
    """Opens what the `save_pretrained` of an embedder wrote.

    SentenceTransformer itself opens the folder too, where moefold can be imported; since the module
    is not its own, it wants to be told so: `SentenceTransformer(folder, trust_remote_code=True)`.

    Raises:
        ValueError: the folder holds something else.
    """
    folder = Path(folder)
    try:
        listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = [str(module["type"]) for module in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} holds no embedding of moefold ({error}); give a folder that the encoder's "
            f"save_pretrained wrote"
        ) from error
    own = f"{MixtureEmbedding.__module__}.{MixtureEmbedding.__name__}"
    strangers = [k for k in kinds if k != own and not k.startswith("sentence_transformers.")]
    if own not in kinds or strangers or not (folder / SETTINGS).is_file():
        raise ValueError(
            f"{folder} holds modules {', '.join(kinds)}, not an embedding of moefold; open it with "
            f"SentenceTransformer"
        )
    return SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, trust_remote_code=True
    ).eval()
