"""Backends, and how one is chosen: the first, in a fixed order, without a reason against it.

Shapes: as in `base`.
"""

from typing import NamedTuple

from torch import Tensor

from moefold.experts.backends.base import AbstractBackend, ExpertWeights
from moefold.experts.backends.grouped import Grouped
from moefold.experts.backends.reference import Reference
from moefold.registry import Registry

backends: Registry[AbstractBackend] = Registry("backend", AbstractBackend)
backends.register("grouped", Grouped(), summary="Grouped matrix products; CPU, CUDA, compiles.")
backends.register("reference", Reference(), summary="A loop over experts; the definition.")

_ORDER = ["grouped", "reference"]


class Explained(NamedTuple):
    """One line of the table of backends."""

    name: str
    summary: str
    reasons_against: list[str]


def choose_backend(name: str, rows: Tensor, weights: ExpertWeights) -> AbstractBackend:
    """The backend of that name, or the first that can run if the name is "auto".

    Raises:
        ValueError: the named backend is unknown, or cannot run here, with its reasons; or none can.
    """
    if name == "auto":
        for candidate in _ORDER:
            if not backends.get(candidate).reasons_against(rows, weights):
                return backends.get(candidate)
        raise ValueError(f"no backend can run here: {_table(explain_backends(rows, weights))}")
    backend = backends.get(name)
    reasons = backend.reasons_against(rows, weights)
    if reasons:
        raise ValueError(
            f"backend {name!r} cannot run here: {'; '.join(reasons)}. Use backend='auto', or one "
            f"of: {_table(explain_backends(rows, weights))}"
        )
    return backend


def explain_backends(rows: Tensor, weights: ExpertWeights) -> list[Explained]:
    """Every backend with its reasons against running here, in the order "auto" tries them."""
    rest = [name for name in backends.names() if name not in _ORDER]
    summaries = backends.describe()
    return [
        Explained(name, summaries[name], backends.get(name).reasons_against(rows, weights))
        for name in [*_ORDER, *rest]
    ]


def _table(lines: list[Explained]) -> str:
    return ", ".join(
        f"{line.name} ({'; '.join(line.reasons_against) or 'can run'})" for line in lines
    )


__all__ = [
    "AbstractBackend",
    "ExpertWeights",
    "Explained",
    "backends",
    "choose_backend",
    "explain_backends",
]
