"""How many floating-point operations training on a text costs.

Counted, not estimated: torch's `FlopCounterMode` watches the matrix products of one forward and
backward pass. Texts are passed one at a time, so no padding is counted, and sparse experts count
with the rows they really computed: two models are compared by what they must do, not by how well a
batch was packed. As everywhere in torch, one multiplication and one addition are two operations;
element-wise work is left out.
"""

from collections.abc import Sequence
from typing import Any

import torch

from moefold.ops.flops import flop_counter


def training_flops(encoder: Any, texts: Sequence[str]) -> float:
    """The mean number of operations of one forward and backward pass per text.

    Args:
        encoder: a `SentenceTransformer`; its parameters and their gradients are left as they were.
        texts: a sample of what it will be trained on; at least one.

    Raises:
        ValueError: if there are no texts.
    """
    if not texts:
        raise ValueError("there are 0 texts to count with; give at least 1")
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    was_training = encoder.training
    encoder.train()
    counter = flop_counter()
    try:
        with counter, torch.random.fork_rng(devices=[]):
            for text in texts:
                features = {
                    name: value.to(encoder.device) if isinstance(value, torch.Tensor) else value
                    for name, value in encoder.preprocess([text]).items()
                }
                total = encoder(features)["sentence_embedding"].sum()
                torch.autograd.grad(total, parameters, allow_unused=True)
    finally:
        encoder.train(was_training)
    return counter.get_total_flops() / len(texts)
