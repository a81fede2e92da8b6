"""Backends: ways to compute experts on rows, and how one is chosen.

Shapes: `rows dim`, see `base`. The choice is made from device, dtype and settings, never from data:
cheap in eager code, and a constant under torch.compile.
"""

from typing import NamedTuple

from torch import Tensor

from moefold.experts.backends.base import AbstractBackend, AbstractMixer, ExpertWeights
from moefold.experts.backends.from_transformers import TransformersBackend
from moefold.experts.backends.fused import FusedBackend
from moefold.experts.backends.grouped import GroupedBackend
from moefold.experts.backends.reference import ReferenceBackend
from moefold.experts.backends.triton import TritonBackend
from moefold.registry import Registry

AUTO = "auto"

# What "auto" tries, in this order. Other registered backends run when they are named.
PRIORITY = ("fused", "grouped", "reference")

backends: Registry[AbstractBackend] = Registry("backend", AbstractBackend)
backends.register(
    "fused", FusedBackend(), summary="a few experts at a time in cache, from tokens to tokens (CPU)"
)
backends.register("grouped", GroupedBackend(), summary="two grouped products (CPU, CUDA)")
backends.register("reference", ReferenceBackend(), summary="a loop over experts: the definition")
backends.register(
    "triton", TritonBackend(), summary="kernels of our own, from tokens to tokens (CUDA, untimed)"
)
for _function, _summary in (
    ("grouped_mm", "transformers' function of torch's grouped product"),
    ("batched_mm", "transformers' function of one batched product, a matrix for each row"),
    ("sonicmoe", "transformers' function of SonicMoE's kernels, from the hub (Hopper)"),
    ("deepgemm", "transformers' function of DeepGEMM's kernels, from the hub (Hopper)"),
):
    _name = f"transformers-{_function.replace('_', '-')}"
    backends.register(_name, TransformersBackend(_function), summary=_summary)


class Verdict(NamedTuple):
    """What one backend says to some experts and rows; no reasons: it can run."""

    name: str
    summary: str
    reasons: tuple[str, ...]


def choose_backend(name: str, rows: Tensor, weights: ExpertWeights) -> AbstractBackend:
    """Return the backend that computes these experts on these rows.

    Args:
        name: a registered backend, or "auto" for the first of `PRIORITY` with no reason against it.
        rows: what it will compute on.
        weights: what it will compute with.

    Raises:
        ValueError: the name is unknown, or that backend cannot run (with its reasons).
    """
    if name != AUTO:
        backend = backends.get(name)
        if reasons := backend.reasons_against(rows, weights):
            raise ValueError(
                f"backend {name!r} cannot run here: {'; '.join(reasons)}. "
                f"Choose another, or {AUTO!r} for the first of {', '.join(PRIORITY)} that can"
            )
        return backend
    refused = []
    for candidate in PRIORITY:
        backend = backends.get(candidate)
        reasons = backend.reasons_against(rows, weights)
        if not reasons:
            return backend
        refused.append(f"{candidate}: {'; '.join(reasons)}")
    raise ValueError(f"no backend can run these experts. {'. '.join(refused)}")


def explain_backends(rows: Tensor, weights: ExpertWeights) -> list[Verdict]:
    """Ask every registered backend about these experts and rows; those of `PRIORITY` come first."""
    summaries = backends.describe()
    order = [*PRIORITY, *(name for name in summaries if name not in PRIORITY)]
    return [
        Verdict(name, summaries[name], tuple(backends.get(name).reasons_against(rows, weights)))
        for name in order
    ]


__all__ = [
    "AUTO",
    "PRIORITY",
    "AbstractBackend",
    "AbstractMixer",
    "ExpertWeights",
    "Verdict",
    "backends",
    "choose_backend",
    "explain_backends",
]
