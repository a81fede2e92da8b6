"""Any other module with layers of a known form: timm's, or your own, described in ten lines.

from moefold.surgery import Form, describe_layer

describe_layer("mine", "blocks of mine", Form(
layer="my_package.model.Block",      # its class
up="ff.first", down="ff.second",     # its two linear maps
activation="ff.activation",
pieces=("ff",),                      # the module that is the MLP
mask="key_mask",                     # the argument that says which tokens are real
))
moefold.upcycle(model)
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from torch import nn

from moefold.moe import MoE
from moefold.surgery.hosts.base import AbstractHost, Site
from moefold.surgery.hosts.changes import Changes
from moefold.surgery.hosts.flops import dense_flops
from moefold.surgery.hosts.forms import describe, known_layers
from moefold.surgery.hosts.layer import install, install_saved, is_moe_layer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

_SECTION = "_moefold_section"


@final
class PlainHost(AbstractHost):
    """A module that no library can build again from a config: `load` is given a dense one."""

    name = "plain"

    def claims(self, model: nn.Module) -> bool:
        """Whether a layer in it has a form, or had one."""
        return any(map(is_moe_layer, model.modules())) or bool(known_layers(model))

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """One for each layer whose form is known."""
        return tuple(describe(name, layer, form) for name, layer, form in known_layers(model))

    def install(self, model: nn.Module, site: Site, moe: MoE, changes: Changes) -> None:
        """Puts the mixture into the layer."""
        install(site, moe, changes)

    def sign(self, model: nn.Module, section: Mapping[str, Any], changes: Changes) -> None:
        """Keeps the section with the model, which has no config, and signs transformers in it.

        They can be saved by themselves, and must say then what they are.
        """
        changes.set_attribute(model, _SECTION, dict(section))
        for prefix, inner in _transformers_inside(model).items():
            sites = {
                name.removeprefix(f"{prefix}."): moe
                for name, moe in section["sites"].items()
                if name.startswith(f"{prefix}.")
            }
            if sites:
                _transformers_host().sign(inner, {**section, "sites": sites}, changes)

    def unsign(self, model: nn.Module) -> None:
        """Forgets the section, and what `sign` wrote into transformers inside."""
        del model.__dict__[_SECTION]
        for inner in _transformers_inside(model).values():
            if _transformers_host().section(inner) is not None:
                _transformers_host().unsign(inner)

    def section(self, model: nn.Module) -> dict[str, Any] | None:
        """What `sign` kept."""
        return model.__dict__.get(_SECTION)

    def dense_flops(self, model: nn.Module, tokens: int) -> float:
        """See `flops`."""
        return dense_flops(model, tokens)

    def source(self, model: nn.Module) -> str:
        """Nothing is known."""
        return ""

    def write(
        self, model: nn.Module, folder: Path, *, max_shard_size: int | str | None = None
    ) -> None:
        """The weights, tied ones once, and the section."""
        from safetensors.torch import save_model

        if max_shard_size is not None:
            raise ValueError(
                f"max_shard_size is {max_shard_size!r}, but a {type(model).__name__} is of no "
                f"library that reads shards, and is written as one file; leave max_shard_size out"
            )
        save_model(model, str(folder / WEIGHTS))
        section = json.dumps({"moefold": self.section(model)}, indent=2)
        (folder / CONFIG).write_text(section + "\n", encoding="utf-8")

    def read(self, folder: Path) -> nn.Module:
        """Refuses: see `read_into`."""
        return self.read_into(folder, None)

    def read_into(self, folder: Path, dense: nn.Module | None) -> nn.Module:
        """Makes a dense model what the folder says; all or nothing.

        Raises:
            ValueError: there is no model, or it is another than the one that was saved.
        """
        from safetensors.torch import load_model

        if dense is not None and any(map(is_moe_layer, dense.modules())):
            raise ValueError(
                f"the {type(dense).__name__} given is upcycled already; give the dense model as it "
                f"was before surgery"
            )
        if dense is None:
            raise ValueError(
                f"{folder} holds a model of no library, which cannot be built from here; build "
                f"the dense model as it was before surgery and call moefold.load(folder, into=it)"
            )
        section = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["moefold"]
        before = {name: value.clone() for name, value in dense.state_dict().items()}
        changes = Changes()
        try:
            for name, moe in section["sites"].items():
                install_saved(dense, name, moe, changes)
            self.sign(dense, section, changes)
            _refuse_other_dtypes(dense, folder / WEIGHTS)
            load_model(dense, str(folder / WEIGHTS))
        except BaseException as error:
            changes.undo()
            dense.load_state_dict(before)
            if not isinstance(error, RuntimeError | ValueError):
                raise
            raise ValueError(
                f"the model given is not the one that was saved in {folder}: {error}"
            ) from error
        return dense.eval()


def _transformers_inside(model: nn.Module) -> Mapping[str, Any]:
    """Models of transformers in the module; none where that library was never imported."""
    if "transformers" not in sys.modules:
        return {}
    from moefold.surgery.hosts.transformer import transformers_inside

    return transformers_inside(model)


def _transformers_host() -> AbstractHost:
    from moefold.surgery.hosts.transformer import TransformersHost

    return TransformersHost()


def _refuse_other_dtypes(model: nn.Module, file: Path) -> None:
    """Raises if reading the weights into the model would round them."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
        for name, value in model.state_dict().items():
            dtype = stored.get_tensor(name).dtype if name in names else value.dtype
            if dtype != value.dtype:
                raise ValueError(
                    f"{name} is {value.dtype} there and {dtype} in the folder; cast the model first"
                )
