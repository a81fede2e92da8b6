"""A registry: the names of one kind of extension, and how to reach each of them.

Routers, backends, hosts and losses are looked up here and nowhere else. A member is given as itself or
as the string ``"module:attribute"``, which is imported when somebody asks for the member, so that a
registry can name things whose libraries are not installed.

Installed packages add members through the entry-point group ``moefold.<kind>``: the entry point's
name is the member's name, its value is the string above.
"""

import difflib
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, final, overload

T = TypeVar("T")
Target = TypeVar("Target")


@final
class Registry(Generic[T]):
    """The members of one kind, by name.

    Args:
        kind: what a member is, in the singular, as messages and the entry-point group spell it.
        base: the type a member is an instance of or, when the member is a class, a subclass of.
            None accepts anything.
    """

    def __init__(self, kind: str, base: type | None = None) -> None:
        self.kind = kind
        self.base = base
        self._targets: dict[str, Any] = {}
        self._summaries: dict[str, str] = {}
        self._frozen = False
        self._plugins_added = False

    @overload
    def register(self, name: str, *, summary: str) -> Callable[[Target], Target]: ...

    @overload
    def register(self, name: str, target: Target, *, summary: str) -> Target: ...

    def register(self, name: str, target: Any = None, *, summary: str) -> Any:
        """Add a member; without a target, return a decorator that adds what it decorates.

        Args:
            name: the new name.
            target: the member, or ``"module:attribute"`` to import it on first use.
            summary: one line saying what the member is, for `describe`.

        Returns:
            The target, or the decorator.

        Raises:
            ValueError: if the name is taken, the target is of the wrong type, or the registry frozen.
        """
        if target is None:
            return lambda decorated: self.register(name, decorated, summary=summary)
        if self._frozen:
            raise ValueError(
                f"cannot register {self.kind} {name!r}: the registry is frozen; register it "
                f"earlier, or install it as an entry point of group 'moefold.{self.kind}'"
            )
        if name in self._targets:
            raise ValueError(
                f"{self.kind} {name!r} is already registered as {self._targets[name]!r} "
                f"({self._summaries[name]}); choose another name than "
                f"{', '.join(sorted(self._targets))}"
            )
        if isinstance(target, str):
            if not all(target.partition(":")):
                raise ValueError(
                    f"{self.kind} {name!r} has target {target!r}; "
                    "write it as 'module:attribute', or pass the object itself"
                )
        else:
            self._check_type(name, target)
        self._targets[name] = target
        self._summaries[name] = summary
        return target

    def get(self, name: str) -> T:
        """Return the member called `name`, importing it if it was given as a string.

        Raises:
            ValueError: if there is no such member (with the nearest name and all names), or if what
                its string leads to does not exist or is of the wrong type.
        """
        # Plug-ins are looked for only when needed: torch.compile may be tracing through a lookup.
        if name not in self._targets:
            self._add_plugins()
        if name not in self._targets:
            raise ValueError(self._unknown(name))
        target = self._targets[name]
        if isinstance(target, str):
            target = self._targets[name] = self._load(name, target)
        return target

    def names(self) -> tuple[str, ...]:
        """Return all names, in the order in which they were registered, plug-ins last."""
        self._add_plugins()
        return tuple(self._targets)

    def describe(self) -> dict[str, str]:
        """Return the one-line summary of every member by name, importing none of them."""
        self._add_plugins()
        return dict(self._summaries)

    def freeze(self) -> None:
        """Add the plug-ins, then refuse every further registration."""
        self._add_plugins()
        self._frozen = True

    def _add_plugins(self) -> None:
        if self._plugins_added:
            return
        self._plugins_added = True
        for point in entry_points(group=f"moefold.{self.kind}"):
            owner = f"{point.dist.name} {point.dist.version}" if point.dist else "another package"
            self.register(point.name, point.value, summary=f"added by {owner}")

    def _load(self, name: str, target: str) -> Any:
        module_name, _, attribute = target.partition(":")
        try:
            loaded = getattr(import_module(module_name), attribute)
        except ImportError as error:
            error.add_note(f"needed by {self.kind} {name!r} ({target})")
            raise
        except AttributeError:
            raise ValueError(
                f"{self.kind} {name!r} is registered as {target!r}, "
                f"but module {module_name!r} has no {attribute!r}; correct the registration"
            ) from None
        self._check_type(name, loaded)
        return loaded

    def _check_type(self, name: str, target: Any) -> None:
        if self.base is None or isinstance(target, self.base):
            return
        if isinstance(target, type) and issubclass(target, self.base):
            return
        raise ValueError(
            f"{self.kind} {name!r} is {target!r} of type {type(target).__name__}; "
            f"it must be an instance or a subclass of {self.base.__name__}"
        )

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._targets, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(sorted(self._targets)) or "none yet"
        return f"unknown {self.kind} {name!r}; {hint}Registered: {known}"
