"""The receipt of a surgery: what was measured right after it, on real or made-up inputs.

A plan says what theory expects; a receipt says what came out. The dense model runs once before
surgery and the upcycled one once after, in evaluation mode, on the same inputs; what each MLP was
given is then given to the mixture that took its place, so that errors do not add up over layers.

Shapes: `tokens dim` are the real tokens an MLP was given, `rows` those of one expert.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moefold.modes import competing, evaluating
from moefold.moe import MoE
from moefold.record import record_routing
from moefold.routing import Routing, SparseRouting
from moefold.surgery.hosts import Site
from moefold.surgery.hosts.forms import module_at


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReceipt:
    """What was measured at one site.

    Attributes:
        error: length of the difference between what the mixture and the MLP make of the same
            tokens, as a share of the length of what the MLP makes.
        coverage: share of tokens that some expert takes.
        mass: mean sum of a token's combine weights.
        similarity: mean cosine between the weights of two experts; 1 for copies.
    """

    error: float
    coverage: float
    mass: float
    similarity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What was measured right after surgery; `str(receipt)` is lines to read.

    Attributes:
        inputs: what it was measured on, in words.
        error: as for a site, of the output of the whole model.
        sites: by name of the site.
    """

    inputs: str
    error: float
    sites: Mapping[str, SiteReceipt]

    def __str__(self) -> str:
        """The receipt as lines of text."""
        longest = max(map(len, self.sites), default=0)
        return "\n".join(
            [
                f"  {'measured':<22} on {self.inputs}: the output of the model is off by "
                f"{self.error:.1e} of its length",
                *(
                    f"    {name:<{longest}}  off by {site.error:.1e}, {site.coverage:.1%} of "
                    f"tokens covered, combine mass {site.mass:.3f}, experts alike "
                    f"{site.similarity:.3f}"
                    for name, site in self.sites.items()
                ),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, null for what is no finite number."""
        sites = {name: dataclasses.asdict(site) for name, site in self.sites.items()}
        return {
            "inputs": self.inputs,
            "error": _finite(self.error),
            "sites": {n: {k: _finite(v) for k, v in site.items()} for n, site in sites.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Receipt":
        """The inverse of `to_dict`."""
        sites = {
            name: SiteReceipt(**{key: _number(value) for key, value in site.items()})
            for name, site in data["sites"].items()
        }
        return cls(inputs=data["inputs"], error=_number(data["error"]), sites=sites)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


@dataclass(slots=True, eq=False)
class Before:
    """What the dense model made of some inputs: the half of a receipt that must come first.

    Attributes:
        inputs: arguments of the model.
        described: the inputs in words.
        output: of the model.
        given: what each MLP was given, by site.
        made: what it made of that.
    """

    inputs: Mapping[str, Any]
    described: str
    output: Tensor
    given: dict[str, Tensor]
    made: dict[str, Tensor]


@torch.no_grad()
def measure_dense(
    model: nn.Module, sites: list[Site], inputs: Mapping[str, Any], described: str
) -> Before:
    """Runs the dense model and keeps what its MLPs were given and made.

    Raises:
        ValueError: what it returns is NaN or infinite, so that nothing can be compared with it.
    """
    given: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    handles = []
    for site in sites:
        first, last = (module_at(site.layer, site.form.pieces[i]) for i in (0, -1))
        handles.append(first.register_forward_pre_hook(_keep_given(given, site.name)))
        handles.append(last.register_forward_hook(_keep_made(made, site.name)))
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]):
            output = output_of(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not bool(output.isfinite().all()):
        raise ValueError(
            f"the dense model makes NaN or infinite values of {described}; pass other inputs, or "
            f"inputs=False for no receipt"
        )
    return Before(inputs, described, output, given, made)


@torch.no_grad()
def measure_upcycled(model: nn.Module, mixtures: Mapping[str, MoE], before: Before) -> Receipt:
    """Runs the upcycled model on the same inputs and compares."""
    untaught = competing(model, untaught_only=True)
    with evaluating(model), untaught, torch.random.fork_rng(devices=[]):
        with record_routing(model) as record:
            output = output_of(model, before.inputs)
        names = {id(module): name for name, module in model.named_modules()}
        sites, mask = {}, None
        for name, moe in mixtures.items():
            seen = record[names[id(moe)]]
            mask = seen[-1].mask if seen else None
            if name not in before.given:  # a part of the model that these inputs did not reach
                continue
            sites[name] = _measure_site(moe, before.given[name], before.made[name], mask)
    # The last mixture knows what is padding also where the inputs call their mask another name.
    wanted = before.output
    if "decoder_input_ids" not in before.inputs:
        output, wanted = without_padding(output, mask), without_padding(wanted, mask)
    return Receipt(inputs=before.described, error=relative_error(output, wanted), sites=sites)


def _measure_site(moe: MoE, given: Tensor, made: Tensor, mask: Tensor | None) -> SiteReceipt:
    flat = given.ndim == 2
    with record_routing(moe) as record:
        found = moe(given, mask.flatten() if flat and mask is not None else mask)
    (routing,) = record[""]
    real = slice(None) if mask is None else (mask.flatten() if flat else mask)
    mass = combine_mass(routing)
    real_mass = mass if routing.mask is None else mass[routing.mask]
    return SiteReceipt(
        error=relative_error(found[real], made[real]),
        coverage=float((real_mass != 0).float().mean()),
        mass=float(real_mass.mean()),
        similarity=expert_similarity(moe),
    )


def combine_mass(routing: Routing) -> Tensor:
    """Sum of the combine weights of every token: `batch tokens`."""
    if isinstance(routing, SparseRouting):
        return routing.weights.sum(-1)
    return routing.combine_weight.flatten(2).sum(-1)


_COLUMNS = 2**18
"""Columns of the flattened experts that are multiplied at a time."""


@torch.no_grad()
def expert_similarity(moe: MoE) -> float:
    """Mean cosine between the weights of two experts, over all pairs and matrices."""
    found = []
    for parameter in moe.experts.parameters():
        if parameter.ndim < 3:
            continue
        rows = parameter.detach().flatten(1)
        count = rows.shape[0]
        products = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
        # In parts: a copy of all experts in another dtype would be the peak of the whole surgery.
        for part in rows.split(_COLUMNS, dim=1):
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            products += part @ part.t()
        length = products.diagonal().sqrt()
        if not bool((length > 0).all()):
            continue
        total = float((products / length / length.unsqueeze(1)).sum())
        found.append((total - count) / (count * (count - 1)))
    return sum(found) / len(found) if found else float("nan")


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Length of the difference as a share of the length of what was there before."""
    difference = (found.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm().clamp_min(1e-300))


def output_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The first tensor a model returns, padding set to zero where there is a mask for it."""
    output = first_tensor_of(model, inputs)
    decodes = "decoder_input_ids" in inputs  # then what is returned are the decoder's tokens
    return without_padding(
        output, inputs.get("decoder_attention_mask" if decodes else "attention_mask")
    )


def without_padding(output: Tensor, mask: object) -> Tensor:
    """The output with zeros where a mask says padding, if it is a mask for it."""
    if isinstance(mask, Tensor) and output.ndim == 3 and output.shape[:2] == mask.shape:
        return output.masked_fill(mask.unsqueeze(-1) == 0, 0.0)  # which a product would leave NaN
    return output


def first_tensor_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The first tensor a model returns; of a SentenceTransformer, the embeddings."""
    return _first_tensor(model(**inputs) if not _takes_features(model) else model(dict(inputs)))


def _takes_features(model: nn.Module) -> bool:
    """Whether it is a SentenceTransformer, which takes one dictionary and returns it enlarged."""
    return type(model).__module__.startswith("sentence_transformers")


def _first_tensor(made: Any) -> Tensor:
    if isinstance(made, Tensor):
        return made
    if isinstance(made, Mapping) and "sentence_embedding" in made:
        return made["sentence_embedding"]
    values = made.values() if isinstance(made, Mapping) else made
    return next(value for value in values if isinstance(value, Tensor))


def _keep_given(kept: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, arguments: tuple) -> None:
        kept[name] = arguments[0].detach().clone()

    return hook


def _keep_made(kept: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, arguments: tuple, result: Tensor) -> None:
        kept[name] = result.detach().clone()

    return hook
