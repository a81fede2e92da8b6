"""Transformers: every model of the library that holds layers with a known form."""

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, final

import transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moefold.moe import MoE
from moefold.surgery.hosts import auto
from moefold.surgery.hosts.base import AbstractHost, Site
from moefold.surgery.hosts.changes import Changes
from moefold.surgery.hosts.flops import dense_flops
from moefold.surgery.hosts.forms import describe, known_layers
from moefold.surgery.hosts.layer import install


@final
class TransformersHost(AbstractHost):
    """A model of transformers, whatever its head, by the layers in it."""

    name = "transformers"

    def claims(self, model: nn.Module) -> bool:
        """Whether it is such a model with at least one layer that has a form, or had one."""
        if not isinstance(model, PreTrainedModel):
            return False
        return auto.is_moefold_config(model.config) or bool(known_layers(model))

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """One for each layer, `encoder.layer.0` and so on."""
        return tuple(
            describe(name, layer, form, _config_around(model, name))
            for name, layer, form in known_layers(model)
        )

    def install(self, model: nn.Module, site: Site, moe: MoE, changes: Changes) -> None:
        """Puts the mixture into the layer."""
        install(site, moe, changes)

    def sign(self, model: nn.Module, section: Mapping[str, Any], changes: Changes) -> None:
        """Gives the model a config of type `moefold_...`; a stock library does not know the type.

        The config is a copy: another model may hold the old one.
        """
        assert isinstance(model, PreTrainedModel)
        parts = auto.parts_with_sites(model, section["sites"])
        for part, sites in [*parts, (model, section["sites"])]:
            changes.set_config(*auto.signed_config(part, {**section, "sites": sites}), _settle)
            # Weights are saved under the names they have. The library would give some the names of
            # older files, which it knows how to read for its own types of models only.
            changes.set_attribute(part, "_weight_conversions", [])

    def unsign(self, model: nn.Module) -> None:
        """Gives the model a config, and if it was loaded a class, that a stock library knows.

        A loaded encoder-decoder made copies of its config for its two halves.
        """
        held = [m for m in model.modules() if auto.is_moefold_config(m.__dict__.get("config"))]
        olds = {id(module.config): module.config for module in held}
        stock = {key: _stock(old) for key, old in olds.items()}
        for module in held:
            module.__dict__["config"] = stock[id(module.config)]
        for module in held:
            module.__dict__.pop("_weight_conversions", None)
        if type(model).__module__ == auto.__name__:
            model.__class__ = type(model).__bases__[0]

    def section(self, model: nn.Module) -> dict[str, Any] | None:
        """The `moefold` entry of the config, its sites named as in this model."""
        assert isinstance(model, PreTrainedModel)
        section = getattr(model.config, "moefold", None)
        if not auto.is_moefold_config(model.config) or section is None:
            return None
        layers = {id(module): name for name, module in model.named_modules()}
        sites = {
            layers.get(id(auto.submodule(model, name)), name): moe
            for name, moe in section["sites"].items()
        }
        return {**section, "sites": sites}

    def dense_flops(self, model: nn.Module, tokens: int) -> float:
        """See `flops`."""
        return dense_flops(model, tokens)

    def source(self, model: nn.Module) -> str:
        """The folder or name the model was loaded from."""
        assert isinstance(model, PreTrainedModel)
        return str(model.config.name_or_path or "")

    def write(
        self, model: nn.Module, folder: Path, *, max_shard_size: int | str | None = None
    ) -> None:
        """What `save_pretrained` writes."""
        assert isinstance(model, PreTrainedModel)
        size: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        model.save_pretrained(folder, **size)

    def read(self, folder: Path) -> nn.Module:
        """Opens the folder with the class that wrote it, on the CPU, in evaluation mode."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = str(config.get("model_type"))
        name = (config.get("architectures") or ["PreTrainedModel"])[0]
        base = getattr(transformers, name.removeprefix(auto.NAME), None)
        known = isinstance(base, type) and issubclass(base, PreTrainedModel)
        if not kind.startswith(auto.PREFIX) or not known:
            raise ValueError(
                f"{folder}/config.json describes a {name} of type {kind!r}; it must "
                f"be a model of transformers of a type that begins with {auto.PREFIX!r}"
            )
        auto.config_class(CONFIG_MAPPING[kind.removeprefix(auto.PREFIX)])
        return _read_strictly(auto.model_class(base), folder)


def _settle(old: Any, new: Any) -> Any:
    """The config after a revert: the old one, unless the new one was altered while it stood in."""
    stock = _stock(new)
    mine, theirs = ({**config.to_dict(), **_WRITTEN} for config in (stock, old))
    return old if mine == theirs else stock


_WRITTEN = dict.fromkeys(("architectures", "dtype", "transformers_version"))
"""What saving a model writes into its config."""


def _stock(config: Any) -> Any:
    """A copy that says nothing of mixtures, of the class that a stock library knows."""
    new = copy.deepcopy(config)
    new.__class__ = type(config).__bases__[0]
    new.model_type = type(new).model_type  # the instance has that of its file
    new.__dict__.pop("moefold", None)
    return new


def transformers_inside(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The models of transformers in a module by their paths, none of them part of another."""
    outermost: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{other}.") for other in outermost)
        if isinstance(module, PreTrainedModel) and not nested:
            outermost[name] = module
    return outermost


def _config_around(model: nn.Module, name: str) -> Any:
    """The config of the innermost module with one that a layer is in: a tower has its own."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:depth])), "config", None)
        if config is not None:
            return config
    return None


def _read_strictly(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """`from_pretrained`, which only warns of weights it lacks, made to refuse."""
    loaded = kind.from_pretrained(
        folder,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, and refused below by name
        **_made_without(kind, folder),
    )
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    wrong = {name: sorted(map(str, info[name])) for name in _WRONG if info.get(name)}
    if wrong:
        raise ValueError(
            f"the weights in {folder} are not those of the model it describes: {wrong}"
        )
    return model.eval()


def _made_without(kind: type[PreTrainedModel], folder: Path) -> dict[str, Any]:
    """What the model in a folder was made without, as arguments of its class: no config says it."""
    if "add_pooling_layer" not in inspect.signature(kind.__bases__[0].__init__).parameters:
        return {}
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names.update(weights.keys())
    pooled = any(name.startswith("pooler.") for name in names)
    return {} if pooled else {"add_pooling_layer": False}


_WRONG = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
