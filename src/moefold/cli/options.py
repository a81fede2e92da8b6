"""The settings of surgery as flags, shared by `plan` and `upcycle`."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from moefold import routers
from moefold.moe import MoEConfig
from moefold.routers import RouterConfig
from moefold.surgery import Copies, UpcycleConfig
from moefold.surgery.births import BIRTHS, AbstractBirth

Verb = TypeVar("Verb")


@dataclass(frozen=True, slots=True, kw_only=True)
class Surgery:
    """What to do to the model.

    Attributes:
        router: name of the router; `moefold list routers` shows all.
        router_at: another router for some of the sites, PATTERN=ROUTER or, with its settings,
            PATTERN=ROUTER(k=4,group=batch); the pattern is a regular expression as for --sites; may
            be repeated, the first that matches counts.
        num_experts: number of experts in every mixture.
        sites: which MLPs: every-other, last:N, all, or a regular expression for their names.
        k: experts that a token takes.
        renormalize: combine weights of a token sum to one; the router's own choice if not said,
            but yes for token-choice, which then keeps the host's function.
        capacity: rows an expert takes from a group at most.
        capacity_factor: the same as a multiple of a fair share.
        budget: experts per token on average, for routers that spend a budget.
        alpha: share of the expert's view in the unified score.
        slots: slots of every expert, for the soft router.
        group: which tokens compete: sequence, batch, position, or a number of tokens.
        shared_width: width of an expert that every token passes; 0 for none.
        birth: how the experts start; `moefold list births` shows all.
        birth_set: a setting of the birth, name=value; may be repeated. Several values are parted by
            commas, and @FILE stands for what is in a JSON file.
        router_std: standard deviation of the router's first weights.
        copy_noise_std: standard deviation of noise added to every copied expert.
        backend: how experts are computed; `moefold list backends` shows all.
    """

    router: str = "token-choice"
    router_at: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    num_experts: Annotated[int, tyro.conf.arg(aliases=["--experts"])] = 8
    sites: str = "every-other"
    k: int | None = None
    renormalize: bool | None = None
    capacity: int | None = None
    capacity_factor: float | None = None
    budget: float | None = None
    alpha: float | None = None
    slots: int | None = None
    group: str | None = None
    shared_width: int = 0
    birth: str = Copies.kind
    birth_set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    router_std: float = 0.02
    copy_noise_std: float = 0.0
    backend: str = "auto"

    def config(self) -> UpcycleConfig:
        """The settings as `moefold.upcycle` takes them.

        Raises:
            ValueError: the router or the birth is unknown or has no such setting.
        """
        named = ("k", "renormalize", "capacity", "capacity_factor", "budget", "alpha", "slots")
        settings: dict[str, Any] = {name: getattr(self, name) for name in named}
        if self.group is not None:
            settings["group"] = int(self.group) if self.group.isdecimal() else self.group
        given = {name: value for name, value in settings.items() if value is not None}
        others: dict[str, MoEConfig] = {}
        for text in self.router_at:
            pattern, name, own = _router_at(text)
            others.setdefault(pattern, self._mixture(name, own))
        return UpcycleConfig(
            moe=self._mixture(self.router, given),
            moe_at=others,
            sites=self.sites,
            birth=self.born(),
        )

    def _mixture(self, router: str, settings: dict[str, Any]) -> MoEConfig:
        if router == "token-choice":
            settings = {"renormalize": True, **settings}
        return MoEConfig(
            num_experts=self.num_experts,
            router=routers.config(router, **settings),
            shared_width=self.shared_width,
            backend=self.backend,
        )

    def born(self) -> AbstractBirth:
        """The birth with its settings.

        Raises:
            ValueError: it is unknown or has no such setting.
        """
        settings: dict[str, Any] = {"router_std": self.router_std}
        if self.birth == Copies.kind or self.copy_noise_std:
            settings["copy_noise_std"] = self.copy_noise_std
        for pair in self.birth_set:
            name, text = named_text("--birth-set", pair, "fraction=0.5")
            settings[name] = _values(text)
        return BIRTHS.get(self.birth).from_dict(settings)


def with_settings(config: UpcycleConfig, pairs: Sequence[str]) -> UpcycleConfig:
    """The same surgery with more settings of its router.

    Args:
        config: the surgery.
        pairs: `name=value` each; a value that is not a number, true, false or none is text.

    Raises:
        ValueError: a pair without `=`, or a setting the router does not have.
    """
    before = config.moe.router
    router = router_of(before.name, pairs, before.settings)
    return replace(config, moe=replace(config.moe, router=router))


def router_of(
    name: str, pairs: Sequence[str], settings: Mapping[str, Any] | None = None
) -> RouterConfig:
    """A router by its name, with settings as `--set` gives them.

    Args:
        name: of the router.
        pairs: `name=value` each; a value that is not a number, true, false or none is text.
        settings: others, which those may replace.

    Raises:
        ValueError: an unknown router, a pair without `=`, or a setting the router does not have.
    """
    given = dict(settings or {})
    for pair in pairs:
        key, text = named_text("--set", pair, "k=2")
        given[key] = _value(text)
    return routers.config(name, **given)


def _router_at(text: str) -> tuple[str, str, dict[str, Any]]:
    """A pattern for sites, and the name and the settings of the router there."""
    found = re.fullmatch(r"(.+)=\s*([\w-]+)\s*(?:\((.*)\))?", text.strip())
    if found is None:
        raise ValueError(
            f"--router-at '{text}': write PATTERN=ROUTER, as in --router-at "
            f"'encoder\\..*=expert-choice' or --router-at 'decoder\\..*=mixtral(k=4)'"
        )
    pattern, router, settings = found.groups()
    pairs = [pair for pair in (settings or "").split(",") if pair.strip()]
    named = [named_text("--router-at", pair, "'decoder\\..*=mixtral(k=4)'") for pair in pairs]
    return pattern.strip(), router, {name: _value(value) for name, value in named}


def named_text(flag: str, pair: str, example: str) -> tuple[str, str]:
    """A setting's name, as Python spells it, and the text of its value.

    Raises:
        ValueError: there is no `=`, or nothing before or after it.
    """
    name, equals, text = (part.strip() for part in pair.partition("="))
    if not equals or not name or not text:
        raise ValueError(f"{flag} {pair!r}: write name=value, as in {flag} {example}")
    return name.replace("-", "_"), text


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
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.DisallowNone,  # the word None is no value: who wants it leaves the flag out
        ),
    )


def _values(text: str) -> Any:
    """A value, several of them, or what a file says."""
    if text.startswith("@"):
        try:
            return json.loads(Path(text[1:]).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{text[1:]} is no JSON file ({error})") from error
    if "," in text:
        return tuple(_value(part.strip()) for part in text.split(",") if part.strip())
    return _value(text)


def _value(text: str) -> int | float | bool | str | None:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
