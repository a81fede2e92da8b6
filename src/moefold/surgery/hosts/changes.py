"""What surgery altered, kept so that it can be taken back exactly."""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


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
        change = _Children(module, dict(module._modules), frozenset(children))
        self.log.append(change)
        for name, child in children.items():
            if child is None:
                del module._modules[name]
            else:
                module.add_module(name, child)
        change.placement = _placement(module)

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Sets a plain attribute of the module, one it had or a new one."""
        self.log.append(_Attribute(module, name, module.__dict__.get(name, _MISSING)))
        module.__dict__[name] = value

    def set_config(
        self, modules: Sequence[nn.Module], new: Any, settle: Callable[[Any, Any], Any]
    ) -> None:
        """Sets the `config` of modules that share one; it may be altered after: a vocabulary grows.

        Args:
            modules: some that have the same config.
            new: another one.
            settle: is given the old and the new one when this is undone; returns what comes back.
        """
        self.log.append(_Config(list(modules), modules[0].__dict__["config"], new, settle))
        for module in modules:
            module.__dict__["config"] = new

    def set_value(self, model: nn.Module, name: str, value: Tensor) -> None:
        """Sets the values of a parameter or a buffer, which stays the same object."""
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, last)
        self.log.append(_Value(module, last, old.detach().clone()))
        with torch.no_grad():
            old.copy_(value)

    def children_before(self) -> dict[nn.Module, dict[str, nn.Module | None]]:
        """The children that a module had before surgery, for each module that has others now."""
        before: dict[nn.Module, dict[str, nn.Module | None]] = {}
        for change in self.log:
            if isinstance(change, _Children):
                before.setdefault(change.module, change.before)
        return before

    def undo(self) -> None:
        """Takes everything back, last change first."""
        while self.log:
            self.log.pop().undo()


class _Missing(enum.Enum):
    MISSING = enum.auto()


_MISSING = _Missing.MISSING  # a member of an enumeration: a deep copy of it is itself


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
        if self.before is _MISSING:
            del self.module.__dict__[self.name]
        else:
            self.module.__dict__[self.name] = self.before


@dataclass(slots=True, eq=False)
class _Config:
    modules: list[nn.Module]
    before: Any
    new: Any
    settle: Callable[[Any, Any], Any]

    def undo(self) -> None:
        config = self.settle(self.before, self.new)
        for module in self.modules:
            module.__dict__["config"] = config


@dataclass(slots=True, eq=False)
class _Children:
    module: nn.Module
    before: dict[str, nn.Module | None]
    exchanged: frozenset[str]
    placement: tuple[torch.device, torch.dtype] | None = None

    def undo(self) -> None:
        now = _placement(self.module)
        current = self.module._modules
        present = set(current.values())
        back = {name: child for name, child in self.before.items() if name in self.exchanged}
        for child in back.values():
            if child is None or child in present:
                continue
            # Nothing that happened to the model since could reach what was out of its tree.
            child.train(self.module.training)
            if now is not None and now != self.placement:
                child.to(device=now[0], dtype=now[1])
        # What else was put there since then stays. In the old order, that of the state dict.
        stays = {name: child for name, child in current.items() if name not in self.exchanged}
        names = [name for name in self.before if name in back or name in stays]
        restored = {name: back[name] if name in back else stays.pop(name) for name in names}
        current.clear()
        current.update(restored | stays)


@dataclass(slots=True, eq=False)
class _Value:
    module: nn.Module
    name: str
    before: Tensor

    def undo(self) -> None:
        with torch.no_grad():  # wherever the model has been moved to since, and in its dtype
            getattr(self.module, self.name).copy_(self.before)


_Change = _Class | _Attribute | _Config | _Children | _Value


def _placement(module: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Where a module's first weight is: one that was there before and stays."""
    first = next(module.parameters(), None)
    return None if first is None else (first.device, first.dtype)
