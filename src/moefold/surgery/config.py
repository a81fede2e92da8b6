"""What to do to a host: which sites, what mixture, and how it is born."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moefold import routers
from moefold.moe import MoEConfig
from moefold.surgery.births import AbstractBirth, Copies, birth_from_dict
from moefold.surgery.births.base import known_settings


def _default_moe() -> MoEConfig:
    # Renormalised and dropless: the one kind of router that keeps the host's function at birth.
    return MoEConfig(router=routers.config("token-choice", k=2, renormalize=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcycleConfig:
    r"""Which MLPs of a host become mixtures, of what kind, and how they start.

    Attributes:
        moe: the mixture. The host decides `expert_width` (if None), `bias`, `gated` and
            `activation`, for the experts are made from its MLP.
        moe_at: other mixtures for some of the sites: a regular expression, as for `sites`, to the
            mixture; the first that matches counts. An encoder-decoder may take expert choice in
            the encoder and must not in the decoder: `{r"encoder\..*": MoEConfig(...)}`.
        sites: `"every-other"` (the second layer, the fourth, ...), `"last:N"`, `"all"`, a regular
            expression that must match a site's whole name or all of it after some dot, or a
            tuple of names.
        birth: how the weights start.

    Raises:
        ValueError: no sites; fewer than two experts; a mixture or a birth that is none.
    """

    moe: MoEConfig = field(default_factory=_default_moe)
    moe_at: Mapping[str, MoEConfig] = field(default_factory=dict)
    sites: str | tuple[str, ...] = "every-other"
    birth: AbstractBirth = field(default_factory=Copies)

    def __post_init__(self) -> None:
        if not isinstance(self.sites, str):
            object.__setattr__(self, "sites", tuple(self.sites))
        if not self.sites:
            raise ValueError(
                "sites is empty; give 'every-other', 'last:N', 'all', a regular expression or names"
            )
        if not isinstance(self.birth, AbstractBirth):
            raise ValueError(
                f"birth is {self.birth!r}; it must be a birth with its settings, as in "
                f"moefold.Copies(router_std=0.02)"
            )
        for moe in (self.moe, *self.moe_at.values()):
            if not isinstance(moe, MoEConfig):
                raise ValueError(
                    f"moe is {moe!r}; it must be a moefold.MoEConfig, as in "
                    f"MoEConfig(num_experts=8, router='mixtral')"
                )
            if moe.num_experts < 2:
                raise ValueError(
                    f"num_experts is {moe.num_experts}; a mixture needs at least 2 experts, one "
                    f"is the dense MLP that is there already"
                )

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "moe": self.moe.to_dict(),
            "moe_at": {pattern: moe.to_dict() for pattern, moe in self.moe_at.items()},
            "sites": self.sites if isinstance(self.sites, str) else list(self.sites),
            "birth": self.birth.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "UpcycleConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: an unknown setting.
        """
        known = known_settings(cls, data)
        sites, others = known["sites"], known.get("moe_at", {})
        return cls(
            moe=MoEConfig.from_dict(known["moe"]),
            moe_at={pattern: MoEConfig.from_dict(moe) for pattern, moe in others.items()},
            sites=sites if isinstance(sites, str) else tuple(sites),
            birth=birth_from_dict(known["birth"]),
        )
