"""How a mixture gets its first weights.

Shapes: `experts` experts of inner width `width` on tokens of width `dim`.
"""

import abc
import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moefold.moe import MoE, MoEConfig
from moefold.registry import Registry
from moefold.routers import RouterConfig, routers
from moefold.routers.base import check_one_of
from moefold.surgery.hosts import DenseMLP, Site
from moefold.surgery.trial import Trial

ROUTER_STARTS = ("normal", "uniform", "orthogonal", "zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class AbstractBirth(abc.ABC):
    """How the weights of a mixture start, as data; the parts of it that are shared.

    Attributes:
        router_std: standard deviation of the router's weights; 0.02 in flaxformer's T5. Routers
            without a `weight` (soft, hash) keep their own start.
        router_start: their distribution: normal; uniform; orthogonal (rows at right angles, each as
            long as a normal one is on average; no more experts than the width of a token); or zero.
    """

    router_std: float = 0.02
    router_start: str = "normal"

    kind: ClassVar[str]
    new_experts: ClassVar[bool] = False
    """Whether the experts hold nothing of the MLP, and are trainable where that is frozen."""
    reads_models: ClassVar[bool] = False
    """Whether `complete` does something, for which the model must be in memory."""

    def __post_init__(self) -> None:
        check_std("router_std", self.router_std)
        check_one_of("router_start", self.router_start, ROUTER_STARTS)

    def fit(self, config: MoEConfig, site: Site) -> MoEConfig:
        """The mixture's config with the site's geometry in it: experts as wide as the MLP.

        Raises:
            ValueError: the config asks for something this birth cannot make.
        """
        if config.expert_width not in (None, site.width):
            raise ValueError(
                f"{site.name}: expert_width is {config.expert_width}, but the experts are copies "
                f"of an MLP of width {site.width}; leave expert_width out or say {site.width}"
            )
        return with_geometry(config, site, site.width)

    @abc.abstractmethod
    def fill(self, moe: MoE, config: MoEConfig, site: Site) -> None:
        """Gives the experts of a new mixture their weights; no storage is shared with the host.

        Args:
            moe: the mixture, its router started.
            config: what `fit` returned.
            site: where the MLP is.
        """

    @property
    def alters_rest(self) -> bool:
        """Whether `complete` sets weights that stay in the model."""
        return False

    def start_router(self, router: nn.Module) -> None:
        """Draws the router's `weight` anew, if it has one."""
        start_router(router, self)

    @abc.abstractmethod
    def keeps(self, config: MoEConfig, trial: Trial) -> tuple[bool, str]:
        """Whether the mixture computes the function of the MLP, and why, or why not.

        Args:
            config: what `fit` returned.
            trial: how its router routes random tokens at birth.
        """

    def check(self, model: nn.Module) -> None:  # noqa: B027 - most births refuse no model
        """Refuses a model that this birth cannot be carried out on; nothing to refuse for most.

        Raises:
            ValueError: says what stands against it.
        """

    def complete(
        self, model: nn.Module, mixtures: Mapping[str, MoE], sites: Sequence[Site]
    ) -> dict[str, Tensor]:
        """Gives mixtures that are filled what comes from elsewhere than one MLP: other models.

        Called once for each surgery, before the model is touched, which is left as it is.

        Args:
            model: the dense model.
            mixtures: by name of the site.
            sites: the sites that are taken.

        Returns:
            New values of weights that stay in the model, by their names; surgery sets them, and
            `revert` sets the old ones again. Most births have none.
        """
        return {}

    def signed(self) -> dict[str, Any]:
        """What is saved with the model: `to_dict`, without what is nobody else's business."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, tagged by `kind`."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AbstractBirth":
        """The inverse of `to_dict`.

        Raises:
            ValueError: another kind of birth, or an unknown setting.
        """
        settings = dict(data)
        kind = settings.pop("kind", cls.kind)
        if kind != cls.kind:
            raise ValueError(f"this is a birth of kind {kind!r}, not {cls.kind!r}")
        return cls(**{name: _frozen(v) for name, v in known_settings(cls, settings).items()})


def _frozen(value: Any) -> Any:
    """A value as JSON gives it, with tuples for lists."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


BIRTHS: Registry[type[AbstractBirth]] = Registry("birth", AbstractBirth)


def birth_from_dict(data: Mapping[str, Any]) -> AbstractBirth:
    """The birth that `to_dict` described.

    Raises:
        ValueError: an unknown kind of birth, or an unknown setting.
    """
    return BIRTHS.get(str(data.get("kind"))).from_dict(data)


def born(config: MoEConfig, site: Site, birth: AbstractBirth) -> MoE:
    """A mixture for the site, on the device and of the dtype of its MLP.

    Args:
        config: what `birth.fit` returned.
        site: a site that can be taken.
        birth: how the weights start.

    Raises:
        ValueError: the router and the host do not go together, as the router says it.
    """
    assert site.mlp is not None
    # Experts are filled below: drawing them first would take longer than all the rest.
    with torch.device("meta"):
        moe = config.build(site.dim, causal=site.causal, site=site.name)
    with site.mlp.up.device:
        router = config.router.build(site.dim, config.num_experts, causal=site.causal)
    moe.router = router
    moe.site = site.name
    for experts in (moe.experts, moe.shared):
        if experts is not None:
            experts.to_empty(device=site.mlp.up.device)
    if moe.shared is not None:
        moe.shared.reset_parameters()
    moe.to(site.mlp.up.dtype)
    birth.start_router(moe.router)
    birth.fill(moe, config, site)
    if not birth.new_experts:
        freeze_as(moe, site.mlp)
    silence_shared(moe)
    return moe


def with_geometry(config: MoEConfig, site: Site, width: int) -> MoEConfig:
    """The config for experts of that width that are otherwise like the site's MLP."""
    assert site.mlp is not None
    return dataclasses.replace(
        config,
        expert_width=width,
        bias=site.mlp.has_bias,
        gated=site.mlp.gated,
        activation=site.activation,
    )


def stacked(moe: MoE) -> dict[str, Tensor]:
    """The experts' parameters by their place in an MLP, as `DenseMLP` names them: `experts ...`.

    The halves of a gated expert's first map are views of it. Biases only where there are any.
    """
    weights = moe.experts.weights
    up, up_bias = weights.up.detach(), weights.up_bias
    found: dict[str, Tensor] = {"down": weights.down.detach()}
    if weights.gated:
        found["gate"], found["up"] = up.chunk(2, dim=1)
    else:
        found["up"] = up
    if up_bias is not None and weights.down_bias is not None:
        found["down_bias"] = weights.down_bias.detach()
        if weights.gated:
            found["gate_bias"], found["up_bias"] = up_bias.detach().chunk(2, dim=1)
        else:
            found["up_bias"] = up_bias.detach()
    return found


@torch.no_grad()
def freeze_as(moe: MoE, mlp: DenseMLP) -> None:
    """Freezes in the experts what is frozen in the MLP; a missing bias follows its weight.

    Router and shared expert are new, and trainable whatever the host is.
    """
    up_name = "gate_up_proj" if mlp.gated else "up_proj"
    bias = (mlp.up if mlp.up_bias is None else mlp.up_bias).requires_grad
    down_bias = (mlp.down if mlp.down_bias is None else mlp.down_bias).requires_grad
    trainable = {
        up_name: mlp.up.requires_grad,
        f"{up_name}_bias": bias,
        "down_proj": mlp.down.requires_grad,
        "down_proj_bias": down_bias,
    }
    for name, parameter in moe.experts.named_parameters():
        parameter.requires_grad_(trainable[name])


@torch.no_grad()
def silence_shared(moe: MoE) -> None:
    """A shared expert is added to the others: at birth it must add nothing."""
    if moe.shared is not None:
        for name, parameter in moe.shared.named_parameters():
            if name.startswith("down_proj"):
                parameter.zero_()


def start_router(router: nn.Module, birth: AbstractBirth) -> None:
    """Draws the router's `weight` anew, if it has one, as the birth says.

    Raises:
        ValueError: orthogonal rows are asked for, and there are more experts than dimensions.
    """
    weight = weight_of(router)
    if weight is not None:
        start_rows(weight, birth)


def weight_of(router: nn.Module) -> Tensor | None:
    """The `weight` of a router, a row for each expert; None for one that has no such thing."""
    return dict(router.named_parameters()).get("weight")


@torch.no_grad()
def start_rows(weight: Tensor, birth: AbstractBirth) -> None:
    """Draws the rows of a router anew, as the birth says.

    Raises:
        ValueError: orthogonal rows are asked for, and there are more of them than dimensions.
    """
    std = birth.router_std
    if birth.router_start == "normal":
        nn.init.normal_(weight, std=std)
    elif birth.router_start == "uniform":
        nn.init.uniform_(weight, -std * math.sqrt(3), std * math.sqrt(3))
    elif birth.router_start == "zero":
        nn.init.zeros_(weight)
    else:
        experts, dim = weight.shape
        if experts > dim:
            raise ValueError(
                f"router_start is 'orthogonal', but {experts} rows of width {dim} cannot be at "
                f"right angles; use 'normal', or at most {dim} experts"
            )
        nn.init.orthogonal_(weight, gain=std * math.sqrt(dim))


def experts_per_token(router: RouterConfig) -> float | None:
    """How many experts a token takes: `k` or, on average, `budget`; None for other routers."""
    parameters = inspect.signature(routers.get(router.name)).parameters
    for name in ("k", "budget"):
        default = parameters[name].default if name in parameters else None
        value = router.settings.get(name, default)
        if isinstance(value, int | float):
            return float(value)
    return None


def divided(site: Site, parts: int, what: str) -> int:
    """The width of one part of the site's MLP.

    Raises:
        ValueError: the width does not divide; names the numbers that do, near the one asked for.
    """
    if site.width % parts == 0:
        return site.width // parts
    divisors = [n for n in range(1, site.width + 1) if site.width % n == 0]
    near = sorted(sorted(divisors, key=lambda n: abs(n - parts))[:4])
    raise ValueError(
        f"{site.name}: the MLP is {site.width} wide, which {what} does not divide; it can be cut "
        f"into {', '.join(map(str, near))} parts, for instance"
    )


def refuse_width(config: MoEConfig, site: Site, width: int, parts: int) -> None:
    """Refuses another width of an expert than that of one part of the MLP.

    Raises:
        ValueError: names both widths.
    """
    if config.expert_width not in (None, width):
        raise ValueError(
            f"{site.name}: expert_width is {config.expert_width}, but an MLP of width {site.width} "
            f"in {parts} parts makes experts of width {width}; leave expert_width out or say "
            f"{width}"
        )


def check_std(name: str, value: object) -> None:
    """Refuses what is no standard deviation.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value!r}; it must be a finite number, zero or more")


def known_settings(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """The data, once it has been checked that a dataclass has all of these settings.

    Raises:
        ValueError: names those it does not have.
    """
    names = [f.name for f in dataclasses.fields(kind)]
    unknown = sorted(set(data) - set(names))
    if unknown:
        raise ValueError(f"{kind.__name__} has no setting {unknown}; it has {', '.join(names)}")
    return dict(data)
