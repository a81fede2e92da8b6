"""Counting the floating-point operations of what runs: products, attention, grouped products.

torch's `FlopCounterMode` with formulas for kernels that torch 2.13 has none for. As everywhere in
torch, one multiplication and one addition are two operations; element-wise work is left out, and
attention counts whole, also where later tokens are masked.

Shapes: a grouped product is of `rows in` with `groups in out`, each row with one of the groups.
"""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """A context that counts; `get_total_flops()` afterwards."""
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


def _attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _grouped(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Each row with one group; backward, `in rows` with `rows out`, each row in one of the sums."""
    groups = a[0] if len(a) == len(b) == 3 else 1  # groups of one size, as a batch
    return 2 * groups * a[-2] * a[-1] * b[-1]


_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._grouped_mm: _grouped,
}


__all__ = ["flop_counter"]
