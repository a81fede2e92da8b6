"""What surgery would do, before anything is touched.

A plan says which sites are taken and which passed over and why, what the model costs before and
after, whether it computes the same function at birth, and how far its router looks.

Shapes: a router is tried on random tokens, `batch tokens dim`.
"""

import difflib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moefold import routers
from moefold.moe import MoE, MoEConfig
from moefold.routing import Routing, SparseRouting
from moefold.surgery.birth import fitted, start_router
from moefold.surgery.config import Copies, UpcycleConfig
from moefold.surgery.hosts import AbstractHost, Site, find_host

SPECS = ("every-other", "last:N", "all")
TRIAL = (4, 128)
"""Sequences and tokens of the input a router is tried on; costs per token are for this length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSite:
    """A site and what is to become of it."""

    name: str
    chosen: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: all of them.
        active: those that one token meets, on average, with rows counted as they fall at birth.
        flops: floating-point operations per token, forward, two for each multiply-add.
    """

    parameters: int
    active: float
    flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How a router at birth routes random tokens.

    Attributes:
        rows: rows that experts compute, for each token.
        mass: smallest and largest sum of a token's combine weights.
        uncovered: share of tokens that no expert takes.
        uncovered_alike: the same where all tokens are alike, the worst case for routers by which
            tokens compete.
        mixes: whether experts see mixtures of tokens instead of tokens.
        learns: whether what the experts compute depends on the router's parameters smoothly, so
            that the task's loss has a gradient for them; True for a router without parameters.
        reach: how far the router looks.
        causal: whether no later token of a sequence changes an earlier one.
    """

    rows: float
    mass: tuple[float, float]
    uncovered: float
    uncovered_alike: float
    mixes: bool
    learns: bool
    reach: str
    causal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan; `str(plan)` is a page to read.

    Attributes:
        model: class of the model.
        host: name of its host.
        config: what was asked for.
        sites: all sites in order, chosen or not.
        moe: the mixture that goes into every chosen site.
        before: cost of the dense model.
        after: cost of the upcycled one.
        trial: how the router routes random tokens at birth.
        kept_at_birth: whether the upcycled model computes the function of the dense one.
        why: the reason for that.
    """

    model: str
    host: str
    config: UpcycleConfig
    sites: tuple[PlannedSite, ...]
    moe: MoEConfig
    before: Cost
    after: Cost
    trial: Trial
    kept_at_birth: bool
    why: str

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the sites that are taken."""
        return tuple(site.name for site in self.sites if site.chosen)

    def __str__(self) -> str:
        """The plan as lines of text."""
        longest = max(len(site.name) for site in self.sites)
        sites = [
            f"  {'+' if site.chosen else ' '} {site.name:<{longest}}  {site.reason}"
            for site in self.sites
        ]
        kept = "the same function" if self.kept_at_birth else "another function"
        sight = "no later token" if self.trial.causal else "later tokens too (not for decoders)"
        tokens = TRIAL[1]
        return "\n".join(
            [
                f"{self.model} ({self.host}): {len(self.chosen)} of {len(self.sites)} MLPs become "
                f"{self.moe.num_experts} experts, router {spelled_out(self.moe.router)}",
                *sites,
                _line("parameters", float(self.before.parameters), float(self.after.parameters)),
                _line("active per token", self.before.active, self.after.active),
                _line(f"FLOPs per token ({tokens})", self.before.flops, self.after.flops),
                f"  {'rows per token':<22} {self.trial.rows:.2f}",
                *self._warnings(),
                f"  {'router looks at':<22} the {self.trial.reach}, {sight}",
                f"  {'at birth':<22} {kept}: {self.why}",
            ]
        )

    def _warnings(self) -> list[str]:
        lines = []
        if self.trial.mixes and self.trial.rows < 1:
            lines.append(
                f"  {'slots':<22} fewer rows than tokens: {TRIAL[1]} tokens share "
                f"{self.trial.rows * TRIAL[1]:.0f}; more slots make more"
            )
        if not self.trial.learns:
            lines.append(
                f"  {'training':<22} the router gets no gradient from the task: no combine weight "
                f"depends on it (one expert, renormalised: always 1)"
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


def plan(model: nn.Module, config: UpcycleConfig | None = None) -> Plan:
    """Says what `upcycle` would do to the model, and does nothing.

    Args:
        model: a dense host, for instance a BertModel or a SentenceTransformer.
        config: what to do; the defaults of `UpcycleConfig` if None.

    Raises:
        ValueError: the config is not an `UpcycleConfig`; no host for the model; it is upcycled
            already; the sites asked for are not there or cannot be taken; the mixture does not fit
            them; the router looks at later tokens and the host must not.
    """
    return draft(model, config or UpcycleConfig())[0]


def draft(model: nn.Module, config: UpcycleConfig) -> tuple[Plan, AbstractHost, list[Site]]:
    """The plan, with the adapter and the sites it would need to be carried out."""
    if not isinstance(config, UpcycleConfig):
        hint = "moefold.UpcycleConfig(moe=...) holds it" if isinstance(config, MoEConfig) else ""
        raise ValueError(
            f"the config is a {type(config).__name__}; it must be a moefold.UpcycleConfig"
            f"{'; ' if hint else ''}{hint}"
        )
    host = find_host(model)
    refuse_second_surgery(model)
    sites = host.sites(model)
    taken = choose_sites(sites, config.sites)
    refused = [f"{s.name} {'; '.join(s.reasons_against)}" for s in taken if s.reasons_against]
    if refused:
        raise ValueError(f"cannot upcycle {', '.join(refused)}")
    first = fitted(config.moe, taken[0])
    for site in taken[1:]:
        fitted(config.moe, site)
    trial = try_router(first, taken[0], config.birth)
    kept, why = _keeps_function(first, config.birth, trial)
    before = _cost_before(host, model)
    made = Plan(
        model=type(model).__name__,
        host=host.name,
        config=config,
        sites=tuple(_planned(site, site in taken, config.sites) for site in sites),
        moe=first,
        before=before,
        after=_cost_after(before, taken, first, trial),
        trial=trial,
        kept_at_birth=kept,
        why=why,
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


def choose_sites(sites: Sequence[Site], spec: str | tuple[str, ...]) -> list[Site]:
    """The sites that a spec of `UpcycleConfig.sites` means.

    Raises:
        ValueError: there is no site at all, or the spec means none, or it is not a valid one.
    """
    if not sites:
        raise ValueError("the model has no layer whose MLP could become a mixture of experts")
    if not isinstance(spec, str):
        return [_named(sites, name) for name in spec]
    if spec == "all":
        return list(sites)
    if spec == "every-other":
        if len(sites) < 2:
            raise ValueError(
                f"sites 'every-other' starts at the second layer, and {sites[0].name} is the only "
                f"one; use sites='all'"
            )
        return list(sites[1::2])
    if spec.startswith("last:"):
        return list(sites[-_count(spec, len(sites)) :])
    return _matching(sites, spec)


def _named(sites: Sequence[Site], name: str) -> Site:
    for site in sites:
        if site.name == name:
            return site
    names = [site.name for site in sites]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no site {name!r}; {hint}There are: {', '.join(names)}")


def _count(spec: str, most: int) -> int:
    number = spec.removeprefix("last:")
    if not number.isdecimal() or not 1 <= int(number) <= most:
        raise ValueError(f"sites {spec!r}: N must be a whole number from 1 to {most}, the layers")
    return int(number)


def _matching(sites: Sequence[Site], spec: str) -> list[Site]:
    try:
        pattern = re.compile(rf"(?:.*\.)?(?:{spec})")
    except re.error as error:
        raise ValueError(f"sites {spec!r} is not a regular expression ({error})") from error
    found = [site for site in sites if pattern.fullmatch(site.name)]
    if found:
        return found
    near = difflib.get_close_matches(spec, SPECS, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"sites {spec!r} matches no site; {hint}Use {', '.join(map(repr, SPECS))} or an expression "
        f"that matches some of: {', '.join(site.name for site in sites)}"
    )


def _planned(site: Site, chosen: bool, spec: str | tuple[str, ...]) -> PlannedSite:
    if chosen:
        reason = f"MLP {site.dim} -> {site.width} -> {site.dim} ({site.activation}) becomes experts"
    elif site.reasons_against:
        reason = f"stays dense: {'; '.join(site.reasons_against)}"
    else:
        asked = repr(spec) if isinstance(spec, str) else "the names given"
        reason = f"stays dense: not in {asked}"
    return PlannedSite(name=site.name, chosen=chosen, reason=reason)


def try_router(moe: MoEConfig, site: Site, birth: Copies) -> Trial:
    """Routes random tokens with a router as it will be born; the random state is put back.

    Raises:
        ValueError: the router cannot be built for this host, or cannot route without token ids.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        router = moe.router.build(site.dim, moe.num_experts, causal=site.causal)
        router.site = site.name
        start_router(router, birth)
        x = torch.randn(*TRIAL, site.dim)  # a LayerNorm before the MLP makes about such tokens
        routing = router.eval()(x)
        alike = router(x[:, :1].expand_as(x))
        learns = _learns(router, x)
    sparse = isinstance(routing, SparseRouting)
    weights = routing.weights if sparse else routing.combine_weight.flatten(2)
    mass = weights.sum(-1)
    return Trial(
        rows=float(routing.rows_per_expert.sum()) / mass.numel(),
        mass=(float(mass.min()), float(mass.max())),
        uncovered=_uncovered(routing),
        uncovered_alike=_uncovered(alike),
        mixes=not sparse,
        learns=learns,
        reach=router.reach,
        causal=router.is_causal,
    )


