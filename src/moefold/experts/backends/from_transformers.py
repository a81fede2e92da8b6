"""Experts by a function of transformers: its registry of expert kernels, as backends.

Our stacked weights have the layout that `transformers.integrations.moe` computes with, so its
functions take them as they are. Each gets rows for tokens, one expert for each of them (k = 1) and
weights of 1, whatever the routing is: how many experts a token has, and what they weigh, is said by
the routing afterwards. Spare rows are its *sentinels*, tokens of an expert that is not there.

These run only when they are named. Two of them fetch a compiled kernel from the hub when they first
compute (`kernels-community/...`, by the package `kernels`): naming them is the permission.

Shapes: `rows dim`, see `base`.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefold.experts import activations
from moefold.experts.backends.base import AbstractBackend, ExpertWeights
from moefold.ops.grouped import as_linear_casts

_HALF = (torch.bfloat16, torch.float16)
_SONIC_ACTIVATIONS = ("gelu", "relu", "silu")
_HOPPER = (9, 0)


@final
class TransformersBackend(AbstractBackend):
    """One of transformers' expert functions.

    Args:
        implementation: its name there, as `experts_implementation=` takes it: `grouped_mm`,
            `batched_mm`, `sonicmoe` or `deepgemm`.
    """

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation

    def reasons_against(self, rows: Tensor, weights: ExpertWeights) -> list[str]:
        """What the function does not compute, or what it needs and is not here."""
        if self.implementation not in _functions():
            return [_lacking(self.implementation)]
        reasons = []
        if (weights.up_bias is None) != (weights.down_bias is None):
            reasons.append("transformers' experts have both biases or none")
        if rows.device.type != "meta" and torch.is_autocast_enabled(rows.device.type):
            # As the function will see it.
            rows = rows.new_empty(0, dtype=as_linear_casts(rows)[0].dtype)
        return reasons + _REASONS[self.implementation](rows, weights)

    def compute(
        self,
        rows: Float[Tensor, "rows dim"],
        rows_per_expert: Int[Tensor, " experts"],
        weights: ExpertWeights,
    ) -> Float[Tensor, "rows dim"]:
        """Apply every expert to its rows.

        Raises:
            ImportError: a kernel cannot be fetched.
        """
        (rows,) = as_linear_casts(rows)
        spare = _may_have_spare(rows, rows_per_expert)
        experts = _Experts(weights, spare)
        expert = torch.searchsorted(
            rows_per_expert.cumsum(0), torch.arange(len(rows), device=rows.device), right=True
        )
        real = None
        if spare:
            # Spare rows may hold NaN, and zero times NaN would reach the weights' gradient.
            real = (expert < experts.num_experts).unsqueeze(1)
            rows = torch.where(real, rows, torch.zeros_like(rows))
        ones = rows.new_ones(len(rows), 1)
        out = _functions()[self.implementation](experts, rows, expert.unsqueeze(1), ones)
        return out if real is None else torch.where(real, out, torch.zeros_like(out))


def _functions() -> Any:
    """Every function that the installed transformers has, by name; empty without transformers."""
    if importlib.util.find_spec("transformers") is None:
        return {}
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:  # before 5.0
        return {}
    return ALL_EXPERTS_FUNCTIONS


def _lacking(implementation: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("transformers")
    except PackageNotFoundError:
        return "transformers is not installed; pip install 'transformers>=5.10'"
    return (
        f"transformers {found} has no expert function {implementation!r}; "
        f"pip install -U 'transformers>=5.10'"
    )


def _may_have_spare(rows: Tensor, rows_per_expert: Tensor) -> bool:
    """Whether there are rows of no expert; True where looking would wait for a device."""
    if torch.compiler.is_compiling() or rows.device.type != "cpu":
        return True
    return int(rows_per_expert.sum()) < len(rows)


class _Config:
    """What is asked of a model's configuration."""

    def __init__(self, activation: activations.Activation) -> None:
        self.hidden_act = activation


