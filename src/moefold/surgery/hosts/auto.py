"""The saved mixtures of every transformer, as classes that transformers' own Auto classes find.

For a config such as LlamaConfig there is a MoefoldLlamaConfig of type `moefold_llama`, which holds
one entry more, `moefold`: what was done. For a model such as LlamaForCausalLM there is a
MoefoldLlamaForCausalLM, which builds itself dense and then puts mixtures where its config says.
All of these are made when they are asked for, by name or through `AutoConfig`, never from code in
a saved folder.
"""

import copy
import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from moefold.auto_classes import NAME, PREFIX
from moefold.surgery.hosts.changes import Changes
from moefold.surgery.hosts.layer import install_saved

_LOCK = threading.RLock()


def _once(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Calls a function once for each argument, whatever threads ask at the same time."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def call(base: Any) -> Any:
        with _LOCK:
            return cached(base)

    return call


def __getattr__(name: str) -> Any:
    """Finds a class by its name, as unpickling does."""
    if name.startswith(NAME):
        import transformers

        base = getattr(transformers, name.removeprefix(NAME), None)
        if isinstance(base, type) and issubclass(base, PreTrainedConfig):
            return config_class(base)
        if isinstance(base, type) and issubclass(base, PreTrainedModel):
            return model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_moefold_config(config: object) -> bool:
    """Whether a config can say which layers are mixtures."""
    # Of the class: a config that was read from a file keeps the dense type in the instance.
    return str(getattr(type(config), "model_type", "")).startswith(PREFIX)


@_once
def config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class with a `moefold` entry, known to AutoConfig from now on."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        register_models(base)  # whoever has a config wants a model soon
        return object.__new__(cls)

    body = {
        "__module__": __name__,
        "__qualname__": NAME + base.__name__,
        "__doc__": f"A {base.__name__} whose entry `moefold` says which layers are mixtures.",
        "__annotations__": {"moefold": dict[str, Any] | None},
        # Configs of transformers take whatever stands in the file; a typed __init__ would not.
        "__no_type_check__": True,
        "__new__": new,
        "model_type": PREFIX + base.model_type,
        "moefold": None,
    }
    made = type(NAME + base.__name__, (base,), body)
    AutoConfig.register(made.model_type, made, exist_ok=True)
    return made


@_once
def model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The model class that builds mixtures where its config says."""
    config = config_class(base.config_class)

    def init(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        rebuild(self)

    body = {
        "__module__": __name__,
        "__qualname__": NAME + base.__name__,
        "__doc__": f"{base.__name__} with mixtures of experts, as `from_pretrained` opens one.",
        "__init__": init,
        "config_class": config,
    }
    return type(NAME + base.__name__, (base,), body)


@_once
def register_models(base: type[PreTrainedConfig]) -> None:
    """Tells every Auto class that opens models of a config of those with mixtures."""
    for auto in vars(modeling_auto).values():
        if not (isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass)):
            continue
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is None or base not in mapping:
            continue
        # One class or several, of which the Auto class takes the first unless the config says else.
        kinds = mapping[base] if isinstance(mapping[base], tuple) else (mapping[base],)
        made = tuple(model_class(kind) for kind in kinds if kind.config_class is base)
        if made:
            mapping.register(config_class(base), made[0] if len(made) == 1 else made, exist_ok=True)


def rebuild(model: PreTrainedModel) -> None:
    """Makes a model whose `__init__` built every layer dense what its config says.

    Raises:
        ValueError: the config describes no mixture, or one where the model has no layer for it.
    """
    section = getattr(model.config, "moefold", None)
    if section is None:
        raise ValueError(
            f"a {type(model.config).__name__} without its `moefold` entry describes no mixture; "
            f"upcycle a dense model with moefold.upcycle"
        )
    sites = {_full_name(model, name): moe for name, moe in section["sites"].items()}
    for name, moe in sites.items():
        install_saved(model, name, moe, Changes())
    for part, names in parts_with_sites(model, sites):
        holders, new = signed_config(part, {**section, "sites": names})
        for module in holders:
            module.__dict__["config"] = new
        part.__dict__["_weight_conversions"] = []  # see `TransformersHost.sign`


def signed_config(
    model: PreTrainedModel, section: Mapping[str, Any]
) -> tuple[list[nn.Module], PreTrainedConfig]:
    """The config of a model with a section in it, a copy, and the modules that hold the old one.

    Args:
        model: a model, or one that is part of another.
        section: what was done, `sites` named as in the model.
    """
    old, prefix = model.config, body_prefix(model)
    new = copy.deepcopy(old)
    if not is_moefold_config(old):
        new.__class__ = config_class(type(old))
        register_models(type(old))
    sites = {name.removeprefix(prefix): moe for name, moe in section["sites"].items()}
    new.moefold = {**section, "sites": sites}  # pyright: ignore[reportAttributeAccessIssue]
    return [m for m in model.modules() if m.__dict__.get("config") is old], new


def parts_with_sites(
    model: PreTrainedModel, sites: Mapping[str, Any]
) -> list[tuple[PreTrainedModel, dict[str, Any]]]:
    """Models inside a model that have a config of their own, and the sites in them.

    The towers of CLIP, the halves of an encoder-decoder: they can be saved by themselves, and must
    say then what they are. Sites are named as in the part.
    """
    found: list[tuple[PreTrainedModel, dict[str, Any]]] = []
    seen = [model.config]
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or any(module.config is c for c in seen):
            continue
        seen.append(module.config)
        own = {n.removeprefix(f"{path}."): m for n, m in sites.items() if n.startswith(f"{path}.")}
        if own:
            found.append((module, own))
    return found


def body_prefix(model: PreTrainedModel) -> str:
    """Path, with its dot, of the model's body in it; empty if it has no head or no body apart."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def submodule(model: PreTrainedModel, name: str) -> Any:
    """The module of a name that counts from the body; None if there is none."""
    try:
        return model.get_submodule(_full_name(model, name))
    except AttributeError:
        return None


def _full_name(model: PreTrainedModel, name: str) -> str:
    """A name that counts from the body as one that counts from the model."""
    full = body_prefix(model) + name
    try:
        model.get_submodule(full)
    except AttributeError:
        return name
    return full
