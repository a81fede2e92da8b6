"""What a host is: a dense model that says where its MLPs are and lets them be exchanged.

A host describes; it decides nothing. `plan` picks sites from what it describes, `upcycle` makes the
mixtures and asks it to install them through `Changes`, which can take everything back.

Shapes: `dim` is the width of a token, `width` the inner width of the MLP.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moefold.moe import MoE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseMLP:
    """Weights of `down(activation(up(x)))`, as `nn.Linear` keeps them; not copies."""

    up: Float[Tensor, "width dim"]
    up_bias: Float[Tensor, " width"] | None
    down: Float[Tensor, "dim width"]
    down_bias: Float[Tensor, " dim"] | None

    @property
    def num_parameters(self) -> int:
        """Number of weights and biases."""
        parts = (self.up, self.up_bias, self.down, self.down_bias)
        return sum(part.numel() for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Site:
    """One MLP that may become a mixture of experts.

    Attributes:
        name: path of the layer in the model that was passed in.
        layer: the module that is changed if the site is taken.
        dim: width of a token.
        width: inner width of the MLP.
        activation: as moefold names it.
        causal: whether the layer may not see later tokens.
        mlp: the weights; None where `reasons_against` says why they cannot be had.
        reasons_against: why the site cannot be taken; empty if it can.
    """

    name: str
    layer: nn.Module
    dim: int
    width: int
    activation: str
    causal: bool
    mlp: DenseMLP | None
    reasons_against: tuple[str, ...] = ()


class AbstractHost(abc.ABC):
    """The adapter of one kind of model."""

    name: ClassVar[str]

    @abc.abstractmethod
    def claims(self, model: nn.Module) -> bool:
        """Whether the model is of this kind."""

    @abc.abstractmethod
    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """All MLPs of the model, first layer first."""

    @abc.abstractmethod
    def install(self, model: nn.Module, site: Site, moe: MoE, changes: "Changes") -> None:
        """Puts the mixture in the place of the MLP."""

    @abc.abstractmethod
    def sign(self, model: nn.Module, section: Mapping[str, Any], changes: "Changes") -> None:
        """Writes into the model's own config what was done, so that a saved folder says it.

        Args:
            model: the model that was operated on.
            section: JSON data with `sites`, a mapping from the site's name to its config.
            changes: takes note.
        """

    @abc.abstractmethod
    def section(self, model: nn.Module) -> dict[str, Any] | None:
        """What `sign` wrote, site names being those of `model`; None if nothing was done."""

    @abc.abstractmethod
    def dense_flops(self, model: nn.Module, tokens: int) -> float:
        """Floating-point operations of a forward pass for each token of a sequence of `tokens`."""

    @abc.abstractmethod
    def source(self, model: nn.Module) -> str:
        """Where the dense model came from: a folder, a name on the hub, or an empty string."""

    @abc.abstractmethod
    def write(self, model: nn.Module, folder: Path) -> None:
        """Writes the model into an empty folder, weights as safetensors."""

    @abc.abstractmethod
    def read(self, folder: Path) -> nn.Module:
        """Opens what `write` wrote.

        Raises:
            ValueError: the weights in the folder are not those of the model it describes.
        """


@dataclass(slots=True, eq=False)
class Changes:
    """What surgery altered, in order, kept as data so that it can be taken back exactly.

    The modules that were taken out live here, outside the model's tree: they are in no state dict
    and no optimiser. A deep copy of the model gets a deep copy of its changes.
    """

    log: list["_Change"] = field(default_factory=list)

    def become(self, module: nn.Module, kind: type[nn.Module]) -> None:
        """Gives the module another class: the object, its hooks and its flags stay."""
        self.log.append(_Class(module, type(module)))
        module.__class__ = kind

    def replace_children(self, module: nn.Module, **children: nn.Module | None) -> None:
        """Sets children of the module; None takes one out."""
        change = _Children(module, dict(module._modules))
        self.log.append(change)
        for name, child in children.items():
            if child is None:
                del module._modules[name]
            else:
                module.add_module(name, child)
        change.placement = _placement(module)

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Sets a plain attribute of the module."""
        self.log.append(_Attribute(module, name, module.__dict__[name]))
        module.__dict__[name] = value

    def undo(self) -> None:
        """Takes everything back, last change first."""
        while self.log:
            self.log.pop().undo()


@dataclass(slots=True, eq=False)
class _Class:
    module: nn.Module
    before: type[nn.Module]

    def undo(self) -> None:
        self.module.__class__ = self.before


@dataclass(slots=True, eq=False)
class _Attribute:
    module: nn.Module
    name: str
    before: object

    def undo(self) -> None:
        self.module.__dict__[self.name] = self.before


@dataclass(slots=True, eq=False)
class _Children:
    module: nn.Module
    before: dict[str, nn.Module | None]
    placement: tuple[torch.device, torch.dtype] | None = None

    def undo(self) -> None:
        now = _placement(self.module)
        present = set(self.module._modules.values())
        for child in self.before.values():
            if child is None or child in present:
                continue
            # Nothing that happened to the model since could reach what was out of its tree.
            child.train(self.module.training)
            if now is not None and now != self.placement:
                child.to(device=now[0], dtype=now[1])
        # The whole dictionary, so that the order of the state dict is the old one too.
        self.module._modules.clear()
        self.module._modules.update(self.before)


_Change = _Class | _Attribute | _Children


def _placement(module: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Where a module's first weight is: one that was there before and stays."""
    first = next(module.parameters(), None)
    return None if first is None else (first.device, first.dtype)
