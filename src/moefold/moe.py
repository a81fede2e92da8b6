"""The layer: a router makes a routing, experts see rows.

    routing = router(x);  y = routing.combine(experts(routing.dispatch(x)))

Shapes: `batch tokens dim` in and out (or `tokens dim`, one sequence).
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moefold.experts import Experts, activations, backends
from moefold.losses import losses as known_losses
from moefold.ops.ride import ride
from moefold.output_losses import output_losses as known_output_losses
from moefold.record import AbstractRouted
from moefold.registry import Registry
from moefold.routers import RouterConfig
from moefold.routers.base import check_at_least_zero, check_positive
from moefold.routers.inference import Past
from moefold.routing import Routing, SparseRouting

if TYPE_CHECKING:
    GivenRouter = RouterConfig  # what it is, once the configuration is made
else:
    GivenRouter = RouterConfig | str  # what may be given


if TYPE_CHECKING:
    _RouterOrName = RouterConfig  # whoever reads it reads a configuration ...
else:
    _RouterOrName = RouterConfig | str  # ... whoever writes it may give a name


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """A mixture-of-experts layer as data.

    Attributes:
        num_experts: number of experts.
        expert_width: hidden width of one expert; None for the host's, or `4 * dim` without a host.
        router: a router's configuration, or its name for the default settings (kept as one).
        gated: gated experts (SwiGLU and its kin) instead of plain ones.
        bias: whether experts have biases.
        activation: name of the activation.
        shared_width: width of an expert every token passes in any case; 0 for none.
        backend: how experts are computed, "auto" for the first that can run.
        losses: auxiliary losses that ride on the output in training, name to coefficient; None for
            those the router's authors use.

    Raises:
        ValueError: a value is out of range, or a loss unknown.
    """

    num_experts: int = 8
    expert_width: int | None = None
    router: _RouterOrName = field(
        default_factory=lambda: RouterConfig("token-choice", {"k": 2, "renormalize": True})
    )
    gated: bool = False
    bias: bool = False
    activation: str = "gelu"
    shared_width: int = 0
    backend: str = "auto"
    losses: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.router, str):
            object.__setattr__(self, "router", RouterConfig(self.router))
        check_positive("num_experts", self.num_experts)
        if self.expert_width is not None:
            check_positive("expert_width", self.expert_width)
        check_at_least_zero("shared_width", self.shared_width)
        for name, coefficient in (self.losses or {}).items():
            _kind_of_loss(name).get(name)
            check_at_least_zero(f"coefficient of loss {name!r}", coefficient)
        activations.get(self.activation)
        if self.backend != "auto":
            backends.get(self.backend)

    def build(self, dim: int, *, causal: bool = False, site: str = "") -> "MoE":
        """Make the layer.

        Args:
            dim: width of a token.
            causal: refuse a router by which a later token could change an earlier one.
            site: name of the layer, used in errors.
        """
        router = self.router.build(dim, self.num_experts, causal=causal)
        kind: dict[str, Any] = {
            "gated": self.gated,
            "bias": self.bias,
            "activation": self.activation,
        }
        experts = Experts(self.num_experts, dim, self.expert_width or 4 * dim, **kind)
        shared = Experts(1, dim, self.shared_width, **kind) if self.shared_width else None
        own = router.losses if self.losses is None else self.losses
        return MoE(router, experts, shared=shared, losses=own, backend=self.backend, site=site)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        data = {part.name: getattr(self, part.name) for part in fields(self)}
        data["router"] = self.router.to_dict()
        data["losses"] = None if self.losses is None else dict(self.losses)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "MoEConfig":
        """The inverse of `to_dict`; what is missing keeps its default.

        Raises:
            ValueError: an unknown setting.
        """
        known = {part.name for part in fields(cls)}
        if strangers := set(data) - known:
            raise ValueError(
                f"MoEConfig has no setting {', '.join(map(repr, sorted(strangers)))}; it has "
                f"{', '.join(sorted(known))}."
            )
        if "router" not in data:
            return cls(**data)
        return cls(**{**data, "router": RouterConfig.from_dict(data["router"])})


@final
class MoE(AbstractRouted):
    """A mixture of experts in place of an MLP.

    Attributes:
        router: makes the routing.
        experts: computes rows.
        shared: an expert that every real token passes in any case, or None.
        losses: auxiliary losses that ride on the output in training, name to coefficient.
        loss_scale: multiplies them; see `set_loss_scale`.
        backend: how experts are computed.
        site: name of the layer, used in errors.
    """

    def __init__(
        self,
        router: nn.Module,
        experts: Experts,
        *,
        shared: Experts | None = None,
        losses: Mapping[str, float] | None = None,
        backend: str = "auto",
        site: str = "",
    ) -> None:
        super().__init__(router)
        self.experts = experts
        self.shared = shared
        self.losses = dict(losses or {})
        self.loss_scale = 1.0
        self.backend = backend
        self.site = site

    @property
    def site(self) -> str:
        """Name of the layer."""
        return self._site

    @site.setter
    def site(self, site: str) -> None:
        self._site = site
        self.router.site = site or "this layer"  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        x: Float[Tensor, "*batch tokens dim"],
        mask: Bool[Tensor, "*batch tokens"] | None = None,
        ids: Int[Tensor, "*batch tokens"] | None = None,
        past: Past | None = None,
    ) -> Float[Tensor, "*batch tokens dim"]:
        """Route the tokens through their experts.

        Args:
            x: the tokens.
            mask: True for real tokens; padding comes back as zero and counts nowhere.
            ids: token ids, for routers that hash them.
            past: earlier tokens, for routers that look at them.

        Raises:
            ValueError: wrong input, see `AbstractRouter.check`; non-finite logits.
        """
        if x.ndim != 2:
            return self._mix(x, mask, ids, past)
        for name, value in (("mask", mask), ("ids", ids)):
            if value is not None and value.shape != x.shape[:1]:
                raise ValueError(
                    f"{self.site or 'this layer'}: {name} has shape {tuple(value.shape)}, but x "
                    f"has [tokens] = {tuple(x.shape[:1])}. Pass one value for each token."
                )
        mask, ids = (None if t is None else t.unsqueeze(0) for t in (mask, ids))
        return self._mix(x.unsqueeze(0), mask, ids, past).squeeze(0)

    def _mix(self, x: Tensor, mask: Tensor | None, ids: Tensor | None, past: Past | None) -> Tensor:
        more: dict[str, Any] = {} if ids is None else {"ids": ids}
        if past is not None:
            more["past"] = past
        routing = self.router(x, mask, **more)
        counts = routing.rows_per_expert
        if isinstance(routing, SparseRouting) and not self._needs_rows(routing):
            self.hand_over(routing)
            rows, y = None, self.experts(x, counts, backend=self.backend, routing=routing)
        else:
            rows = self.experts(routing.dispatch(x), counts, backend=self.backend)
            routing = routing.settled(rows)
            self.hand_over(routing)
            y = routing.combine(rows)
        if self.shared is not None:
            y = y + self._shared(x, mask)
        if self._losses_ride:
            y = ride(y, self.loss(routing, rows) * self.loss_scale)
        return y

    @property
    def _losses_ride(self) -> bool:
        return bool(self.losses) and self.training and torch.is_grad_enabled()

    def _needs_rows(self, routing: SparseRouting) -> bool:
        """Whether anything but the sum of a token's results is asked of the experts."""
        asked = self._losses_ride and any(name not in known_losses for name in self.losses)
        return asked or routing.decide is not None

    def loss(self, routing: Routing, rows: Float[Tensor, "rows dim"] | None) -> Float[Tensor, ""]:
        """The weighted sum of this layer's auxiliary losses for one routing and its results.

        Args:
            routing: the routing.
            rows: what the experts made of its rows; only losses of results look at them.
        """
        parts = []
        for name, coefficient in self.losses.items():
            kind = _kind_of_loss(name)
            given = (routing,) if kind is known_losses else (routing, rows)
            parts.append(coefficient * kind.get(name)(*given))
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def _shared(self, x: Tensor, mask: Tensor | None) -> Tensor:
        assert self.shared is not None, "the caller checks it"
        padding = None if mask is None else ~mask.unsqueeze(-1)
        if padding is not None:
            # Padding may hold NaN, and zero times NaN would reach the weights' gradient.
            x = x.masked_fill(padding, 0.0)
        flat = x.flatten(0, 1)
        count = torch.full((1,), flat.shape[0], device=x.device)
        out = self.shared(flat, count, backend=self.backend).reshape(x.shape)
        return out if padding is None else out.masked_fill(padding, 0.0)


