"""SentenceTransformer: the transformer inside it is the host."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import PreTrainedModel

from moefold.moe import MoE
from moefold.surgery.encoder import refuse_pickles
from moefold.surgery.hosts.base import AbstractHost, Site
from moefold.surgery.hosts.changes import Changes
from moefold.surgery.hosts.forms import FORMS
from moefold.surgery.hosts.transformer import TransformersHost, transformers_inside


@final
class SentenceTransformerHost(AbstractHost):
    """A SentenceTransformer; its site names start at it, as in `0.model.encoder.layer.1`."""

    name = "sentence-transformer"

    def claims(self, model: nn.Module) -> bool:
        """Whether the model is a SentenceTransformer."""
        return isinstance(model, SentenceTransformer)

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """The sites of the transformer inside, under their names here."""
        prefix, inner, host = _inside(model)
        sites = host.sites(inner)
        return tuple(dataclasses.replace(site, name=prefix + site.name) for site in sites)

    def install(self, model: nn.Module, site: Site, moe: MoE, changes: Changes) -> None:
        """As the host of the transformer does it."""
        _, inner, host = _inside(model)
        host.install(inner, site, moe, changes)

    def sign(self, model: nn.Module, section: Mapping[str, Any], changes: Changes) -> None:
        """Signs the transformer: every checkpoint a trainer writes then says what it is."""
        prefix, inner, host = _inside(model)
        sites = {name.removeprefix(prefix): moe for name, moe in section["sites"].items()}
        host.sign(inner, {**section, "sites": sites}, changes)

    def unsign(self, model: nn.Module) -> None:
        """Makes the transformer a dense one again."""
        _, inner, host = _inside(model)
        host.unsign(inner)

    def section(self, model: nn.Module) -> dict[str, Any] | None:
        """The section of the transformer, under the names used here."""
        prefix, inner, host = _inside(model)
        section = host.section(inner)
        if section is None:
            return None
        sites = {prefix + name: moe for name, moe in section["sites"].items()}
        return {**section, "sites": sites}

    def dense_flops(self, model: nn.Module, tokens: int) -> float:
        """Those of the transformer; pooling is nothing beside it."""
        _, inner, host = _inside(model)
        return host.dense_flops(inner, tokens)

    def source(self, model: nn.Module) -> str:
        """Where the transformer was loaded from."""
        _, inner, host = _inside(model)
        return host.source(inner)

    def write(
        self, model: nn.Module, folder: Path, *, max_shard_size: int | str | None = None
    ) -> None:
        """What `SentenceTransformer.save_pretrained` writes, without a model card."""
        assert isinstance(model, SentenceTransformer)
        _, inner, _ = _inside(model)
        if max_shard_size is not None:  # the library has no way to say it to the module inside
            inner.__dict__["save_pretrained"] = functools.partial(
                inner.save_pretrained, max_shard_size=max_shard_size
            )
        try:
            model.save_pretrained(str(folder), create_model_card=False)
        finally:
            inner.__dict__.pop("save_pretrained", None)

    def read(self, folder: Path) -> nn.Module:
        """Opens the folder on the CPU, in evaluation mode; refuses pickles."""
        refuse_pickles(folder)
        model = SentenceTransformer(
            str(folder),
            device="cpu",
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
        _, inner, _ = _inside(model)
        _check_weights(inner, folder)
        return model.eval()


def _inside(model: nn.Module) -> tuple[str, PreTrainedModel, AbstractHost]:
    """Path (with its dot), module and host of the one transformer in a SentenceTransformer."""
    outermost = transformers_inside(model)
    if len(outermost) != 1:
        found = ", ".join(f"{name} ({type(m).__name__})" for name, m in outermost.items()) or "none"
        raise ValueError(
            f"a SentenceTransformer must hold one transformer, this one holds {len(outermost)} "
            f"({found}); upcycle a transformer inside it by itself"
        )
    ((name, inner),) = outermost.items()
    host = TransformersHost()
    if host.claims(inner):
        return f"{name}.", inner, host
    raise ValueError(
        f"the transformer {name} inside is a {type(inner).__name__}, none of whose layers is "
        f"known; there are: {', '.join(FORMS.names())}"
    )


def _check_weights(inner: PreTrainedModel, folder: Path) -> None:
    """Refuses what the library only warns of: weights that were not in the folder."""
    stored: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            stored.update(weights.keys())
    needed = set(inner.state_dict()) - set(inner.all_tied_weights_keys)
    if stored != needed:
        raise ValueError(
            f"the weights in {folder} are not those of the model it describes: missing "
            f"{sorted(needed - stored)}, unexpected {sorted(stored - needed)}"
        )
