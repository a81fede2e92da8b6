"""The module a SentenceTransformer holds: a causal model that makes one vector of a text.

    texts -> ids, mask -> one pass -> hidden, logits -> pooled -> standardized -> joined -> vector

Shapes: `batch tokens` ids and mask, `batch dim` vectors.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefold.embedding.config import EmbeddingConfig
from moefold.embedding.passes import run
from moefold.embedding.pool import joined, pooled, standardized
from moefold.embedding.saved import read_model, write_model
from moefold.embedding.text import tokens_of
from moefold.modes import competing
from moefold.record import AbstractRouted
from moefold.rerouting.blocks import find_blocks
from moefold.surgery.hosts.checkpoint import open_tokenizer

SETTINGS = "moefold_embedding.json"
"""The file that says how vectors are made."""

STATISTICS = "moefold_embedding.safetensors"
"""The file of means and deviations, where they were fitted."""


@final
class MixtureEmbedding(InputModule):
    """Makes embeddings with a causal model of transformers, rerouted, upcycled or as it is.

    Args:
        model: the model, with or without its head.
        tokenizer: its tokenizer; it may have no token for padding.
        config: how a text becomes a vector.

    Raises:
        ValueError: the model is not causal or no model of transformers, has no mixture where
            routing weights are wanted, or no such layer.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, config: EmbeddingConfig | None = None
    ) -> None:
        super().__init__()
        config = EmbeddingConfig() if config is None else config
        _check_model(model, config)
        self.model = model
        self.tokenizer: Any = tokenizer
        self.config = config
        self.max_seq_length = _longest(model, config)
        hidden, routing = self.parts(torch.zeros(1, 1).long(), torch.ones(1, 1).bool())
        widths = [0 if part is None else part.shape[1] for part in (hidden, routing)]
        self._dim = sum(widths)
        for name, width in zip(("hidden", "routing"), widths, strict=True):
            for what in ("mean", "std"):
                self.register_buffer(f"{name}_{what}", torch.zeros(width), persistent=False)
        self.fitted = False

    @torch.no_grad()
    def parts(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch hidden"] | None, Float[Tensor, "batch routing"] | None]:
        """What vectors are made of: a pooled hidden state and pooled routing weights.

        Args:
            ids: token ids.
            mask: True for real tokens, which stand next to each other.
        """
        config = self.config
        device = self.model.device
        ids, mask = ids.to(device), mask.to(device)
        with competing(self.model) if config.compete else nullcontext():
            hidden, heard = run(
                self.model, ids, mask, layer=config.layer, routing=config.needs_routing
            )
        states = pooled(hidden, mask, config.pooling) if config.needs_hidden else None
        if not config.needs_routing:
            return states, None
        logits = [one.to(device) for one in heard.values()]
        if config.routing_of == "softmax":
            logits = [one.softmax(-1) for one in logits]
        return states, torch.cat([pooled(one, mask, config.routing_pooling) for one in logits], 1)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` to ids and mask."""
        hidden, routing = self.parts(features["input_ids"], features["attention_mask"].bool())
        hidden, routing = (
            part if part is None else self._standardized(name, part)
            for name, part in (("hidden", hidden), ("routing", routing))
        )
        weight = self.config.similarity_weight
        vectors = joined(hidden, routing, self.config.kind, weight)
        return {**features, "sentence_embedding": vectors}

    def _standardized(self, name: str, part: Tensor) -> Tensor:
        if self.config.standardize == "none":
            return part
        if self.config.standardize == "batch":
            return standardized(part)
        if not self.fitted:
            raise ValueError(
                "standardize is 'fitted', and nothing was fitted yet; call "
                "moefold.embedding.fit(encoder, texts) with a few hundred texts first"
            )
        mean, std = (self.get_buffer(f"{name}_{what}").to(part) for what in ("mean", "std"))
        return standardized(part, mean, std)

    def fit(self, texts: Sequence[str], *, batch_size: int = 32) -> None:
        """Learns mean and deviation of every feature, for `standardize="fitted"`.

        Raises:
            ValueError: fewer than two texts.
        """
        if len(texts) < 2:
            raise ValueError(f"{len(texts)} texts have no deviation; give at least 2 to fit")
        found: dict[str, list[Tensor]] = {"hidden": [], "routing": []}
        for start in range(0, len(texts), batch_size):
            made = self.preprocess(texts[start : start + batch_size])
            parts = self.parts(made["input_ids"], made["attention_mask"].bool())
            for name, part in zip(found, parts, strict=True):
                if part is not None:
                    found[name].append(part.double().cpu())
        for name, pieces in found.items():
            if pieces:
                rows = torch.cat(pieces)
                self.register_buffer(f"{name}_mean", rows.mean(0), persistent=False)
                self.register_buffer(f"{name}_std", rows.std(0), persistent=False)
        self.fitted = True

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """Ids and mask of texts.

        Args:
            inputs: the texts.
            prompt: an instruction, in place of the config's.
        """
        return tokens_of(
            [str(text) for text in inputs],
            self.tokenizer,
            self.config,
            longest=self.max_seq_length,
            instruction=prompt or None,  # "" is what a SentenceTransformer has for none
        )

    def get_embedding_dimension(self) -> int:
        """Length of a vector."""
        return self._dim

    def get_config_dict(self) -> dict[str, Any]:
        """What `print` shows of it."""
        return self.config.to_dict()

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **_: Any) -> None:
        """Writes model, tokenizer and settings; weights are safetensors only.

        Raises:
            ValueError: another format of weights is asked for.
        """
        if not safe_serialization:
            raise ValueError("weights are written as safetensors only; leave safe_serialization on")
        folder = Path(output_path)
        write_model(self.model, folder)
        self.tokenizer.save_pretrained(folder)
        settings = json.dumps({"embedding": self.config.to_dict()}, indent=2)
        (folder / SETTINGS).write_text(settings + "\n", encoding="utf-8")
        if self.fitted:
            save_file(dict(self.named_buffers(recurse=False)), folder / STATISTICS)

    @classmethod
    def load(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest is for the hub
        cls, model_name_or_path: str, subfolder: str = "", **_: Any
    ) -> "MixtureEmbedding":
        """Reads what `save` wrote, from a local folder; code in the folder is never run.

        Raises:
            ValueError: the folder does not hold such an embedding.
        """
        folder = Path(model_name_or_path) / subfolder
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            config = EmbeddingConfig.from_dict(settings["embedding"])
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} holds no embedding of moefold ({SETTINGS}: {error}); give a local "
                f"folder that the encoder's save_pretrained wrote"
            ) from error
        model = read_model(folder)  # first: with it its type becomes known to the tokenizer's class
        made = cls(model, open_tokenizer(folder), config)
        if (folder / STATISTICS).is_file():
            for name, value in load_file(folder / STATISTICS).items():
                made.register_buffer(name, value, persistent=False)
            made.fitted = True
        return made


def _check_model(model: Any, config: EmbeddingConfig) -> None:
    who = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {who} is no model of transformers; give a causal one, such as an OlmoeForCausalLM"
        )
    said = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if model.config.is_encoder_decoder or not any(said):
        raise ValueError(
            f"{who} is not causal: its last token is no summary of a text. Use it as a "
            f"SentenceTransformer with its own pooling (moefold.surgery.pretrained_encoder opens "
            f"a folder so)"
        )
    depth = int(model.config.get_text_config().num_hidden_layers)
    if not -depth - 1 <= config.layer <= depth:
        raise ValueError(
            f"layer is {config.layer}, but {who} has hidden states 0 (embeddings) to {depth} "
            f"(after the final norm); give one of these, or -1 for the last"
        )
    mixtures = any(isinstance(m, AbstractRouted) for m in model.modules()) or find_blocks(model)
    if config.needs_routing and not mixtures:
        raise ValueError(
            f"kind is {config.kind!r}, but {who} is dense and has no routing weights; use "
            f"kind='hidden', or make experts of it with moefold.upcycle"
        )


def _longest(model: Any, config: EmbeddingConfig) -> int | None:
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    given = [n for n in (config.max_length, places) if n is not None]
    return min(given) if given else None
