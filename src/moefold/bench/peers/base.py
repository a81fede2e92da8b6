"""What a peer is: somebody else's layer, made to compute the same function, or said not to.

Shapes: `batch tokens dim` in and out.
"""

import importlib
import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, final

import torch
from torch import Tensor, nn

from moefold.bench.shapes import Shape
from moefold.moe import MoE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Given:
    """What a peer is made from.

    Attributes:
        shape: the layer.
        master: our layer, whose weights it gets.
        most_rows: the most rows that an expert has in a sequence of any input of the run.
        device: where it runs.
        dtype: of its weights and inputs.
    """

    shape: Shape
    master: MoE
    most_rows: int
    device: str
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Built:
    """A peer's layer with our weights.

    Attributes:
        layer: a tensor in, a tensor out.
        gradients: those it has after a backward pass, by our names, as copies or views in our
            layout.
        before: what it does to its input that our layer does not; the reference then does it too.
        another: why it cannot be compared, if it computes another function; it is then timed as a
            rate only.
        remark: what else is to be known of it.
    """

    layer: nn.Module
    gradients: Callable[[], dict[str, Tensor]] = dict
    before: Callable[[Tensor], Tensor] | None = None
    another: str = ""
    remark: str = ""


class AbstractPeer(ABC):
    """Somebody else's layer.

    Attributes:
        name: what tables call it.
        package: the distribution whose version belongs to its numbers.
    """

    name: str
    package: str

    @abstractmethod
    def reasons_against(self, shape: Shape, dtype: torch.dtype, device: str) -> list[str]:
        """Why it cannot run, or not this shape; empty if it can."""

    @abstractmethod
    def build(self, given: Given) -> Built:
        """Make it, with our weights in it.

        Raises:
            Exception: whatever it raises itself; that is then the reason why it is not timed.
        """

    def version(self) -> str | None:
        """Of its package; None if that is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


@final
class NeverRuns(AbstractPeer):
    """A peer that is known, and why it is not run."""

    def __init__(self, name: str, package: str, why: str) -> None:
        self.name = name
        self.package = package
        self.why = why

    def reasons_against(self, shape: Shape, dtype: torch.dtype, device: str) -> list[str]:
        """The reason."""
        return [self.why]

    def build(self, given: Given) -> Built:
        """Never called."""
        raise AssertionError(self.why)


@final
class FirstOf(nn.Module):
    """A layer that returns other things beside its result."""

    def __init__(self, layer: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.layer = layer
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        """Only the result."""
        return self.layer(x, **self.settings)[0]


def not_installed(module: str, package: str) -> list[str]:
    """A reason if a package is missing."""
    if importlib.util.find_spec(module) is not None:
        return []
    return [f"{package} is not installed"]


def imported(module: str) -> ModuleType:
    """A peer's module; what it warns of while it is imported is not our user's concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def stacked(tensors: list[Tensor | None]) -> Tensor:
    """Gradients of separate experts as one tensor; one without a row may have none."""
    like = next(t for t in tensors if t is not None)
    return torch.stack([torch.zeros_like(like) if t is None else t for t in tensors])


def only(kinds: tuple[str, ...], shape: Shape, what: str) -> list[str]:
    """A reason if a shape's router is none of those that a peer has."""
    return [] if shape.router in kinds else [f"{what}; this shape is {shape.router}"]


__all__ = [
    "AbstractPeer",
    "Built",
    "FirstOf",
    "Given",
    "NeverRuns",
    "imported",
    "not_installed",
    "only",
    "stacked",
]
