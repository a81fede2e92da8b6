"""What surgery would do, before anything is touched.

A plan says which sites are taken and which passed over and why, what the model costs before and
after, whether it computes the same function at birth, and how far its routers look.
"""

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moefold import routers
from moefold.moe import MoE, MoEConfig
from moefold.surgery.config import UpcycleConfig
from moefold.surgery.hosts import AbstractHost, Site, find_host, refuse_wrapped
from moefold.surgery.hosts.forms import name_of
from moefold.surgery.receipt import Receipt
from moefold.surgery.sites import choose_sites, matches
from moefold.surgery.trial import TRIAL, Trial, try_router


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSite:
    """A site and what is to become of it.

    Attributes:
        name: of the layer.
        chosen: whether it is taken.
        reason: why it is, or is not.
        mixture: what goes there, None if it is not taken.
    """

    name: str
    chosen: bool
    reason: str
    mixture: "PlannedMixture | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMixture:
    """A mixture that is to go to one or more sites.

    Attributes:
        moe: its config, the site's geometry in it.
        trial: how its router routes random tokens at birth.
        kept: whether it computes the function of the dense MLP at birth.
        why: the reason for that.
        causal: whether the site must not see later tokens.
    """

    moe: MoEConfig
    trial: Trial
    kept: bool
    why: str
    causal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: all of them.
        active: those that one token meets, on average, with rows counted as they fall at birth.
        flops: floating-point operations per token, forward, two for each multiply-add.
        weight_bytes: memory of the weights.
        training_bytes: memory of weights, gradients and the two moments of AdamW, all in the dtype
            of the weights; activations come on top.
    """

    parameters: int
    active: float
    flops: float
    weight_bytes: int
    training_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan; `str(plan)` is a page to read.

    Attributes:
        model: class of the model.
        layers: what its layers are, by the names of their forms.
        config: what was asked for.
        sites: all sites in order, chosen or not.
        before: cost of the dense model.
        after: cost of the upcycled one.
        dtype: of the weights that memory is counted in.
        receipt: what was measured after surgery; None for a plan not carried out.
        unmeasured: why there is no receipt of a surgery that was.
    """

    model: str
    layers: tuple[str, ...]
    config: UpcycleConfig
    sites: tuple[PlannedSite, ...]
    before: Cost
    after: Cost
    dtype: torch.dtype
    receipt: Receipt | None = None
    unmeasured: str = ""

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the sites that are taken."""
        return tuple(site.name for site in self.sites if site.chosen)

    @property
    def mixtures(self) -> dict[str, PlannedMixture]:
        """What goes to each site that is taken."""
        return {site.name: site.mixture for site in self.sites if site.mixture is not None}

    @property
    def kept_at_birth(self) -> bool:
        """Whether the upcycled model computes the function of the dense one."""
        return all(mixture.kept for mixture in self.mixtures.values())

    @property
    def why(self) -> str:
        """The reason for that: of the first mixture that is another function, if one is."""
        mixtures = list(self.mixtures.values())
        return next((m for m in mixtures if not m.kept), mixtures[0]).why

    def __str__(self) -> str:
        """The plan as lines of text."""
        longest = max(len(site.name) for site in self.sites)
        sites = [
            f"  {'+' if site.chosen else ' '} {site.name:<{longest}}  {site.reason}"
            for site in self.sites
        ]
        kept = "the same function" if self.kept_at_birth else "another function"
        before, after = self.before, self.after
        memory = str(self.dtype).removeprefix("torch.")
        lines = [
            f"{self.model} ({', '.join(self.layers)}): {len(self.chosen)} of {len(self.sites)} "
            f"MLPs become {self._what()}",
            *sites,
            _line("parameters", float(before.parameters), float(after.parameters)),
            _line("active per token", before.active, after.active),
            _line(f"FLOPs per token ({TRIAL[1]})", before.flops, after.flops),
            _line(f"weights, {memory}", before.weight_bytes, after.weight_bytes, "B"),
            _line("training with AdamW", before.training_bytes, after.training_bytes, "B"),
        ]
        lines += self._about_routers()
        lines.append(f"  {'at birth':<22} {kept}: {self.why}")
        if self.receipt is not None:
            lines += str(self.receipt).splitlines()
        elif self.unmeasured:
            lines.append(f"  {'not measured':<22} {self.unmeasured}")
        return "\n".join(lines)

    def _distinct(self) -> list[PlannedMixture]:
        """The mixtures whose routers differ, in settings or in what they may see."""
        found: dict[tuple[str, bool], PlannedMixture] = {}
        for mixture in self.mixtures.values():
            found.setdefault((spelled_out(mixture.moe.router), mixture.causal), mixture)
        return list(found.values())

    def _what(self) -> str:
        each = [
            f"{m.moe.num_experts} experts, router {spelled_out(m.moe.router)}"
            for m in self._distinct()
        ]
        return " or ".join(dict.fromkeys(each))

    def _about_routers(self) -> list[str]:
        """What is said of each router, once where the same is said of all."""
        mixtures = self._distinct()
        said = [self._about(mixture, "") for mixture in mixtures]
        if all(lines == said[0] for lines in said):
            return said[0]
        names = [mixture.moe.router.name for mixture in mixtures]
        lines = []
        for mixture, name in zip(mixtures, names, strict=True):
            whose = name if names.count(name) == 1 else spelled_out(mixture.moe.router)
            lines += self._about(mixture, f"{whose}{' (causal)' if mixture.causal else ''}: ")
        return lines

    def _about(self, mixture: PlannedMixture, of: str) -> list[str]:
        trial = mixture.trial
        sight = "no later token" if trial.causal else "later tokens too (not for decoders)"
        lines = [f"  {'rows per token':<22} {of}{trial.rows:.2f}"]
        if trial.mixes and trial.rows < 1:
            lines.append(
                f"  {'slots':<22} {of}fewer rows than tokens: {TRIAL[1]} tokens share "
                f"{trial.rows * TRIAL[1]:.0f}; more slots make more"
            )
        if not trial.learns:
            lines.append(
                f"  {'training':<22} {of}the router gets no gradient from the task: no combine "
                f"weight depends on it (one expert, renormalised: always 1)"
            )
        lines.append(f"  {'router looks at':<22} {of}the {trial.reach}, {sight}")
        if trial.reach_in_training != trial.reach:
            lines.append(f"  {'in training at':<22} {of}the {trial.reach_in_training}")
        if not trial.taught:
            lines.append(
                f"  {'before use':<22} {of}train it, or call moefold.calibrate: its predictor has "
                f"learnt nothing yet; what is said here is of the group's own choice"
            )
        return lines


def spelled_out(router: routers.RouterConfig) -> str:
    """A router with its settings, in the order of its signature, defaults that do something too.

    Those are numbers other than zero, and True: `token-choice(k=2)`.
    """
    parameters = inspect.signature(routers.routers.get(router.name)).parameters
    shown = {}
    for name, parameter in parameters.items():
        default = parameter.default
        if name in router.settings:
            shown[name] = router.settings[name]
        elif isinstance(default, bool | int | float) and default:
            shown[name] = default
    return str(routers.RouterConfig(router.name, {**shown, **router.settings}))


@torch.inference_mode(False)  # in which nothing has a gradient, and the router none to be seen
def plan(
    model: nn.Module, config: UpcycleConfig | None = None, *, dtype: torch.dtype | None = None
) -> Plan:
    """Says what `upcycle` would do to the model, and does nothing.

    Args:
        model: a dense host, for instance a BertModel, a LlamaForCausalLM or a SentenceTransformer.
        config: what to do; the defaults of `UpcycleConfig` if None.
        dtype: what memory is counted in; that of the model's weights if None.

    Raises:
        ValueError: the config is not an `UpcycleConfig`; no host for the model; it is upcycled
            already, or wrapped (compiled, sharded, for several processes); the sites asked for are
            not there or cannot be taken; the mixture does not fit them; a router looks at later
            tokens where the host must not.
    """
    return draft(model, config or UpcycleConfig(), dtype)[0]


def draft(
    model: nn.Module, config: UpcycleConfig, dtype: torch.dtype | None = None
) -> tuple[Plan, AbstractHost, list[Site]]:
    """The plan, with the adapter and the sites it would need to be carried out."""
    if not isinstance(config, UpcycleConfig):
        hint = "moefold.UpcycleConfig(moe=...) holds it" if isinstance(config, MoEConfig) else ""
        raise ValueError(
            f"the config is a {type(config).__name__}; it must be a moefold.UpcycleConfig"
            f"{'; ' if hint else ''}{hint}"
        )
    host = find_host(model)
    refuse_wrapped(model)
    refuse_second_surgery(model)
    config.birth.check(model)
    sites = host.sites(model)
    taken = choose_sites(sites, config.sites)
    refused = [f"{s.name} {'; '.join(s.reasons_against)}" for s in taken if s.reasons_against]
    if refused:
        raise ValueError(f"cannot upcycle {', '.join(refused)}")
    mixtures = _plan_mixtures(taken, config)
    own = next(model.parameters()).dtype
    before = _cost_before(host, model, dtype or own)
    made = Plan(
        model=type(model).__name__,
        layers=tuple(dict.fromkeys(name_of(site.form) for site in sites)),
        config=config,
        sites=tuple(_planned(site, mixtures.get(site.name), config.sites) for site in sites),
        before=before,
        after=_cost_after(before, taken, mixtures),
        dtype=dtype or own,
    )
    return made, host, taken


def refuse_second_surgery(model: nn.Module) -> None:
    """Raises if the model holds a mixture.

    Raises:
        ValueError: names the mixtures.
    """
    mixtures = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    if mixtures:
        raise ValueError(
            f"{type(model).__name__} is already upcycled at {', '.join(mixtures)}; call "
            f"moefold.revert(model) first, or start from the dense model"
        )


def _plan_mixtures(taken: Sequence[Site], config: UpcycleConfig) -> dict[str, PlannedMixture]:
    """The mixture of every site; each kind of router is tried once."""
    trials: dict[tuple, PlannedMixture] = {}
    mixtures = {}
    unused = dict(config.moe_at)
    for site in taken:
        asked = config.moe
        for pattern, moe in config.moe_at.items():
            if matches(pattern, site.name):
                asked = moe
                unused.pop(pattern, None)
                break
        moe = config.birth.fit(asked, site)
        key = (str(moe.to_dict()), site.dim, site.causal)
        if key not in trials:
            trial = try_router(moe, site, config.birth.start_router)
            kept, why = config.birth.keeps(moe, trial)
            trials[key] = PlannedMixture(
                moe=moe, trial=trial, kept=kept, why=why, causal=site.causal
            )
        mixtures[site.name] = trials[key]
    if unused:
        raise ValueError(
            f"moe_at (--router-at) {', '.join(map(repr, unused))} matches no site that is taken; "
            f"they are {', '.join(mixtures)}"
        )
    return mixtures


def _planned(
    site: Site, mixture: PlannedMixture | None, spec: str | tuple[str, ...]
) -> PlannedSite:
    if mixture is not None:
        how = f"{site.activation}, gated" if site.mlp and site.mlp.gated else site.activation
        reason = "; ".join(
            [f"MLP {site.dim} -> {site.width} -> {site.dim} ({how}) becomes experts", *site.notes]
        )
    elif site.reasons_against:
        reason = f"stays dense: {'; '.join(site.reasons_against)}"
    else:
        asked = repr(spec) if isinstance(spec, str) else "the names given"
        reason = f"stays dense: not in {asked}"
    return PlannedSite(name=site.name, chosen=mixture is not None, reason=reason, mixture=mixture)


def _cost_before(host: AbstractHost, model: nn.Module, dtype: torch.dtype) -> Cost:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = host.dense_flops(model, TRIAL[1])
    return Cost(
        parameters=parameters,
        active=float(parameters),
        flops=flops,
        weight_bytes=parameters * dtype.itemsize,
        training_bytes=4 * parameters * dtype.itemsize,
    )


def _cost_after(before: Cost, taken: Sequence[Site], mixtures: dict[str, PlannedMixture]) -> Cost:
    """Every row costs what its expert's matrices do; a router what its own do.

    The logits of a soft router are one product of every token with every slot, and dispatch and
    combine are two more of the same size (Puigcerver et al. 2024, section 2.1).
    """
    parameters, active, flops = before.parameters, before.active, before.flops
    for site in taken:
        assert site.mlp is not None
        moe, trial = mixtures[site.name].moe, mixtures[site.name].trial
        with torch.device("meta"):
            built = moe.build(site.dim)
        sizes = [sum(p.numel() for p in m.parameters()) for m in (built.experts, built)]
        expert, rest = sizes[0] / moe.num_experts, sizes[1] - sizes[0]
        parameters += sizes[1] - site.mlp.num_parameters
        active += trial.rows * expert + rest - site.mlp.num_parameters
        maps = 3 if moe.gated else 2
        dense, one = (2 * maps * site.dim * w for w in (site.width, moe.expert_width or 0))
        router = sum(2 * p.numel() for p in built.router.parameters() if p.ndim > 1)
        flops += trial.rows * one - dense + (3 if trial.mixes else 1) * router
        flops += 2 * maps * site.dim * moe.shared_width
    scale = before.weight_bytes // before.parameters
    return dataclasses.replace(
        before,
        parameters=parameters,
        active=active,
        flops=flops,
        weight_bytes=parameters * scale,
        training_bytes=4 * parameters * scale,
    )


def _line(what: str, before: float, after: float, unit: str = "") -> str:
    times = after / before
    return f"  {what:<22} {_short(before)}{unit} -> {_short(after)}{unit} ({times:.2f}x)"


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:.0f} "
