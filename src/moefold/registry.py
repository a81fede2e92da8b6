"""A registry: the names of one kind of extension, and how to reach each of them.

A member is given as itself or as the string ``"module:attribute"``, which is imported when somebody
asks for the member, so that a registry can name things whose libraries are not installed. Installed
packages add members through the entry-point group ``moefold.<kind>``: the entry point's name is the
member's name, its value that string.
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
        base: the type a member is an instance of or, being a class, a subclass of; None: any.
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
        """Add a member, described by one line; without a target, return a decorator that does so.

        Raises:
            ValueError: if the name is taken, the target of the wrong type, or the registry frozen.
        """
        if target is None:
            return lambda decorated: self.register(name, decorated, summary=summary)
        who = f"{self.kind} {name!r}"
        if self._frozen:
            raise ValueError(
                f"cannot register {who}: the registry is frozen; register it earlier, "
                f"or install it as an entry point of group 'moefold.{self.kind}'"
            )
        if name in self._targets:
            raise ValueError(
                f"{who} is already registered as {self._targets[name]!r} "
                f"({self._summaries[name]}); choose another name than "
                f"{', '.join(sorted(self._targets))}"
            )
        if not isinstance(target, str):
            self._check_type(name, target)
        elif not all(target.partition(":")):
            raise ValueError(
                f"{who} has target {target!r}; write it as 'module:attribute', or pass the object"
            )
        self._targets[name], self._summaries[name] = target, summary
        return target

    def get(self, name: str) -> T:
        """Return the member called `name`, importing it if it was given as a string.

        Raises:
            ValueError: if there is no such member (with the nearest name, and all names), or what
                its string leads to is missing or of the wrong type.
        """
        if name not in self._targets:  # searched only now: torch.compile may be tracing a lookup
            self._add_plugins()
        if name not in self._targets:
            near = difflib.get_close_matches(name, self._targets, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(sorted(self._targets)) or "none yet"
            raise ValueError(f"unknown {self.kind} {name!r}; {hint}Registered: {known}")
        if isinstance(self._targets[name], str):
            self._targets[name] = self._load(name, self._targets[name])
        return self._targets[name]

    def __contains__(self, name: str) -> bool:
        """Whether there is a member called `name`, plug-ins included."""
        if name not in self._targets:  # not before, as in `get`
            self._add_plugins()
        return name in self._targets

    def names(self) -> tuple[str, ...]:
        """Return all names in the order of registration, plug-ins last."""
        return tuple(self.describe())

    def describe(self) -> dict[str, str]:
        """Return the one-line summary of every member by name, importing none of them."""
        self._add_plugins()
        return dict(self._summaries)

    def freeze(self) -> None:
        """Add the plug-ins, then refuse every further registration."""
        self._add_plugins()
        self._frozen = True

    def _add_plugins(self) -> None:
        if not self._plugins_added:
            self._plugins_added = True
            for point in entry_points(group=f"moefold.{self.kind}"):
                owner = f"{point.dist.name} {point.dist.version}" if point.dist else "a package"
                self.register(point.name, point.value, summary=f"added by {owner}")

    def _load(self, name: str, target: str) -> Any:
        module_name, _, attribute = target.partition(":")
        try:
            module = import_module(module_name)
        except ImportError as error:
            error.add_note(f"needed by {self.kind} {name!r} ({target})")
            raise
        if not hasattr(module, attribute):
            raise ValueError(
                f"{self.kind} {name!r} is registered as {target!r}, "
                f"but module {module_name!r} has no {attribute!r}; correct the registration"
            )
        loaded = getattr(module, attribute)
        self._check_type(name, loaded)
        return loaded

    def _check_type(self, name: str, target: Any) -> None:
        kind_of = target if isinstance(target, type) else type(target)
        if self.base is not None and not issubclass(kind_of, self.base):
            raise ValueError(
                f"{self.kind} {name!r} is {target!r} of type {type(target).__name__}; "
                f"it must be an instance or a subclass of {self.base.__name__}"
            )
