"""A lens: a module as its own methods see it, with some of its children standing in for others.

    Host.forward(Lens(layer, {"mlp": mixture}), x)      the layer's own forward, on another MLP

The methods of a module's class run on the lens too, so that whatever they call looks through it.
Nothing is set on the module and nothing is kept, so a forward pass stays a function of its
arguments: under gradient checkpointing, `torch.compile`, and both together.

Shapes: none; a lens passes on what it is given.
"""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn


class Lens:
    """A module as its own methods see it, with some children standing in for others."""

    def __init__(self, module: nn.Module, stand_ins: dict[str, Any]) -> None:
        self._module = module
        self._stand_ins = stand_ins

    def __getattr__(self, name: str) -> Any:
        if name in self._stand_ins:
            return self._stand_ins[name]
        method = getattr(type(self._module), name, None)
        if isinstance(method, FunctionType):
            return functools.partial(method, self)  # so that it looks through the lens too
        return getattr(self._module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the module's class, on the lens."""
        return type(self._module).forward(self, *args, **kwargs)  # pyright: ignore

    __call__ = forward

    def __repr__(self) -> str:
        return repr(self._module)


def standing_in(module: Any, path: list[str], stand_in: Callable[..., Any]) -> Any:
    """A module with a stand-in at a path below it; the stand-in itself for an empty path."""
    if not path:
        return stand_in
    name, *rest = path
    if isinstance(module, nn.ModuleList):
        items = list(module)
        items[int(name)] = standing_in(items[int(name)], rest, stand_in)
        return items
    return Lens(module, {name: standing_in(getattr(module, name, None), rest, stand_in)})


def names_of_arguments(base: type[nn.Module]) -> list[str]:
    """What the forward pass of a class calls its arguments, in order."""
    return list(inspect.signature(base.forward).parameters)[1:]


class Seen:
    """Marks the classes that `seen_class` makes."""


def seen_class(
    base: type[nn.Module],
    forward: Callable[..., Any],
    factory: Callable[[type[nn.Module]], type[nn.Module]],
) -> type[nn.Module]:
    """A class like `base` with another forward, one that runs `base.forward` on a lens.

    A subclass under the same name: transformers finds the layers whose outputs it records by
    their class, and accelerate the layers it may not split by its name.

    Args:
        base: the class.
        forward: the other forward.
        factory: a function at the top of a module that makes this class from `base`, by which an
            object of it is unpickled.
    """

    def reduce(self: nn.Module) -> tuple:
        return _blank, (factory, base), self.__getstate__()

    body = {"forward": forward, "__reduce__": reduce, "__module__": base.__module__}
    return type(base.__name__, (Seen, base), {**body, "__doc__": base.__doc__})


def _blank(
    factory: Callable[[type[nn.Module]], type[nn.Module]], base: type[nn.Module]
) -> nn.Module:
    kind = factory(base)
    return kind.__new__(kind)
