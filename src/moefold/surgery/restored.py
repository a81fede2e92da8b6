"""A loaded mixture becomes dense again, with the MLPs of the model it was made from.

    mixture   attention' . norm' . experts        trained further
    dense     attention  . norm  . MLP            as it was before surgery
    restored  attention' . norm' . MLP            what plain transformers opens

Everything is checked and copied before the mixture is touched.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from moefold.moe import MoE, MoEConfig
from moefold.surgery.config import UpcycleConfig
from moefold.surgery.hosts import Site, find_host
from moefold.surgery.hosts.forms import holder_of
from moefold.surgery.hosts.layer import DROPOUT, MIXTURE

GEOMETRY = ("num_experts", "expert_width", "gated", "bias", "activation")
"""Settings of a mixture that say what MLP it was made from."""


def restore(
    model: nn.Module, dense: nn.Module, *, came_from: Mapping[str, Any], any_source: bool = False
) -> None:
    """Puts copies of a dense model's MLPs in the place of the mixtures, in place, all or nothing.

    Args:
        model: a mixture without MLPs of its own.
        dense: the model it was made from.
        came_from: the provenance of the dense model.
        any_source: whether it may have come from other files than the mixture.

    Raises:
        ValueError: the mixture is none, or the dense model is not the one it was made from.
    """
    host = find_host(model)
    section = host.section(model)
    if section is None:
        raise ValueError(f"{type(model).__name__} is not upcycled, there is nothing to revert")
    if any(isinstance(module, MoE) for module in dense.modules()):
        raise ValueError(
            f"the dense model given, a {type(dense).__name__}, holds mixtures itself; give the one "
            f"that was upcycled, as it was before"
        )
    if UpcycleConfig.from_dict(section["upcycle"]).birth.alters_rest:
        raise ValueError(
            f"all weights of this {type(model).__name__} were set when it was upcycled, not those "
            f"of its mixtures only, and no MLPs of another model belong among them; use the dense "
            f"model as it is"
        )
    origin = section["source"]
    pairs = _pair(model, section, find_host(dense).sites(dense))
    reasons = [reason for name, pair in pairs.items() for reason in _reasons(name, pair, section)]
    if reasons:
        raise ValueError(
            f"the dense model given, a {type(dense).__name__}, is not what this "
            f"{type(model).__name__} was made from: {'; '.join(reasons)}; give the one that was "
            f"upcycled: {origin['name'] or 'its origin is not known'}"
        )
    if not any_source:
        _check_source(origin, came_from)
    copies = {name: _copies(layer, site) for name, (layer, site) in pairs.items() if site}
    host.unsign(model)
    for name, (layer, site) in pairs.items():
        assert site is not None, "a pair without a site is a reason against it"
        _put_back(layer, site, copies[name])


_Pair = tuple[nn.Module, Site | None]


def _pair(
    model: nn.Module, section: Mapping[str, Any], sites: tuple[Site, ...]
) -> dict[str, _Pair]:
    """The layer and the dense site of every mixture.

    A body and a model with a head have the same layers under longer names; a name therefore also
    matches one that ends in it, if only one does.
    """
    pairs: dict[str, _Pair] = {}
    for name in section["sites"]:
        same = [site for site in sites if site.name == name]
        near = [s for s in sites if s.name.endswith(f".{name}") or name.endswith(f".{s.name}")]
        found = same or near
        pairs[name] = (model.get_submodule(name), found[0] if len(found) == 1 else None)
    return pairs


def _reasons(name: str, pair: _Pair, section: Mapping[str, Any]) -> Iterator[str]:
    """Why a dense layer is not the one that a mixture was made from."""
    layer, site = pair
    if site is None:
        yield f"it has no layer {name}"
        return
    if not isinstance(layer, type(site.layer)):
        kinds = type(layer).__name__, type(site.layer).__name__
        yield f"{name} is a {kinds[0]}, its {site.name} a {kinds[1]}"
        return
    if site.reasons_against:
        yield f"its {site.name} {'; '.join(site.reasons_against)}"
        return
    theirs = {key: value.shape for key, value in site.layer.state_dict().items()}
    for key, value in layer.state_dict().items():
        if not key.startswith((f"{MIXTURE}.", f"{DROPOUT}.")) and theirs.get(key) != value.shape:
            has = "nothing" if key not in theirs else list(theirs[key])
            yield f"{name}.{key} is {list(value.shape)}, where it has {has}"
            return
    saved = MoEConfig.from_dict(section["sites"][name])
    fitted = _fitted(site, section)
    if isinstance(fitted, str):
        yield fitted
    elif all(_geometry(saved) != _geometry(one) for one in fitted):
        yield (
            f"upcycled the same way, its {site.name} would have experts of "
            f"{_geometry(fitted[0])}, but {name} has {_geometry(saved)}"
        )


def _fitted(site: Site, section: Mapping[str, Any]) -> list[MoEConfig] | str:
    """The mixtures that the surgery would make of a dense site; a reason if it could make none."""
    done = UpcycleConfig.from_dict(section["upcycle"])
    try:
        return [done.birth.fit(moe, site) for moe in (done.moe, *done.moe_at.values())]
    except ValueError as error:
        return str(error)


def _geometry(moe: MoEConfig) -> dict[str, Any]:
    return {name: getattr(moe, name) for name in GEOMETRY}


def _check_source(origin: Mapping[str, Any], came_from: Mapping[str, Any]) -> None:
    """Compares the hashes of the files, where both are known."""
    wanted, found = set(origin["sha256"].values()), set(came_from["sha256"].values())
    if wanted and not found:
        warnings.warn(
            f"cannot tell whether the dense model is the one that was upcycled "
            f"({origin['name']}): it was not read from local safetensors",
            stacklevel=4,
        )
    elif wanted and wanted != found:
        raise ValueError(
            f"the dense model was read from {came_from['name']} (sha256 {_short(found)}), the "
            f"mixture was made from {origin['name']} (sha256 {_short(wanted)}); give that one, or "
            f"pass any_source=True (--any-source) to take these MLPs all the same"
        )


def _short(hashes: set[str]) -> str:
    return ", ".join(sorted(one[:12] for one in hashes))


_Copies = list[tuple[nn.Module, nn.Module, dict[str, nn.Module]]]


def _copies(layer: nn.Module, site: Site) -> _Copies:
    """For each piece of an MLP: its holder, that holder in the dense model, and the copy."""
    like = next(getattr(layer, MIXTURE).experts.parameters())
    made: _Copies = []
    for piece in site.form.pieces:
        holder, name = holder_of(layer, piece)
        dense_holder, _ = holder_of(site.layer, piece)
        module = copy.deepcopy(dense_holder.get_submodule(name))
        module.to(device=like.device, dtype=like.dtype).train(layer.training)
        made.append((holder, dense_holder, {name: module}))
    return made


def _put_back(layer: nn.Module, site: Site, copies: _Copies) -> None:
    for name in (MIXTURE, DROPOUT):
        layer._modules.pop(name, None)
    for holder, dense_holder, children in copies:
        now = {**holder._modules, **children}
        # The dense model's order, so that the order of the state dict is the dense one too.
        order = [name for name in dense_holder._modules if name in now]
        holder._modules.clear()
        holder._modules.update({name: now.pop(name) for name in order} | now)
    for name in ("_moefold_form", "_moefold_layer_index"):
        layer.__dict__.pop(name, None)
    layer.__class__ = type(site.layer)