def _kind_of_loss(name: str) -> Registry[Any]:
    """The registry that has a loss of this name.

    Raises:
        ValueError: neither has.
    """
    for kind in (known_losses, known_output_losses):
        if name in kind:
            return kind
    every = (*known_losses.names(), *known_output_losses.names())
    near = difflib.get_close_matches(name, every, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown loss {name!r}; {hint}Of a routing: {', '.join(known_losses.names())}; of the "
        f"experts' results: {', '.join(known_output_losses.names())}"
    )


def set_loss_scale(model: nn.Module, scale: float) -> None:
    """Scale the losses that ride on the graph of every MoE layer.

    A loss that rides gets a gradient of 1 for each forward pass, whatever the task loss was divided
    or multiplied by. A bi-encoder that passes queries and documents separately counts it twice a
    step: set 1/2. With gradient accumulation over n micro-batches whose loss is divided by n, set
    `1 / n`; with a gradient scaler, set its scale.
    """
    check_at_least_zero("loss_scale", scale)
    for module in model.modules():
        if isinstance(module, MoE):
            module.loss_scale = scale


def name_sites(model: nn.Module) -> None:
    """Name every MoE layer by its place in the model, so that errors say which one it is.

    Surgery does so by itself; this is for models that were built with layers in them.
    """
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            module.site = name
