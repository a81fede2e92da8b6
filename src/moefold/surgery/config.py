"""What to do to a host: which sites, what mixture, and how it is born."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moefold import routers
from moefold.moe import MoEConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Birth by copying: every expert starts as the dense MLP, the router at random.

    Komatsuzaki et al., *Sparse Upcycling*, 2023, section 2. If the combine weights of a token sum
    to one, as with renormalised token choice, the host computes the same function as before.

    Attributes:
        router_std: standard deviation of the router's weights; 0.02 in flaxformer's T5. Routers
            without a `weight` (soft, hash) keep their own start.
        copy_noise_std: standard deviation of Gaussian noise added to every copy; the paper found
            that noise does not help and much of it hurts.
    """

    router_std: float = 0.02
    copy_noise_std: float = 0.0

    def __post_init__(self) -> None:
        for name in ("router_std", "copy_noise_std"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value!r}; it must be a finite number, zero or more")

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, tagged by `kind`."""
        return {"kind": "copies", **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Copies":
        """The inverse of `to_dict`.

        Raises:
            ValueError: another kind of birth, or an unknown setting.
        """
        settings = dict(data)
        kind = settings.pop("kind", None)
        if kind != "copies":
            raise ValueError(f"unknown birth {kind!r}; the one there is: 'copies'")
        return cls(**_known(cls, settings))


def _default_moe() -> MoEConfig:
    # Renormalised and dropless: the one kind of router that keeps the host's function at birth.
    return MoEConfig(router=routers.config("token-choice", k=2, renormalize=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcycleConfig:
    """Which MLPs of a host become mixtures, of what kind, and how they start.

    Attributes:
        moe: the mixture. The host decides `expert_width` (if None), `bias`, `gated` and
            `activation`, for the experts are copies of its MLP.
        sites: `"every-other"` (the second layer, the fourth, ...), `"last:N"`, `"all"`, a regular
            expression that must match a site's whole name or all of it after some dot, or a
            tuple of names.
        birth: how the weights start.
    """

    moe: MoEConfig = field(default_factory=_default_moe)
    sites: str | tuple[str, ...] = "every-other"
    birth: Copies = Copies()

    def __post_init__(self) -> None:
        if not isinstance(self.sites, str):
            object.__setattr__(self, "sites", tuple(self.sites))
        if not self.sites:
            raise ValueError(
                "sites is empty; give 'every-other', 'last:N', 'all', a regular expression or names"
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        sites = self.sites if isinstance(self.sites, str) else list(self.sites)
        return {"moe": self.moe.to_dict(), "sites": sites, "birth": self.birth.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "UpcycleConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: an unknown setting.
        """
        known = _known(cls, data)
        sites = known["sites"]
        return cls(
            moe=MoEConfig.from_dict(known["moe"]),
            sites=sites if isinstance(sites, str) else tuple(sites),
            birth=Copies.from_dict(known["birth"]),
        )


def _known(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(kind)]
    unknown = sorted(set(data) - set(names))
    if unknown:
        raise ValueError(f"{kind.__name__} has no setting {unknown}; it has {', '.join(names)}")
    return dict(data)
