"""A vector for every text, made once: in parts, each of which leaves a file, so that a run goes on.

A part's file is named by its texts and its encoder; one of other texts is never taken for it.

Shapes: `texts dim`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from moefold.evaluate.files import whole_file
from studies.files import digest

AT_ONCE = 256
"""Texts of a part."""

BATCH = 32


def vectors(
    texts: Sequence[str],
    folder: Path,
    name: str,
    opened: Callable[[], Any],
    advance: Callable[[int], None] | None = None,
) -> dict[str, Float[Tensor, " dim"]]:
    """The vector of each text, from the folder if it is there.

    Args:
        texts: in any order, each once.
        folder: of the parts.
        name: of the encoder, hash and all: vectors of another one are not used.
        opened: opens the encoder, a SentenceTransformer; called only if a part is missing.
        advance: called after each part with its number of texts, for a progress bar.
    """
    order = sorted(texts, key=lambda text: (len(text), text))  # alike in length: little is padded
    encoder: Any = None
    found: dict[str, Tensor] = {}
    for first in range(0, len(order), AT_ONCE):
        part = order[first : first + AT_ONCE]
        path = folder / f"{digest(chr(0).join([name, *part]))}.safetensors"
        if not path.exists():
            encoder = opened() if encoder is None else encoder
            with torch.no_grad():
                made = encoder.encode(
                    part, batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False
                )
            with whole_file(path) as beside:
                save_file({"vectors": made.float().cpu().contiguous()}, beside)
        found.update(zip(part, load_file(path)["vectors"], strict=True))
        if advance is not None:
            advance(len(part))
    return found
