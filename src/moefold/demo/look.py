"""Look into the trained MoE: run held-out texts through it and tally who chooses whom.

Shapes: `batch tokens` of token ids and their attention mask.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

import moefold
from moefold.demo.pairs import Pair
from moefold.inspect import Tally

_COUNTED = 200  # pairs; twice as many texts
_SHOWN = 3
_WORDS = 6  # at least, of a docstring that is shown
_READABLE = range(120, 420)  # characters of code that fit on a page


def look(encoder: SentenceTransformer, pairs: Sequence[Pair], batch_size: int) -> dict[str, Any]:
    """Tally the choices of the MoE on held-out pairs.

    Args:
        encoder: an upcycled encoder.
        pairs: the held-out pairs; the first 200 are counted, after three that are shown.
        batch_size: texts per pass.

    Returns:
        `titles` of the texts that are shown, and `choices` as `Choices.to_dict` makes them.
    """
    shown = _to_show(pairs)
    rest = [pair for pair in pairs[:_COUNTED] if pair not in shown]
    # A docstring beside code would be mostly padding, so each kind of text has its own batches.
    batches = [[text] for pair in shown for text in (pair.query, pair.code)]
    for texts in ([pair.query for pair in rest], [pair.code for pair in rest]):
        texts.sort(key=len)
        batches.extend(texts[i : i + batch_size] for i in range(0, len(texts), batch_size))
    tally = Tally(keep=2 * len(shown))
    was_training = encoder.training
    encoder.eval()
    with torch.no_grad(), moefold.record_routing(encoder) as record:
        for texts in batches:
            features = {k: v.to(encoder.device) for k, v in _tensors(encoder.preprocess(texts))}
            encoder(dict(features))
            tally.add(record, _as_text(encoder, features))
            record.clear()
    encoder.train(was_training)
    titles = [f"{pair.name}: {what}" for pair in shown for what in ("docstring", "code")]
    return {"titles": titles, "choices": tally.choices().to_dict()}


def _to_show(pairs: Sequence[Pair]) -> list[Pair]:
    """A few pairs that are pleasant to read, no two from one module."""
    readable = {
        pair.module: pair
        for pair in pairs
        if len(pair.code) in _READABLE and len(pair.query.split()) >= _WORDS
    }
    return (list(readable.values()) or list(pairs))[:_SHOWN]


def _tensors(features: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(name, v) for name, v in features.items() if isinstance(v, torch.Tensor)]


def _as_text(
    encoder: SentenceTransformer, features: dict[str, torch.Tensor]
) -> list[list[str | None]]:
    """The tokens of a batch as text, None for padding."""
    out = []
    ids, masks = features["input_ids"].tolist(), features["attention_mask"].tolist()
    for row, mask in zip(ids, masks, strict=True):
        words = encoder.tokenizer.convert_ids_to_tokens(row)
        out.append([word if real else None for word, real in zip(words, mask, strict=True)])
    return out
