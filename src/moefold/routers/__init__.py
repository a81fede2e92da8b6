"""Every published way of choosing experts, by name.

    moefold.routers.names()                                        what there is, one line each
    moefold.routers.config("token-choice", k=2, renormalize=True)  settings: small, frozen, saved
    moefold.routers.build("expert-choice", dim=384, num_experts=8) the module

A router is a factory `(dim, num_experts, **settings) -> AbstractRouter`; register your own with
`moefold.routers.register("mine", factory, summary="...")`.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from moefold.registry import Registry
from moefold.routers import table
from moefold.routers.base import AbstractRouter, Reach
from moefold.routers.capacity import Capacity
from moefold.routers.fixed import HashRouter, RandomRouter
from moefold.routers.soft import SoftRouter
from moefold.routers.sparse import Recipe, SparseRouter

RouterFactory = Callable[..., AbstractRouter]

routers: Registry[RouterFactory] = Registry("router")

for _name, _factory in {
    "token-choice": table.token_choice,
    "switch": table.switch,
    "mixtral": table.mixtral,
    "compete": table.compete,
    "sinkhorn-token-choice": table.sinkhorn_token_choice,
    "expert-choice": table.expert_choice,
    "sinkhorn-expert-choice": table.sinkhorn_expert_choice,
    "sparse-transport-expert-choice": table.sparse_transport_expert_choice,
    "soft": SoftRouter,
    "unified": table.unified,
    "seq-topk": table.seq_topk,
    "expert-race": table.expert_race,
    "bias-balanced": table.bias_balanced,
    "cosine": table.cosine,
    "relu": table.relu,
    "threshold": table.threshold,
    "hash": HashRouter,
    "base": table.base,
    "random": RandomRouter,
    "custom": table.custom,
}.items():
    _summary = (inspect.getdoc(_factory) or "").partition("\n")[0]
    routers.register(_name, _factory, summary=_summary)


def register(name: str, factory: RouterFactory, *, summary: str) -> None:
    """Add a router under a name; `moefold.testing.check_router` runs the contract it must keep."""
    routers.register(name, factory, summary=summary)


def names() -> dict[str, str]:
    """Every registered router, with a one-line summary each."""
    return routers.describe()


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """A router as data: its name and settings, without sizes.

    Attributes:
        name: a registered router.
        settings: the settings that were given; the others keep their defaults.

    Raises:
        ValueError: unknown router or setting, with the nearest known one.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))
        known = known_settings(self.name)
        if known is None:
            return
        for setting in self.settings:
            if setting not in known:
                near = difflib.get_close_matches(setting, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"router {self.name!r} has no setting {setting!r}.{hint} "
                    f"It has: {', '.join(known) or 'none'}."
                )

    def build(self, dim: int, num_experts: int, *, causal: bool = False) -> AbstractRouter:
        """Make the router.

        Args:
            dim: width of a token.
            num_experts: number of experts.
            causal: refuse a router by which a later token could change an earlier one.

        Raises:
            ValueError: a setting is out of its range, or the router is not causal and must be.
        """
        router = routers.get(self.name)(dim, num_experts, **self.settings)
        if causal and not router.is_causal:
            raise ValueError(
                f"router {self.name!r} looks at the whole {router.reach}, so a later token would "
                "change an earlier one; a causal host cannot use it. Causal routers: "
                f"{', '.join(causal_names())} (or group='position', which depends on the other "
                "sequences of the batch instead)."
            )
        return router

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {"name": self.name, "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RouterConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: the data is not that of a router.
        """
        if not isinstance(data, Mapping) or not {"name"} <= set(data) <= {"name", "settings"}:
            raise ValueError(
                f"not a router configuration: {data!r}; it is a mapping with 'name' and 'settings'."
            )
        return cls(data["name"], data.get("settings", {}))

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{self.name}({settings})"

    def __hash__(self) -> int:
        return hash((self.name, frozenset(self.settings)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, dict(self.settings))


def config(name: str, **settings: Any) -> RouterConfig:
    """A router's configuration.

    Raises:
        ValueError: unknown router or setting, with the nearest known one.
    """
    return RouterConfig(name, settings)


def build(
    name: str, *, dim: int, num_experts: int, causal: bool = False, **settings: Any
) -> AbstractRouter:
    """Make a router: `config(name, **settings).build(dim, num_experts)`."""
    return RouterConfig(name, settings).build(dim, num_experts, causal=causal)


def known_settings(name: str) -> tuple[str, ...] | None:
    """Names of the settings a router takes; None if it takes any (`custom` checks them itself)."""
    parameters = list(inspect.signature(routers.get(name)).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return tuple(p.name for p in parameters if p.name not in ("dim", "num_experts"))


def causal_names() -> tuple[str, ...]:
    """Registered routers that are causal with their default settings."""
    causal = []
    for name in names():
        try:
            router = routers.get(name)(8, 4)
        except (TypeError, ValueError):
            continue  # a plug-in that needs a setting, or a library: nothing to recommend here
        if router.is_causal:
            causal.append(name)
    return tuple(causal)


__all__ = [
    "AbstractRouter",
    "Capacity",
    "HashRouter",
    "Reach",
    "Recipe",
    "RouterConfig",
    "RouterFactory",
    "SoftRouter",
    "SparseRouter",
    "build",
    "causal_names",
    "config",
    "known_settings",
    "names",
    "register",
    "routers",
]