@torch.enable_grad()
def _learns(router: nn.Module, x: Float[Tensor, "batch tokens dim"]) -> bool:
    """Whether weights that are pulled at random pull the router's parameters."""
    parameters = list(router.parameters())
    if not parameters:
        return True
    routing = router(x)
    if isinstance(routing, SparseRouting):
        weights = [routing.weights]
    else:
        weights = [routing.combine_weight, routing.dispatch_weight]
    pulls = [weight * torch.randn_like(weight) for weight in weights]
    total = torch.stack([pull.sum() for pull in pulls]).sum()
    if not total.requires_grad:
        return False
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    strongest = max(0.0 if g is None else float(g.abs().max()) for g in gradients)
    # Of a weight that is always one, rounding leaves about 1e-7 for each token, of random sign; of
    # one that is not, the softmax of logits near zero leaves 1 / experts of the pull.
    return strongest > 1e-3 / routing.num_experts


def _uncovered(routing: Routing) -> float:
    if not isinstance(routing, SparseRouting):
        return 0.0  # every token mixes every slot
    return 1.0 - float(routing.chosen.any(-1).float().mean())


def _keeps_function(moe: MoEConfig, birth: Copies, trial: Trial) -> tuple[bool, str]:
    """Equal experts whose weights sum to one are the MLP they copy (Sparse Upcycling, App. B)."""
    low, high = trial.mass
    if trial.mixes:
        return False, "experts see mixtures of tokens"
    if birth.copy_noise_std:
        return False, f"noise of standard deviation {birth.copy_noise_std} is added to every copy"
    if trial.uncovered:
        return False, f"no expert takes {trial.uncovered:.1%} of random tokens"
    if trial.uncovered_alike:
        return False, f"no expert takes {trial.uncovered_alike:.1%} of tokens that are all alike"
    # The weights are float32 and there are at most `num_experts` of them.
    if max(abs(low - 1), abs(high - 1)) > moe.num_experts * torch.finfo(torch.float32).eps:
        return False, f"combine weights of a token sum to {low:.2f} ... {high:.2f}, not to 1"
    return True, "experts are copies and the combine weights of every token sum to 1"


