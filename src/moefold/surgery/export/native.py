"""Native classes of transformers, what each can hold, and an upcycled decoder as one of them.

The weights are renamed, nothing more, for experts are stacked here as they are there:

    layers.N.moe.router.weight         layers.N.mlp.gate.weight
    layers.N.moe.experts.gate_up_proj  layers.N.mlp.experts.gate_up_proj     [experts, 2 width, dim]
    layers.N.moe.experts.down_proj     layers.N.mlp.experts.down_proj        [experts, dim, width]

Qwen2-MoE has a shared expert, times the sigmoid of a linear map of the token. With the map at zero
that is exactly one half: `down_proj` is doubled, which changes no digit. Without a shared expert
its `down_proj` is zero.
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from moefold.moe import MoE
from moefold.surgery.export.decoder import (
    Biases,
    Decoder,
    Norms,
    QKNorm,
    reasons_against_mixtures,
    settings,
)
from moefold.surgery.export.reasons import Reason

_NORMS: dict[Norms, str] = {
    "before": "rms norms before attention and MLP",
    "after": "rms norms after attention and MLP",
    "plain": "layer norms without weights",
}
_QK_NORM: dict[QKNorm, str] = {
    "none": "queries and keys without a norm",
    "head": "a norm of the queries and keys of each head",
    "all": "a norm of queries and keys over all heads",
}
_BIASES: dict[Biases, str] = {
    "none": "no biases in attention",
    "qkv": "biases of queries, keys and values",
    "qkvo": "biases of all products of attention",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """A mixture of experts that transformers has a class for, and what that class can hold.

    Attributes:
        name: how its classes' names begin.
        norms: see `decoder`.
        qk_norm: see `decoder`.
        biases: the kinds that can be.
        windows: `no`, `one` for all layers, or for `each` layer its own.
        dense: whether some layers may be no mixtures.
        shared: whether there is a shared expert.
        renormalize: what combine weights can be.
        source: the class, for the reader.
    """

    name: str
    norms: Norms = "before"
    qk_norm: QKNorm = "none"
    biases: tuple[Biases, ...] = ("none",)
    windows: str = "no"
    dense: bool = False
    shared: bool = False
    renormalize: tuple[bool, ...] = (True, False)

    def reasons_against(self, decoder: Decoder) -> list[Reason]:
        """Why the class cannot hold the decoder; empty if it can."""
        ours = reasons_against_mixtures(decoder)
        reasons = [*ours, *self._against_blocks(decoder), *self._against_layers(decoder)]
        if not ours and settings(decoder.first)["renormalize"] not in self.renormalize:
            why = f"{self.name} renormalises combine weights, and these are not"
            reasons.append(Reason(why, "upcycle with a router that has renormalize=True"))
        return reasons

    def _against_blocks(self, decoder: Decoder) -> Iterator[Reason]:
        who = decoder.kind
        if decoder.norms != self.norms:
            yield Reason(f"{who} has {_NORMS[decoder.norms]}, {self.name} {_NORMS[self.norms]}")
        if decoder.qk_norm != self.qk_norm:
            ours, theirs = _QK_NORM[decoder.qk_norm], _QK_NORM[self.qk_norm]
            yield Reason(f"{who} has {ours}, {self.name} {theirs}")
        if decoder.biases not in self.biases:
            allowed = " or ".join(_BIASES[kind] for kind in self.biases)
            yield Reason(f"{who} has {_BIASES[decoder.biases]}, {self.name} {allowed}")
        found = set(decoder.windows)
        if found != {None} and self.windows == "no":
            yield Reason(f"{who} attends in a sliding window, {self.name} does not")
        elif len(found) > 1 and self.windows == "one":
            yield Reason(f"only some layers attend in a sliding window, in {self.name} all or none")
        if not hasattr(transformers, self.name + decoder.head):
            yield Reason(f"transformers has no {self.name}{decoder.head}", "use another head")

    def _against_layers(self, decoder: Decoder) -> Iterator[Reason]:
        if decoder.dense and not self.dense:
            layers = ", ".join(map(str, decoder.dense))
            why = f"layers without a mixture ({layers}), of which {self.name} has none"
            yield Reason(why, "upcycle with sites='all'")
        if any(moe.shared is not None for moe in decoder.mixtures.values()) and not self.shared:
            yield Reason(f"shared experts, of which {self.name} has none", "set shared_width=0")


NATIVE = {
    "mixtral": Native(name="Mixtral", windows="one", renormalize=(True,)),
    "qwen2-moe": Native(
        name="Qwen2Moe", biases=("none", "qkv"), windows="each", dense=True, shared=True
    ),
    "qwen3-moe": Native(
        name="Qwen3Moe", qk_norm="head", biases=("none", "qkvo"), windows="one", dense=True
    ),
    "olmoe": Native(name="Olmoe", qk_norm="all", biases=("none", "qkvo")),
    "flex-olmo": Native(name="FlexOlmo", norms="after", qk_norm="all", biases=("none", "qkvo")),
}
"""By format, the first that can hold a decoder first."""

NATURAL = {"qwen2": "qwen2-moe", "qwen3": "qwen3-moe", "olmo": "olmoe", "olmo2": "flex-olmo"}
"""The format that a kind of decoder is refused for if none can hold it; Mixtral for the others."""


def write(model: PreTrainedModel, decoder: Decoder, native: Native, folder: Path) -> None:
    """Writes the decoder as a model of the native class.

    Args:
        model: the decoder.
        decoder: what `as_decoder` says of it.
        native: a class with no reason against it.
        folder: empty.
    """
    kind = getattr(transformers, native.name + decoder.head)
    with torch.device("meta"):  # the weights are the model's own: none are made
        made = kind(kind.config_class(**_config(model, decoder, native)))
    made.load_state_dict(dict(_weights(model, decoder, native, made)), assign=True)
    made.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    made.save_pretrained(folder)


def _config(model: PreTrainedModel, decoder: Decoder, native: Native) -> dict[str, Any]:
    """The config of the dense decoder, as far as the native class has such entries, and more."""
    kind = getattr(transformers, native.name + "Config")
    known = {field.name for field in dataclasses.fields(kind)}
    config = {name: value for name, value in model.config.to_dict().items() if name in known}
    # Not every class declares the width of a head, all of them read it.
    if getattr(model.config, "head_dim", None) is not None:
        config["head_dim"] = model.config.head_dim
    mixture, window = settings(decoder.first), max(w or 0 for w in decoder.windows) or None
    width = "moe_intermediate_size" if "moe_intermediate_size" in known else "intermediate_size"
    more = {
        width: mixture["expert_width"],
        "num_experts": mixture["num_experts"],
        "num_local_experts": mixture["num_experts"],
        "num_experts_per_tok": mixture["k"],
        "norm_topk_prob": mixture["renormalize"],
        "mlp_only_layers": list(decoder.dense),
        "shared_expert_intermediate_size": _shared_width(decoder),
        "qkv_bias": decoder.biases == "qkv",
        "attention_bias": decoder.biases == "qkvo",
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in decoder.windows],
    }
    config.update({name: value for name, value in more.items() if name in known})
    return {**config, "architectures": None, "dtype": model.dtype}


def _shared_width(decoder: Decoder) -> int:
    """Of the widest shared expert; 1 if there is none, for a width of 0 is not possible."""
    shared = (moe.shared for moe in decoder.mixtures.values())
    return max((one.width for one in shared if one is not None), default=1)


def _weights(
    model: PreTrainedModel, decoder: Decoder, native: Native, made: PreTrainedModel
) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its native name."""
    for name, value in model.state_dict().items():
        if ".moe.shared." not in name:
            renamed = name.replace(".moe.router.weight", ".mlp.gate.weight")
            yield renamed.replace(".moe.experts.", ".mlp.experts."), value
    if native.shared:
        prefix = "" if made.base_model is made else f"{made.base_model_prefix}."
        for layer, moe in decoder.mixtures.items():
            for name, value in _shared(moe, _shared_width(decoder)).items():
                yield f"{prefix}layers.{layer}.mlp.{name}", value


@torch.no_grad()
def _shared(moe: MoE, width: int) -> dict[str, Tensor]:
    """A shared expert that adds what the mixture's own does; see the module."""
    like = moe.experts.down_proj
    gate, up = like.new_zeros(2, width, moe.experts.dim)
    down = like.new_zeros(moe.experts.dim, width)
    if moe.shared is not None:
        weights, own = moe.shared.weights, moe.shared.width
        gate[:own], up[:own] = weights.up[0].chunk(2)
        down[:, :own] = 2 * weights.down[0]
    return {
        "shared_expert.gate_proj.weight": gate,
        "shared_expert.up_proj.weight": up,
        "shared_expert.down_proj.weight": down,
        "shared_expert_gate.weight": like.new_zeros(1, moe.experts.dim),
    }
