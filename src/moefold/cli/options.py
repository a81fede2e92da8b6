"""The settings of surgery as flags, shared by `plan` and `upcycle`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import tyro

from moefold import routers
from moefold.moe import MoEConfig
from moefold.surgery.config import Copies, UpcycleConfig

Verb = TypeVar("Verb")


@dataclass(frozen=True, slots=True, kw_only=True)
class Surgery:
    """What to do to the model.

    Attributes:
        router: name of the router; `moefold list routers` shows all.
        experts: number of experts in every mixture.
        sites: which MLPs: every-other, last:N, all, or a regular expression for their names.
        k: experts that a token takes.
        renormalize: combine weights of a token sum to one, where the router has this setting.
        capacity: rows an expert takes from a group at most.
        capacity_factor: the same as a multiple of a fair share.
        budget: experts per token on average, for routers that spend a budget.
        alpha: share of the expert's view in the unified score.
        slots: slots of every expert, for the soft router.
        group: which tokens compete: sequence, batch, position, or a number of tokens.
        shared_width: width of an expert that every token passes; 0 for none.
        router_std: standard deviation of the router's first weights.
        noise_std: standard deviation of noise added to every copied expert.
        backend: how experts are computed; `moefold list backends` shows all.
    """

    router: str = "token-choice"
    experts: int = 8
    sites: str = "every-other"
    k: int | None = None
    renormalize: bool = True
    capacity: int | None = None
    capacity_factor: float | None = None
    budget: float | None = None
    alpha: float | None = None
    slots: int | None = None
    group: str | None = None
    shared_width: int = 0
    router_std: float = 0.02
    noise_std: float = 0.0
    backend: str = "auto"

    def config(self) -> UpcycleConfig:
        """The settings as `moefold.upcycle` takes them.

        Raises:
            ValueError: the router is unknown or has no such setting.
        """
        named = ("k", "capacity", "capacity_factor", "budget", "alpha", "slots")
        settings: dict[str, Any] = {name: getattr(self, name) for name in named}
        if self.group is not None:
            settings["group"] = int(self.group) if self.group.isdecimal() else self.group
        given = {name: value for name, value in settings.items() if value is not None}
        if self.renormalize and "renormalize" in (routers.known_settings(self.router) or ()):
            given["renormalize"] = True
        moe = MoEConfig(
            num_experts=self.experts,
            router=routers.config(self.router, **given),
            shared_width=self.shared_width,
            backend=self.backend,
        )
        birth = Copies(router_std=self.router_std, noise_std=self.noise_std)
        return UpcycleConfig(moe=moe, sites=self.sites, birth=birth)


def parse(kind: type[Verb], arguments: Sequence[str], *, verb: str, example: str) -> Verb:
    """Reads a verb's arguments into its dataclass; `--help` ends with the example.

    Raises:
        SystemExit: for `--help`, and for arguments that are not the verb's (they are explained).
    """
    what = (kind.__doc__ or "").partition("\n")[0]
    return tyro.cli(
        kind,
        args=list(arguments),
        prog=f"moefold {verb}",
        description=f"{what}\n\nexample:\n  $ {example}",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