def _cost_before(host: AbstractHost, model: nn.Module) -> Cost:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = host.dense_flops(model, TRIAL[1])
    return Cost(parameters=parameters, active=float(parameters), flops=flops)


def _cost_after(before: Cost, taken: Sequence[Site], moe: MoEConfig, trial: Trial) -> Cost:
    """Every expert costs what the MLP did; a router what its matrices do.

    The logits of a soft router are one product of every token with every slot, and dispatch and
    combine are two more of the same size (Puigcerver et al. 2024, section 2.1).
    """
    parameters, active, flops = before.parameters, before.active, before.flops
    for site in taken:
        assert site.mlp is not None
        with torch.device("meta"):
            built = moe.build(site.dim)
        sizes = [sum(p.numel() for p in m.parameters()) for m in (built.experts, built)]
        expert, rest = sizes[0] / moe.num_experts, sizes[1] - sizes[0]
        parameters += sizes[1] - site.mlp.num_parameters
        active += trial.rows * expert + rest - site.mlp.num_parameters
        mlp = 4 * site.dim * site.width
        router = sum(2 * p.numel() for p in built.router.parameters() if p.ndim > 1)
        flops += (trial.rows - 1) * mlp + (3 if trial.mixes else 1) * router
        flops += 4 * site.dim * moe.shared_width
    return Cost(parameters=parameters, active=active, flops=flops)


def _line(what: str, before: float, after: float) -> str:
    return f"  {what:<22} {_short(before)} -> {_short(after)} ({after / before:.2f}x)"


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:.0f}"
