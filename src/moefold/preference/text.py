"""Candidates that are texts: an encoder makes vectors of them, a small net scores the vectors.

    features = embed(encoder, groups)                    each text once, the encoder is not trained
    head = PreferenceConfig(...).build(features);  fit(head, features, ...)
    model = with_encoder(head, encoder)                  takes texts from then on

    model = text_model(encoder, groups, config)          the encoder learns too
    fit(model, groups, ...)

With a context of text c, a candidate u becomes [u, u * c, |u - c|], so that even a linear net can
tell whether the two go together.

Shapes: `texts dim` of vectors, `texts features` of what the net is given.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moefold.preference.comparators import ConsistentComparator
from moefold.preference.groups import Groups
from moefold.preference.model import PreferenceConfig, PreferenceModel

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_AT_ONCE = 64
"""Texts that are encoded together."""


@final
class EncoderScorer(nn.Module):
    """A number for each text: a net on what an encoder makes of it.

    Args:
        encoder: a SentenceTransformer.
        head: a scorer of vectors, `[texts, features]` to `[texts, 1]`.
        trained: whether gradients reach the encoder, in training mode.
    """

    def __init__(self, encoder: "SentenceTransformer", head: nn.Module, *, trained: bool) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.head = head
        self.trained = trained
        for parameter in encoder.parameters():
            parameter.requires_grad_(trained)

    def train(self, mode: bool = True) -> "EncoderScorer":
        """Sets the mode; an encoder that is not trained stays in evaluation mode."""
        super().train(mode)
        self.encoder.train(mode and self.trained)
        return self

    def forward(
        self, texts: Sequence[str], context: Sequence[str] | None = None
    ) -> Float[Tensor, "texts 1"]:
        """A number for each text.

        Args:
            texts: candidates.
            context: a text for each.
        """
        both = list(texts) + ([] if context is None else list(context))
        place = {text: number for number, text in enumerate(dict.fromkeys(both))}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trained):
            vectors = _vectors(self.encoder, list(place))
        vectors = vectors.to(next(self.head.parameters()).dtype)
        rows = vectors[torch.tensor([place[text] for text in both], device=vectors.device)]
        if context is None:
            return self.head(rows)
        return self.head(together(rows[: len(texts)], rows[len(texts) :]))


def embed(
    encoder: "SentenceTransformer",
    groups: Groups,
    *,
    at_once: int = _AT_ONCE,
    advance: Callable[[int, int], None] | None = None,
) -> Groups:
    """The groups with vectors for texts, each of which is encoded once.

    Args:
        encoder: a SentenceTransformer; it is not trained.
        groups: of texts, with contexts of text if any.
        at_once: texts that are encoded together.
        advance: called after each of those with texts done and texts in all, for a progress bar.

    Raises:
        ValueError: candidates or contexts are no texts.
    """
    texts, context = _texts_of(groups)
    # Long texts together, so that little is padding; of equal ones in the order they come.
    place = {text: number for number, text in enumerate(dict.fromkeys(texts + (context or [])))}
    order = sorted(place, key=len, reverse=True)
    was_training = encoder.training
    encoder.eval()
    found: Tensor | None = None
    with torch.no_grad():
        for first in range(0, len(order), at_once):
            part = order[first : first + at_once]
            vectors = _vectors(encoder, part).float().cpu()
            if found is None:
                found = vectors.new_zeros(len(order), vectors.shape[1])
            found[torch.tensor([place[text] for text in part])] = vectors
            if advance is not None:
                advance(first + len(part), len(order))
    encoder.train(was_training)
    assert found is not None
    rows = found[torch.tensor([place[text] for text in texts])]
    if context is not None:
        own = found[torch.tensor([place[text] for text in context])]
        rows = together(rows, own[groups.group_of_candidate])
    return replace(groups, candidates=rows, context=None)


def with_encoder(head: PreferenceModel, encoder: "SentenceTransformer") -> PreferenceModel:
    """A model of texts, from one that was trained on what `embed` made of them.

    Args:
        head: of vectors, with a consistent comparator that `PreferenceConfig` built.
        encoder: the one of `embed`; it stays as it is.

    Raises:
        ValueError: the comparator is of another kind.
    """
    return _whole(head, encoder, trained=False)


def text_model(
    encoder: "SentenceTransformer", groups: Groups, config: PreferenceConfig | None = None
) -> PreferenceModel:
    """A model of texts whose encoder is trained with it.

    Args:
        encoder: changed in place by training.
        groups: of texts; a few of them say what vectors are like.
        config: of the net on vectors; the default if None.

    Raises:
        ValueError: candidates or contexts are no texts, or the comparator is not consistent.
    """
    few = groups.take(range(min(len(groups), 16)))
    config = PreferenceConfig() if config is None else config
    return _whole(config.build(embed(encoder, few)), encoder, trained=True)


def open_encoder(folder: Path) -> "SentenceTransformer":
    """Opens an encoder that `write_encoder` wrote, without a network.

    Raises:
        ValueError: it cannot be opened.
    """
    import sentence_transformers
    from safetensors import SafetensorError

    try:
        encoder = sentence_transformers.SentenceTransformer(
            str(folder),
            device="cpu",
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot open {folder} as a sentence encoder ({error})") from error
    return encoder.eval()


def write_encoder(scorer: EncoderScorer, folder: Path) -> None:
    """Writes the encoder of a scorer."""
    scorer.encoder.save_pretrained(str(folder), create_model_card=False, safe_serialization=True)


def together(
    u: Float[Tensor, "texts dim"], c: Float[Tensor, "texts dim"]
) -> Float[Tensor, "texts features"]:
    """What the net is given of a candidate u and its context c."""
    return torch.cat([u, u * c, (u - c).abs()], 1)


def _whole(head: PreferenceModel, encoder: Any, *, trained: bool) -> PreferenceModel:
    if not isinstance(head.comparator, ConsistentComparator):
        raise ValueError(
            f"texts are scored one by one, which a {type(head.comparator).__name__} does not; use "
            f"a ConsistentComparator"
        )
    scorer = EncoderScorer(encoder, head.comparator.scorer, trained=trained)
    model = PreferenceModel(
        ConsistentComparator(scorer), loss=head.loss, loss_settings=head.loss_settings
    )
    model.preference_config = head.preference_config
    model.temperature = head.temperature
    return model


def _texts_of(groups: Groups) -> tuple[list[str], list[str] | None]:
    for name, value in (("candidates", groups.candidates), ("context", groups.context)):
        if isinstance(value, Tensor):
            raise ValueError(
                f"{name} are numbers, of shape {tuple(value.shape)}; an encoder takes texts"
            )
    return groups.candidates, groups.context  # pyright: ignore[reportReturnType] - they are texts


def _vectors(encoder: Any, texts: list[str]) -> Tensor:
    device = next(encoder.parameters()).device
    features = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in encoder.preprocess(texts).items()
    }
    return encoder(features)["sentence_embedding"]


__all__ = [
    "EncoderScorer",
    "embed",
    "open_encoder",
    "text_model",
    "with_encoder",
    "write_encoder",
]
