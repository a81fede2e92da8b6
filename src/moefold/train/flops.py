"""How many floating-point operations training on a text costs.

Counted, not estimated: torch's `FlopCounterMode` watches the matrix products of one forward and
backward pass. Texts are passed one at a time, so no padding is counted, and sparse experts count
with the rows they really computed: two models are compared by what they must do, not by how well a
batch was packed. As everywhere in torch, one multiplication and one addition are two operations;
element-wise work is left out.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


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
    counter = FlopCounterMode(display=False, custom_mapping=_missing_formulas())
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


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas for products that torch 2.13 does not count by itself."""
    aten = torch.ops.aten
    known = {
        "_grouped_mm": _grouped_mm_flops,
        "_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward_flops,
    }
    return {getattr(aten, name): formula for name, formula in known.items() if hasattr(aten, name)}


def _grouped_mm_flops(a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """`[rows, d] @ [experts, d, f]` and, for the gradient of the weights, `[d, rows] @ [rows, f]`.

    Every row meets the matrix of one expert only.
    """
    return 2 * prod(a) * b[-1]


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)
