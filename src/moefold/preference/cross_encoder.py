"""Candidates that are texts, read together with their context by a model of transformers.

    classifier = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
    model = cross_encoder_model(classifier, AutoTokenizer.from_pretrained(name))
    fit(model, groups, FitConfig(epochs=2, batch_size=8, learning_rate=2e-5))

An encoder of sentences (`moefold.preference.text`) sees each text once and by itself, which is
faster where a text stands in many groups; a cross-encoder sees every word of a candidate beside
every word of the question. Upcycled classifiers are models of transformers too.

Source: Nogueira and Cho, *Passage Re-ranking with BERT*, 2019; as a model of choices this is the
reward model of Ouyang et al. 2022.

Shapes: `texts`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from jaxtyping import Float
from torch import Tensor, nn

from moefold.preference.comparators import ConsistentComparator
from moefold.preference.model import PreferenceModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@final
class CrossEncoderScorer(nn.Module):
    """A number for each text, by a sequence classifier with one output.

    Args:
        encoder: a model of transformers, as `AutoModelForSequenceClassification` opens it with
            `num_labels=1`; it is trained with what it scores.
        tokenizer: its tokenizer. Texts that are too long lose their end, the longer one first.

    Raises:
        ValueError: the model has another number of outputs, or no token to pad with.
    """

    def __init__(self, encoder: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        super().__init__()
        outputs = getattr(encoder.config, "num_labels", None)
        if outputs != 1:
            raise ValueError(
                f"the model has {outputs} outputs; open it with num_labels=1, for a text has one "
                f"score"
            )
        if tokenizer.pad_token_id is None or encoder.config.pad_token_id is None:
            raise ValueError(
                "texts of a batch differ in length, and there is no token to pad them with; set "
                "tokenizer.pad_token and model.config.pad_token_id"
            )
        self.encoder: Any = encoder
        self.tokenizer: Any = tokenizer

    def forward(
        self, texts: Sequence[str], context: Sequence[str] | None = None
    ) -> Float[Tensor, "texts 1"]:
        """A number for each text.

        Args:
            texts: candidates.
            context: a text for each, read before it.
        """
        if not len(texts):
            return next(self.encoder.parameters()).new_zeros(0, 1)
        parts = [list(texts)] if context is None else [list(context), list(texts)]
        inputs = self.tokenizer(*parts, padding=True, truncation=True, return_tensors="pt")
        return self.encoder(**inputs.to(self.encoder.device)).logits


def cross_encoder_model(
    encoder: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    loss: str = "pair-logistic",
    loss_settings: Mapping[str, Any] | None = None,
) -> PreferenceModel:
    """A model of texts whose classifier is trained, in place.

    Args:
        encoder: a sequence classifier of transformers with one output.
        tokenizer: its tokenizer.
        loss: one of `preference_losses`.
        loss_settings: of the loss.

    Raises:
        ValueError: as `CrossEncoderScorer`, or no such loss.
    """
    comparator = ConsistentComparator(CrossEncoderScorer(encoder, tokenizer))
    return PreferenceModel(comparator, loss=loss, loss_settings=loss_settings)


def write_cross_encoder(scorer: CrossEncoderScorer, folder: Path) -> None:
    """Writes the classifier of a scorer and its tokenizer, as transformers does."""
    scorer.encoder.save_pretrained(str(folder), safe_serialization=True)
    scorer.tokenizer.save_pretrained(str(folder))


def open_cross_encoder(folder: Path) -> CrossEncoderScorer:
    """Opens what `write_cross_encoder` wrote, without a network.

    Raises:
        ValueError: it cannot be opened.
    """
    import transformers
    from safetensors import SafetensorError

    told = {"local_files_only": True, "trust_remote_code": False}
    try:
        encoder = transformers.AutoModelForSequenceClassification.from_pretrained(
            str(folder), use_safetensors=True, **told
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **told)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot open {folder} as a cross-encoder ({error})") from error
    return CrossEncoderScorer(encoder.eval(), tokenizer)


__all__ = [
    "CrossEncoderScorer",
    "cross_encoder_model",
    "open_cross_encoder",
    "write_cross_encoder",
]
