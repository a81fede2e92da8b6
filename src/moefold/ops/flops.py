"""Counting the floating-point operations of what runs: products, attention, grouped products.

torch's `FlopCounterMode` with formulas for kernels that torch 2.13 has none for, and for operators
of our own, into which it cannot look. As everywhere in torch, one multiplication and one addition
are two operations; element-wise work is left out, and attention counts whole, also where later
tokens are masked. A row costs the matrices of its expert:

    forward    2 * (dim * wide + width * dim)
    backward   as much for the gradient of the row, and as much for those of the matrices; what
               nobody wants is not counted

A list of rows may be longer than what experts compute: a graph and a GPU keep *spare* rows (see
`routing.sparse`). Counted are the rows that `rows_per_expert` says, for which a GPU is waited for.
Where that is not data (on the meta device, under a fake tensor), every row of the list counts: no
batch of this shape can cost more.

Shapes: a grouped product is of `rows in` with `groups in out`, each row with one of the groups.
Experts are as in `experts.backends.base`: `experts wide dim` and `experts dim width`.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from moefold.ops import kernels

Given = Mapping[str, Any]
"""What an operator was called with, by the names of its schema."""


def flop_counter() -> FlopCounterMode:
    """A context that counts; `get_total_flops()` afterwards.

    Count the model itself: torch.compile refuses to run in a context like this one.
    """
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS | _formulas_of_ours())


def _attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _grouped(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Each row with one group; backward, `in rows` with `rows out`, each row in one of the sums."""
    groups = a[0] if len(a) == len(b) == 3 else 1  # groups of one size, as a batch
    return 2 * groups * a[-2] * a[-1] * b[-1]


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._grouped_mm: _grouped,
}


def _grouped_mm(given: Given) -> int:
    return 2 * _rows(given, given["rows"]) * given["weights"][0].numel()


def _grouped_outer(given: Given) -> int:
    left, right = given["left"], given["right"]
    return 2 * _rows(given, left) * left.shape[1] * right.shape[1]


def _experts(given: Given) -> int:
    return 2 * _rows_of_experts(given) * sum(_matrices(given))


def _experts_backward(given: Given) -> int:
    first, second = _matrices(given)
    for_x, for_weight, for_up, for_down, for_up_bias, _ = given["wanted"]
    products = second * (for_x or for_weight or for_up or for_up_bias)  # the gradient of `hidden`
    products += second * for_down + first * for_up + first * for_x
    return 2 * _rows_of_experts(given) * products


def _matrices(given: Given) -> tuple[int, int]:
    """How many numbers the two matrices of one expert have."""
    (_, wide, dim), (_, out, width) = given["up"].shape, given["down"].shape
    return wide * dim, out * width


def _rows_of_experts(given: Given) -> int:
    listed = given["token_of_row"]
    return _rows(given, given["x"] if listed is None else listed)


def _rows(given: Given, listed: Tensor) -> int:
    """How many rows have an expert; all that are listed if that is not known."""
    counts = given["rows_per_expert"]
    # Neither a fake tensor nor one of the meta device holds data.
    known = type(counts) is Tensor and not counts.is_meta
    return int(counts.sum()) if known else listed.shape[0]


def _soft(given: Given) -> int:
    return 2 * given["logits"].numel() * given["values"].shape[1]


_OURS: dict[str, Callable[[Given], int]] = {
    "grouped_mm": _grouped_mm,
    "grouped_outer": _grouped_outer,
    "fused_experts": _experts,
    "fused_experts_backward": _experts_backward,
    "triton_experts": _experts,
    "triton_experts_backward": _experts_backward,
    "soft_mix": _soft,
    "soft_mix_backward": lambda given: 2 * _soft(given),
}
"""Operators of `moefold::` that multiply matrices, by name: who counts need not import them."""


def _formulas_of_ours() -> dict[Any, Callable[..., int]]:
    if (kernels.on_cuda or kernels.everywhere) and find_spec("triton") is not None:
        # Imported at its first use, which may be while somebody counts.
        import_module("moefold.ops.triton.soft")
    packets = {name: getattr(torch.ops.moefold, name, None) for name in _OURS}
    return {packet: _by_name(packet, _OURS[name]) for name, packet in packets.items() if packet}


def _by_name(packet: Any, formula: Callable[[Given], int]) -> Callable[..., int]:
    """A formula as torch calls it: with tensors instead of shapes, in the order of the schema."""
    names = [argument.name for argument in packet.default._schema.arguments]

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula({**dict(zip(names, args, strict=False)), **kwargs})

    count._get_raw = True  # pyright: ignore[reportFunctionMemberAccess]
    return count


__all__ = ["flop_counter"]