class _Experts:
    """The experts as one of transformers' expert modules, to the extent its functions look."""

    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True  # the gate's rows first, not one of each in turn

    def __init__(self, weights: ExpertWeights, spare: bool) -> None:
        up, down, up_bias, down_bias = (
            None if t is None else as_linear_casts(t)[0]
            for t in (weights.up, weights.down, weights.up_bias, weights.down_bias)
        )
        self.gate_up_proj = self.up_proj = up
        self.gate_up_proj_bias = self.up_proj_bias = up_bias
        self.down_proj = down
        self.down_proj_bias = down_bias
        self.num_experts = weights.up.shape[0]
        self.has_gate = weights.gated
        self.has_bias = up_bias is not None
        self.act_fn = activations.get(weights.activation)
        self.config = _Config(weights.activation)
        self._is_expert_parallel = spare  # whether there are tokens of no expert here

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, value = both.chunk(2, dim=-1)
        return self.act_fn(gate) * value


def _grouped(rows: Tensor, weights: ExpertWeights) -> list[str]:
    reasons = _on_cpu_or_cuda(rows)
    if rows.dtype == torch.float64:
        reasons.append("torch's grouped product has no float64")
        return reasons
    dim, width = weights.down.shape[1:]
    for what, size in (("dim", dim), ("width", width)):
        if size * rows.element_size() % 16:
            reasons.append(
                f"torch's grouped product takes rows of whole 16 bytes, and {what}={size} of "
                f"{_short(rows.dtype)} is {size * rows.element_size()}"
            )
    return reasons


def _batched(rows: Tensor, weights: ExpertWeights) -> list[str]:
    return _on_cpu_or_cuda(rows)


def _sonicmoe(rows: Tensor, weights: ExpertWeights) -> list[str]:
    reasons = _on_hopper(rows)
    if not weights.gated:
        reasons.append("it computes gated experts only")
    if weights.activation not in _SONIC_ACTIVATIONS:
        reasons.append(
            f"it knows {', '.join(_SONIC_ACTIVATIONS)}, not {_named(weights.activation)}"
        )
    if rows.dtype not in _HALF:
        reasons.append(f"it computes in bfloat16 and float16, not in {_short(rows.dtype)}")
    return reasons + _missing_packages("kernels", "cutlass", "tvm_ffi")


def _deepgemm(rows: Tensor, weights: ExpertWeights) -> list[str]:
    reasons = _on_hopper(rows)
    if rows.dtype != torch.bfloat16:
        reasons.append(f"it computes in bfloat16, not in {_short(rows.dtype)}")
    given = (rows, weights.up, weights.down)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        reasons.append("it has no backward pass; call it under torch.no_grad()")
    return reasons + _missing_packages("kernels")


_REASONS: dict[str, Callable[[Tensor, ExpertWeights], list[str]]] = {
    "grouped_mm": _grouped,
    "batched_mm": _batched,
    "sonicmoe": _sonicmoe,
    "deepgemm": _deepgemm,
}


def _on_cpu_or_cuda(rows: Tensor) -> list[str]:
    if rows.device.type in ("cpu", "cuda"):
        return []
    return [f"it was never run on {rows.device.type}, only on cpu and cuda"]


def _on_hopper(rows: Tensor) -> list[str]:
    if rows.device.type != "cuda":
        return [f"it needs a GPU of compute capability 9.0 (Hopper) or newer, not {rows.device}"]
    have = torch.cuda.get_device_capability(rows.device)
    if have < _HOPPER:
        found = ".".join(map(str, have))
        return [f"it needs a GPU of compute capability 9.0 (Hopper) or newer, not {found}"]
    return []


def _missing_packages(*modules: str) -> list[str]:
    """What a kernel imports and is not installed."""
    packages = {"cutlass": "nvidia-cutlass-dsl", "tvm_ffi": "apache-tvm-ffi"}
    missing = [packages.get(m, m) for m in modules if importlib.util.find_spec(m) is None]
    if not missing:
        return []
    return [f"it needs {' and '.join(missing)}; pip install {' '.join(missing)}"]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _named(activation: activations.Activation) -> str:
    return activation if isinstance(activation, str) else "a function of your own"
