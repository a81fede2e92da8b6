"""Birth from several fine-tunes of one base: expert i is the MLP of fine-tune i.

    MLPs at the sites       fine-tune 1, 2, ... n  ->  experts 1, 2, ... n
    all other weights       their average, or the base as it is
    rows of the router      random, or where the base puts the prompts of each fine-tune

Sukhbaatar et al., *Branch-Train-MiX*, 2024 (the average); Goddard et al., *Arcee's MergeKit*, 2024,
and its `mergekit-moe` (the base, the prompts).

Shapes: a row of the router is `dim` wide, `experts dim` together.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from moefold.modes import evaluating
from moefold.moe import MoE, MoEConfig
from moefold.routers.base import check_one_of
from moefold.surgery.births.base import AbstractBirth, stacked, weight_of
from moefold.surgery.births.copies import fill_with
from moefold.surgery.hosts import AbstractHost, Site, find_host
from moefold.surgery.hosts.fine_tunes import (
    check_folder,
    check_prompts,
    open_fine_tune,
    tokenize,
)
from moefold.surgery.hosts.forms import module_at, weights
from moefold.surgery.receipt import first_tensor_of
from moefold.surgery.trial import Trial

RESTS = ("average", "base")
ROUTERS = ("random", "hidden")

Prompt = str | tuple[int, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FromFineTunes(AbstractBirth):
    """The experts are the MLPs of several fine-tunes of the model that is operated on, the base.

    The fine-tunes are opened one after the other, from safetensors, with the class of the base.

    Attributes:
        models: their folders, one for each expert. A saved mixture names them without the path.
        rest: what becomes of every weight that goes into no expert. "average": the mean over the
            fine-tunes, MLPs that are no sites included; `moefold.revert` brings the base's values
            back. "base": it stays.
        router: "random": as `router_start` says; "hidden": a row is the mean of what the site's MLP
            is given in the base for the tokens of the expert's prompts, made 1 long. Such rows are
            longer than usual first ones, and logits large: the router starts decided.
        prompts: for "hidden", the prompts of each model, in their order: texts, for which base or
            fine-tunes have a tokenizer beside them, or tuples of token ids.
    """

    models: tuple[str, ...] = ()
    rest: Literal["average", "base"] = "average"
    router: Literal["random", "hidden"] = "random"
    prompts: tuple[str | tuple[Prompt, ...], ...] = ()

    kind: ClassVar[str] = "fine-tunes"
    reads_models: ClassVar[bool] = True

    def __post_init__(self) -> None:
        AbstractBirth.__post_init__(self)
        for name in ("models", "prompts"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is a text; give a tuple, one for each expert")
        object.__setattr__(self, "models", tuple(str(model) for model in self.models))
        object.__setattr__(self, "prompts", tuple(map(_prompts, self.prompts)))
        check_one_of("rest", self.rest, RESTS)
        check_one_of("router", self.router, ROUTERS)
        if len(self.models) < 2:
            raise ValueError(
                f"models names {len(self.models)} fine-tunes; give at least 2 folders, one for "
                f"each expert"
            )
        if self.router == "hidden" and len(self.prompts) != len(self.models):
            raise ValueError(
                f"router='hidden' needs prompts for each of {len(self.models)} models, and there "
                f"are {len(self.prompts)}; give one tuple of prompts for each, or router='random'"
            )
        if self.router == "random" and self.prompts:
            raise ValueError("there are prompts, but router is 'random'; say router='hidden'")

    @property
    def alters_rest(self) -> bool:
        """Whether the average is taken."""
        return self.rest == "average"

    def fit(self, config: MoEConfig, site: Site) -> MoEConfig:
        """As for copies.

        Raises:
            ValueError: the experts are not as many as the models, or the router has no rows.
        """
        if config.num_experts != len(self.models):
            raise ValueError(
                f"num_experts is {config.num_experts}, but there are {len(self.models)} fine-tunes "
                f"({', '.join(self._names())}); say num_experts={len(self.models)}"
            )
        if self.router == "hidden":
            with torch.device("meta"):
                router = config.router.build(site.dim, config.num_experts)
            # With other parameters logits are no products of tokens and rows (cosine).
            if [p.shape for p in router.parameters()] != [(config.num_experts, site.dim)]:
                raise ValueError(
                    f"router='hidden' sets a row of width {site.dim} for each expert, which router "
                    f"{config.router.name!r} does not have; say router='random'"
                )
        return AbstractBirth.fit(self, config, site)

    def check(self, model: nn.Module) -> None:
        """Refuses folders that cannot be fine-tunes, and texts without a tokenizer."""
        host = find_host(model)
        for folder in self.models:
            check_folder(host, model, Path(folder))
        if self.router == "hidden":
            check_prompts(model)
        texts = [p for prompts in self.prompts for p in prompts if isinstance(p, str)]
        if texts:
            tokenize(host, model, self._tokenizers(host, model), texts[0])

    @torch.no_grad()
    def fill(self, moe: MoE, config: MoEConfig, site: Site) -> None:
        """Copies the MLP of the base; `complete` puts those of the fine-tunes in their place."""
        for name, stack in stacked(moe).items():
            fill_with(stack, getattr(site.mlp, name))

    @torch.no_grad()
    def complete(
        self, model: nn.Module, mixtures: Mapping[str, MoE], sites: Sequence[Site]
    ) -> dict[str, Tensor]:
        """Reads the fine-tunes, one after the other."""
        host = find_host(model)
        if self.router == "hidden":
            self._start_hidden(host, model, mixtures, sites)
        mean = _Mean(model, sites) if self.rest == "average" else None
        for number, folder in enumerate(self.models):
            other = open_fine_tune(host, model, Path(folder))
            for site in sites:
                mlp = weights(other.get_submodule(site.name), site.form)
                for name, stack in stacked(mixtures[site.name]).items():
                    fill_with(stack[number], getattr(mlp, name))
            if mean is not None:
                mean.add(other)
            del other
        self._warn_of_twins(mixtures)
        return {} if mean is None else mean.values

    def keeps(self, config: MoEConfig, trial: Trial) -> tuple[bool, str]:
        """Not that of the base."""
        return False, f"the experts are the MLPs of {', '.join(self._names())}"

    def signed(self) -> dict[str, Any]:
        """With the names of the folders, without the paths that lead to them."""
        return {**self.to_dict(), "models": list(self._names())}

    def _names(self) -> tuple[str, ...]:
        return tuple(Path(model).name or model for model in self.models)

    def _tokenizers(self, host: AbstractHost, model: nn.Module) -> list[Path]:
        return [Path(place) for place in (host.source(model), *self.models) if place]

    def _start_hidden(
        self,
        host: AbstractHost,
        model: nn.Module,
        mixtures: Mapping[str, MoE],
        sites: Sequence[Site],
    ) -> None:
        places = self._tokenizers(host, model)
        device = next(model.parameters()).device
        for number, prompts in enumerate(self.prompts):
            given = []
            for prompt in prompts:
                if isinstance(prompt, str):
                    inputs = tokenize(host, model, places, prompt)
                else:
                    ids = torch.tensor([prompt])
                    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                given.append(_seen(model, sites, _moved(inputs, device)))
            for site in sites:
                if any(site.name not in one for one in given):
                    raise ValueError(
                        f"{site.name} sees nothing of a prompt ({prompts[0]!r}, ...): it is in "
                        f"another part of the model; take it out of sites, or say router='random'"
                    )
                tokens = torch.cat([one[site.name] for one in given])
                weight = weight_of(mixtures[site.name].router)
                assert weight is not None, "`fit` refuses routers without"
                weight[number] = functional.normalize(tokens.double().mean(0), dim=0)

    def _warn_of_twins(self, mixtures: Mapping[str, MoE]) -> None:
        twins = [
            f"{self.models[one]} and {self.models[two]}"
            for one, two in itertools.combinations(range(len(self.models)), 2)
            if all(
                torch.equal(stack[one], stack[two])
                for moe in mixtures.values()
                for stack in stacked(moe).values()
            )
        ]
        if twins:
            warnings.warn(
                f"these have the same MLPs at every site, and so are one expert twice: "
                f"{'; '.join(twins)}",
                stacklevel=4,
            )


class _Mean:
    """The running mean of models; of equal ones it is, bit for bit, each of them.

    Attributes:
        values: by name, for all weights that are numbers and in no expert.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        inside = {
            id(parameter)
            for site in sites
            for piece in site.form.pieces
            for parameter in module_at(site.layer, piece).parameters()
        }
        named = dict(model.named_parameters())  # tied weights once
        persistent = model.state_dict()
        named |= {n: b for n, b in model.named_buffers() if n in persistent}
        self._names = [
            name
            for name, value in named.items()
            if value.is_floating_point() and id(value) not in inside
        ]
        self.values: dict[str, Tensor] = {}
        self._count = 0

    def add(self, other: nn.Module) -> None:
        self._count += 1
        state = other.state_dict()
        for name in self._names:
            value = state[name].detach()
            value = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
            if name in self.values:
                mean = self.values[name]
                mean.add_((value - mean) / self._count)
            else:
                self.values[name] = value


def _seen(
    model: nn.Module, sites: Sequence[Site], inputs: dict[str, Any]
) -> dict[str, Float[Tensor, "tokens dim"]]:
    """What the MLP of each site is given for one sequence."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple) -> None:
            seen[name] = arguments[0].detach().flatten(0, -2)

        return hook

    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs = {**inputs, "decoder_input_ids": inputs["input_ids"]}
    handles = [
        module_at(site.layer, site.form.pieces[0]).register_forward_pre_hook(keep(site.name))
        for site in sites
    ]
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]):
            first_tensor_of(model, inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        ids = inputs.get("input_ids")
        raise ValueError(
            f"{type(model).__name__} cannot be run on a prompt, {ids} ({error}); give others, or "
            f"say router='random'"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _moved(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _prompts(prompts: Any) -> tuple[Prompt, ...]:
    """The prompts of one model: a text, or several texts or sequences of token ids."""
    made = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    made = tuple(p if isinstance(p, str) else tuple(int(i) for i in p) for p in made)
    if not made or not all(made):
        raise ValueError(
            f"prompts of a model are {prompts!r}; give at least one text, or one tuple of token "
            f"ids, and none that is empty"
        )
    return made
