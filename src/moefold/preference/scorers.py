"""Networks to compare with, built by name: scorers of one candidate, nets of two.

    linear     w . x                                        what a perceptron learns
    mlp        w . act(U x + c)                             Tesauro's half network
    mixture    sum over chosen experts of p_e w_e . act(U_e x + c_e)
    mirror     w . act(U a + V b + c)                       for an antisymmetric comparator: its
                                                            hidden units come in mirrored pairs
    pair-mlp   w . act(U [a ; b] + c) + d                   for a free comparator

Outputs of scorers have no bias, which comparisons would leave without a gradient. Inputs may be of
any type, float64 of NumPy or bool of presence, and are brought to that of the weights.

Shapes: `rows features` of candidates; `rows context` of contexts, put behind them.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, final

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from moefold.losses import losses as known_losses
from moefold.ops.ride import ride
from moefold.record import AbstractRouted
from moefold.registry import Registry
from moefold.routers import RouterConfig, config

Net = Callable[..., nn.Module]

scorers: Registry[Net] = Registry("scorer")
pair_nets: Registry[Net] = Registry("pair net")

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


_SIZES = ("features", "context")


@final
@dataclass(frozen=True, slots=True)
class NetConfig:
    """A built-in net as data: its name and settings, without the sizes of candidates.

    Attributes:
        name: of `scorers` or `pair_nets`.
        settings: of the net.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    def build(self, features: int, context: int = 0) -> nn.Module:
        """Makes the net.

        Args:
            features: numbers in a candidate.
            context: numbers in a context, 0 for none.

        Raises:
            ValueError: no such net or setting.
        """
        kind = scorers if self.name in scorers else pair_nets
        if self.name not in kind:
            known = ", ".join([*scorers.names(), *pair_nets.names()])
            raise ValueError(f"unknown net {self.name!r}; there are: {known}")
        net = kind.get(self.name)
        known = [name for name in inspect.signature(net).parameters if name not in _SIZES]
        if strangers := sorted(set(self.settings) - set(known)):
            raise ValueError(
                f"net {self.name!r} has no setting {', '.join(map(repr, strangers))}; it has "
                f"{', '.join(known) or 'none'}"
            )
        return net(features, context, **self.settings)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, dict(self.settings))

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {
            "name": self.name,
            "settings": {
                key: value.to_dict() if isinstance(value, RouterConfig) else value
                for key, value in self.settings.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "NetConfig":
        """The inverse of `to_dict`."""
        settings = dict(data.get("settings", {}))
        if isinstance(settings.get("router"), Mapping):
            settings["router"] = RouterConfig.from_dict(settings["router"])
        return cls(data["name"], settings)


@scorers.register("linear", summary="a weight for each feature")
@final
class LinearScorer(nn.Module):
    """w . x."""

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__()
        self.out = nn.Linear(features + context, 1, bias=False)

    def forward(
        self,
        x: Shaped[Tensor, "rows features"],
        context: Shaped[Tensor, "rows context"] | None = None,
    ) -> Float[Tensor, "rows 1"]:
        """A number for each candidate."""
        return self.out(_joined(x, context, like=self.out.weight))


@scorers.register("mlp", summary="one hidden layer")
@final
class MLPScorer(nn.Module):
    """w . act(U x + c), one hidden layer.

    Args:
        features: numbers in a candidate.
        context: numbers in a context.
        hidden: hidden units.
        activation: of them.
    """

    def __init__(
        self, features: int, context: int = 0, *, hidden: int = 40, activation: str = "tanh"
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(features + context, hidden)
        self.activation = _activation(activation)
        self.out = nn.Linear(hidden, 1, bias=False)

    def forward(
        self,
        x: Shaped[Tensor, "rows features"],
        context: Shaped[Tensor, "rows context"] | None = None,
    ) -> Float[Tensor, "rows 1"]:
        """A number for each candidate."""
        return self.out(self.activation(self.hidden(_joined(x, context, like=self.hidden.weight))))


@scorers.register("mixture", summary="a scorer for each phase, which the router finds")
@final
class MixtureScorer(AbstractRouted):
    """Several scorers, of which a router chooses by the candidate or by the context.

    Neurogammon had a network for each phase of the game, by hand; here phases are learnt. By the
    context all candidates of a group have the same experts, so that their numbers can be compared
    even where experts have scales of their own.

    Args:
        features: numbers in a candidate.
        context: numbers in a context.
        num_experts: how many scorers.
        hidden: hidden units of each.
        activation: of them.
        router: one whose choice for a token depends on no other; token choice with k=1 if None.
        over: what chooses, "candidate" or "context".
        balance: coefficient of the router's balance loss, which rides on the output.

    Raises:
        ValueError: the router looks at other tokens, or there is no context to choose by.
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        num_experts: int = 4,
        hidden: int = 40,
        activation: str = "tanh",
        router: RouterConfig | None = None,
        over: str = "candidate",
        balance: float = 0.01,
    ) -> None:
        if over not in ("candidate", "context"):
            raise ValueError(f"over is {over!r}; allowed: 'candidate', 'context'")
        if over == "context" and not context:
            raise ValueError("over is 'context', and the groups have none; give context")
        told = config("token-choice", k=1) if router is None else router
        built = told.build(context if over == "context" else features, num_experts)
        if built.reach != "token":
            raise ValueError(
                f"router {told} looks at the {built.reach}: a candidate's score would depend on "
                f"what else is scored with it; use one that looks at the token, as token-choice"
            )
        super().__init__(built)
        self.features, self.over, self.balance = features, over, balance
        inputs = features + context
        self.hidden = nn.Parameter(torch.empty(num_experts, hidden, inputs))
        self.bias = nn.Parameter(torch.empty(num_experts, hidden))
        self.out = nn.Parameter(torch.empty(num_experts, 1, hidden))
        self.activation = _activation(activation)
        for parameter, fan in ((self.hidden, inputs), (self.bias, inputs), (self.out, hidden)):
            nn.init.uniform_(parameter, -(fan**-0.5), fan**-0.5)  # as nn.Linear does

    def forward(
        self,
        x: Shaped[Tensor, "rows features"],
        context: Shaped[Tensor, "rows context"] | None = None,
    ) -> Float[Tensor, "rows 1"]:
        """A number for each candidate."""
        inputs = _joined(x, context, like=self.hidden)
        by = inputs[:, self.features :] if self.over == "context" else inputs[:, : self.features]
        routing = self.router(by.unsqueeze(0))
        rows = routing.dispatch(inputs.unsqueeze(0))
        made = self._experts(rows, routing.rows_per_expert)
        self.hand_over(routing)
        y = routing.combine(made).squeeze(0)
        if self.balance and self.training and torch.is_grad_enabled():
            y = ride(y, self.balance * known_losses.get("balance")(routing))
        return y

    def _experts(
        self, rows: Float[Tensor, "rows inputs"], rows_per_expert: Int[Tensor, " experts"]
    ) -> Float[Tensor, "rows 1"]:
        parts = rows.split(rows_per_expert.tolist())
        weights = zip(self.hidden, self.bias, self.out, strict=True)
        return torch.cat(
            [
                self.activation(nn.functional.linear(part, hidden, bias)) @ out.t()
                for part, (hidden, bias, out) in zip(parts, weights, strict=True)
            ]
        )


@pair_nets.register("mirror", summary="hidden units that see both candidates, in mirrored pairs")
@final
class MirrorNet(nn.Module):
    """w . act(U a + V b + c), which an antisymmetric comparator mirrors (V = 0: consistent).

    Args:
        features: numbers in a candidate.
        context: numbers in a context.
        hidden: hidden units, of which there are as many mirrored ones.
        activation: of them.
    """

    def __init__(
        self, features: int, context: int = 0, *, hidden: int = 40, activation: str = "tanh"
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * features + context, hidden)
        self.activation = _activation(activation)
        self.out = nn.Linear(hidden, 1, bias=False)

    def forward(
        self,
        a: Shaped[Tensor, "rows features"],
        b: Shaped[Tensor, "rows features"],
        context: Shaped[Tensor, "rows context"] | None = None,
    ) -> Float[Tensor, "rows 1"]:
        """A number for each pair."""
        inputs = _joined(torch.cat([a, b], 1), context, like=self.hidden.weight)
        return self.out(self.activation(self.hidden(inputs)))


@pair_nets.register("pair-mlp", summary="one hidden layer over both candidates, with a bias")
@final
class PairMLP(nn.Module):
    """w . act(U [a ; b] + c) + d, for a free comparator.

    Args:
        features: numbers in a candidate.
        context: numbers in a context.
        hidden: hidden units.
        activation: of them.
    """

    def __init__(
        self, features: int, context: int = 0, *, hidden: int = 40, activation: str = "tanh"
    ) -> None:
        super().__init__()
        self.net = MirrorNet(features, context, hidden=hidden, activation=activation)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        a: Shaped[Tensor, "rows features"],
        b: Shaped[Tensor, "rows features"],
        context: Shaped[Tensor, "rows context"] | None = None,
    ) -> Float[Tensor, "rows 1"]:
        """A number for each pair."""
        return self.net(a, b, context) + self.bias


def _joined(x: Tensor, context: Tensor | None, *, like: Tensor) -> Tensor:
    """Candidates with their contexts behind them, of the type and width of these weights."""
    of_context = 0 if context is None else context.shape[1]
    if x.shape[1] + of_context != like.shape[-1]:
        raise ValueError(
            f"the net takes {like.shape[-1]} numbers, features and context together, and was given "
            f"{x.shape[1]} + {of_context}; give what it was built for, context included"
        )
    if context is None:
        return x.to(like.dtype)
    return torch.cat([x.to(like.dtype), context.to(like.dtype)], 1)


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; allowed: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()
