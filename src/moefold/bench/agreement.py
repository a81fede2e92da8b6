"""Whether a layer computes what the reference computes: nothing that does not is timed.

Shapes: `batch tokens dim`; gradients as in `moefold.experts`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moefold.bench.layers import weights_of
from moefold.bench.shapes import Shape
from moefold.moe import MoE

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2.5e-3, "amp": 2e-2}
"""Largest relative error in the Frobenius norm, of the result or of any gradient.

Of a gradient of a single number see `disagreement`.

fp32: rounding of 2^-24 grows with the square root of the number of terms, some thousands, and stays
under 1e-5. bf16: values are rounded to 2^-9 at five places in a row, and a peer's router rounds its
weights, which adds up to under 2e-2; a wrong expert for one token in 200 gives more than that. fp16
has three more bits than bf16. amp: as bf16.
"""

# A peer's logit in bf16 is off by 2^-8 of its size (they are below 4 here), on both sides of a gap.
SAFE_GAP = 2 * 4 * 2**-8
# Under autocast tokens and the router's weights are rounded, too: each by 2^-9 of itself at most,
# and by 2^-9 / 3^0.5 as a root mean square. A logit, of unit size in the mean, is then off by
# 2^-9 * (2 / 3)^0.5; 8 times that is less than what is allowed above for its own rounding.
AMP_GAP = 2 * SAFE_GAP

_PIECE = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """The largest relative error, and where it is."""

    error: float
    where: str


def draw_inputs(
    shape: Shape,
    master: MoE,
    number: int,
    dtype: torch.dtype,
    device: str,
    gap: float = SAFE_GAP,
) -> list[Tensor]:
    """Random tokens `[sequences, tokens, dim]` that want a gradient.

    Where tokens choose, those whose choice rounding to bfloat16 could turn are left out: peers
    route in the dtype of the layer, we in float32, and both must choose alike to be compared. Their
    last choice is more than `gap` before the first that they did not make.

    Raises:
        ValueError: hardly any token chooses clearly.
    """
    inputs = []
    for _ in range(number):
        if shape.router == "token-choice" and shape.k < shape.experts:
            flat = _clear(shape, weights_of(master)["router.weight"], dtype, gap)
        else:
            flat = torch.randn(shape.tokens, shape.dim, device=device).to(dtype)
        x = flat.reshape(shape.sequences, -1, shape.dim)
        inputs.append(x.requires_grad_())
    return inputs


def outcome(
    layer: nn.Module, x: Tensor, back: Tensor | None, gradients: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The result and every gradient of one pass, or the result alone; leaves no gradient behind."""
    if back is None:
        with torch.no_grad():
            return {"y": layer(x).clone()}
    x.grad = None
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    y.backward(back)
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad, **gradients()}
    found = {name: tensor.detach().clone() for name, tensor in found.items()}
    x.grad = None
    layer.zero_grad(set_to_none=True)
    return found


def gradients_of(layer: MoE) -> dict[str, Tensor]:
    """Those of one of our layers."""
    return {name: p.grad for name, p in weights_of(layer).items() if p.grad is not None}


def disagreement(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Disagreement:
    """The largest error over what was found.

    A gradient of a single number is a sum of very many that nearly cancel: its rounding is that of
    what was added, not of what is left. It is judged together with its module's other gradients.
    """
    errors = {}
    for name in found:
        names = [name]
        if wanted[name].numel() == 1:
            names = [other for other in found if _module(other) == _module(name)]
        errors[name] = _relative([found[n] for n in names], [wanted[n] for n in names])
    # NaN is larger than any number.
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return Disagreement(error=errors[worst], where=worst)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _relative(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    off = of = 0.0
    for mine, theirs in zip(found, wanted, strict=True):
        if mine.shape != theirs.shape:
            return float("inf")
        # In pieces: a gradient of a billion numbers, in float64 and three times, may not fit.
        pieces = (t.detach().reshape(-1).split(_PIECE) for t in (mine, theirs))
        for one, other in zip(*pieces, strict=True):
            off += float((one.double() - other.double()).square().sum())
            of += float(other.double().square().sum())
    return math.sqrt(off) / max(math.sqrt(of), 1e-30)


def _clear(shape: Shape, router: Tensor, dtype: torch.dtype, gap: float) -> Tensor:
    kept: list[Tensor] = []
    have = 0
    weight = router.float().t()
    for _ in range(8):
        pool = torch.randn(2 * shape.tokens, shape.dim, device=router.device).to(dtype)
        best = (pool.float() @ weight).detach().topk(shape.k + 1, dim=-1).values
        clear = pool[best[:, -2] - best[:, -1] > gap]
        kept.append(clear)
        have += len(clear)
        if have >= shape.tokens:
            return torch.cat(kept)[: shape.tokens]
    raise ValueError(
        f"shape {shape.name!r}: only {have} of {16 * shape.tokens} tokens choose clearly among "
        f"{shape.experts} experts; give it fewer experts"
    )


__all__ = [
    "AMP_GAP",
    "SAFE_GAP",
    "TOLERANCE",
    "Disagreement",
    "disagreement",
    "draw_inputs",
    "gradients_of",
    "outcome",
]
