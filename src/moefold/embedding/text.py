"""From texts to padded token ids: templates, cleaning, cutting, padding.

    'Rain'  ->  'This sentence : "Rain." means in one word:"'  ->  . . 5 9 2 7
                                                       mask        0 0 1 1 1 1

Padding is made here and not by the tokenizer: a decoder's tokenizer may have no token for it. The
id 0 stands there, as published, and the mask says that it is no token. Shapes: `batch tokens`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moefold.embedding.config import TEXT, EmbeddingConfig

PAD = 0
"""The id under padding."""

_ENDS = ".?!\"'"


def prepared(text: str, config: EmbeddingConfig, instruction: str | None = None) -> str:
    """A text in its template.

    Args:
        text: the text.
        config: template, instruction and cleaning.
        instruction: in place of the config's.
    """
    before, after, text = _parts(text, config, instruction)
    return before + text + after


def _parts(text: str, config: EmbeddingConfig, instruction: str | None) -> tuple[str, str, str]:
    """What stands before and after a text, and the text itself with its instruction."""
    text = (config.instruction if instruction is None else instruction) + text
    before, after = config.template.split(TEXT)
    if config.clean_text:
        if text and text[-1] not in _ENDS:
            text += "."
        text = text.replace('"', "'").replace("_", " ")
        before, after = before.replace("_", " "), after.replace("_", " ")
        before, text, after = _stripped(before, text, after)
    return before, after, text


def _stripped(*parts: str) -> tuple[str, ...]:
    """Parts that together have no space at either end, as if they were joined and stripped."""
    for strip, order in ((str.lstrip, 1), (str.rstrip, -1)):
        made: list[str] = []
        for part in parts[::order]:
            made.append(part if any(made) else strip(part))
        parts = tuple(made[::order])
    return parts


def tokens_of(
    texts: Sequence[str],
    tokenizer: Any,
    config: EmbeddingConfig,
    *,
    longest: int | None = None,
    instruction: str | None = None,
) -> dict[str, Int[Tensor, "batch tokens"]]:
    """Token ids and mask of texts, padded on the config's side.

    Args:
        texts: at least one.
        tokenizer: one of transformers.
        config: how texts are prepared.
        longest: most tokens of one; None for any number.
        instruction: in place of the config's.

    Raises:
        ValueError: a text has no token, or its template alone has too many.
    """
    rows = []
    for number, text in enumerate(texts):
        before, after, middle = _parts(text, config, instruction)
        ids = _ids(tokenizer, before + middle + after)
        if longest is not None and len(ids) > longest:
            ids = _cut(ids, longest, *_around(tokenizer, ids, before, after))
        if not ids:
            raise ValueError(
                f"text {number} ({text!r}) has no token; leave it out, or give a prompt, such as "
                f"prompt='quotes'"
            )
        rows.append(ids)
    width = max(map(len, rows))
    left = config.padding == "left"
    padded, masks = [], []
    for ids in rows:
        no, yes = [0] * (width - len(ids)), [1] * len(ids)
        padded.append([PAD] * len(no) + ids if left else ids + [PAD] * len(no))
        masks.append(no + yes if left else yes + no)
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}


def _ids(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _around(tokenizer: Any, ids: list[int], before: str, after: str) -> tuple[int, int]:
    """How many tokens stand before and after the text: the template's, and special ones.

    Counted without the text: where a token would join the two, the text loses one token more.
    """
    special = set(tokenizer.all_special_ids)
    counts = []
    for row, template in ((ids, before), (ids[::-1], after)):
        outer = next((place for place, i in enumerate(row) if i not in special), 0)
        counts.append(outer + (len(_ids(tokenizer, template, special=False)) if template else 0))
    return counts[0], counts[1]


def _cut(ids: list[int], longest: int, head: int, tail: int) -> list[int]:
    """The ids without the last ones of the text; the template stays whole."""
    if head + tail >= longest:
        raise ValueError(
            f"at most {longest} tokens are allowed, but {head + tail} stand around the text "
            f"already; give a larger max_length or a shorter prompt"
        )
    return ids[: longest - tail] + ids[len(ids) - tail :]
