"""Problems for a backend, their solution by the definition, and how close to it is close.

Shapes: `rows dim` in and out, sorted by expert.

How close is close: both the backend and the reference loop are measured against the reference in
float64 on the same numbers. A backend may be as far from it as `SLACK` times what the reference
loop is in the same dtype, because summing in another order changes rounding by a small factor and a
mistake by orders of magnitude. Errors are relative to the largest number of a tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefold.experts import AbstractBackend, ExpertWeights
from moefold.experts.backends.reference import ReferenceBackend

SLACK = 4.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """Rows of some experts, their weights, and the gradient that comes back."""

    rows: Float[Tensor, "rows dim"]
    counts: Int[Tensor, " experts"]
    weights: ExpertWeights
    back: Float[Tensor, "rows dim"]

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another dtype, as leaves that want a gradient."""
        moved = {name: leaf(tensor, dtype) for name, tensor in tensors_of(self.weights).items()}
        weights = replace(self.weights, **moved)
        rows = leaf(self.rows, dtype)
        return replace(self, rows=rows, weights=weights, back=self.back.to(dtype))

    def leaves(self) -> dict[str, Tensor]:
        """Everything a gradient may be asked for."""
        return {"rows": self.rows, **tensors_of(self.weights)}


def leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that wants a gradient."""
    return tensor.detach().to(dtype, copy=True).requires_grad_()


def tensors_of(weights: ExpertWeights) -> dict[str, Tensor]:
    """The parameters that are there, by name."""
    named = ((field.name, getattr(weights, field.name)) for field in fields(weights))
    return {name: value for name, value in named if isinstance(value, Tensor)}


def problem(
    counts: Sequence[int],
    dim: int,
    width: int,
    *,
    gated: bool = True,
    bias: bool = True,
    activation: str = "silu",
    spare: int = 0,
    device: str = "cpu",
) -> Problem:
    """Random numbers, rounded to bfloat16 so that every dtype starts from the same ones."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).bfloat16().double().to(device)

    experts, wide = len(counts), 2 * width if gated else width
    rows = sum(counts) + spare
    weights = ExpertWeights(
        up=draw(experts, wide, dim, scale=dim**-0.5),
        down=draw(experts, dim, width, scale=width**-0.5),
        up_bias=draw(experts, wide) if bias else None,
        down_bias=draw(experts, dim) if bias else None,
        gated=gated,
        activation=activation,
    )
    return Problem(
        rows=draw(rows, dim),
        counts=torch.tensor(counts, device=device),
        weights=weights,
        back=draw(rows, dim),
    )


def solve(backend: AbstractBackend, given: Problem) -> dict[str, Tensor]:
    """The result and every gradient."""
    for tensor in given.leaves().values():
        tensor.grad = None  # of whoever was asked before
    y = backend.compute(given.rows, given.counts, given.weights)
    assert y.shape == given.rows.shape, f"{tuple(given.rows.shape)} became {tuple(y.shape)}"
    y.backward(given.back.to(y.dtype))
    gradients = {f"gradient of {name}": tensor.grad for name, tensor in given.leaves().items()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, f"there is no {', no '.join(missing)}"
    return {"result": y.detach(), **{name: g for name, g in gradients.items() if g is not None}}


def equals_reference(
    backend: AbstractBackend, given: Problem, dtype: torch.dtype, what: str
) -> None:
    """Raise unless the backend is as close to the definition as the reference loop is."""
    truth = solve(ReferenceBackend(), given.to(torch.float64))
    plain = solve(ReferenceBackend(), given.to(dtype))
    for name, got in solve(backend, given.to(dtype)).items():
        assert got.dtype == plain[name].dtype, f"{what}: {name} is {got.dtype}, not {dtype}"
        error, usual = error_of(got, truth[name]), error_of(plain[name], truth[name])
        limit = SLACK * usual + floor(dtype)
        assert error <= limit, (
            f"{what}: {name} is off by {error:.2g} of its largest number; the reference loop in "
            f"{str(dtype).removeprefix('torch.')} is off by {usual:.2g}"
        )


def floor(dtype: torch.dtype) -> float:
    """What a result may be off by even if the reference loop happens to be exact.

    Half precision is summed in float32 and rounded once or twice. The others round at every one of
    up to some 200 terms, and such errors grow with the square root of their number.
    """
    roundings = 2 if dtype in (torch.bfloat16, torch.float16) else 16
    return roundings * torch.finfo(dtype).eps


def error_of(got: Tensor, truth: Tensor) -> float:
    """The largest difference, in units of the largest number of the truth; NaN if there is NaN."""
    if truth.numel() == 0:
        return 0.0
    scale = truth.abs().max().clamp_min(1e-30)
    # NaN compares false with everything, so that it fails every limit.
    return float((got.double() - truth).abs().max() / scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendCase:
    """A backend to be checked, and where."""

    backend: AbstractBackend
    device: str
    compile: bool = False

    def problem(self, counts: Sequence[int], dim: int, width: int, **kind: Any) -> Problem:
        """A random problem where the case runs; see `problems.problem`."""
        return problem(counts, dim, width, device=self.device, **kind)
