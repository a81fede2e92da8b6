"""What an upcycled decoder needs of a native class that is to hold it.

Read from its config and its mixtures, never from weights. The parts of a block that native classes
differ in are words, so that a difference can be said as a sentence:

    norms      before   rms norm of what enters attention and MLP      Llama, Mistral, Qwen
               after    rms norm of what leaves them                   OLMo 2
               plain    layer norm without weights, before             OLMo
    qk_norm    none     queries and keys as they are                   Llama, Mistral, Qwen 2, OLMo
               head     rms norm of each head                          Qwen 3
               all      one rms norm over all heads                    OLMo 2
    biases     none, qkv, qkvo: which products of attention have one
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from moefold.moe import MoE
from moefold.routers import SparseRouter
from moefold.routers.choice import TopExperts
from moefold.routers.score import Identity, Sigmoid, Softmax
from moefold.surgery.export.reasons import Reason
from moefold.surgery.hosts.auto import PREFIX
from moefold.surgery.hosts.layer import MIXTURE, is_moe_layer

Norms = Literal["before", "after", "plain"]
QKNorm = Literal["none", "head", "all"]
Biases = Literal["none", "qkv", "qkvo"]

ROUTER = "upcycle with router 'token-choice'"

_BLOCKS: dict[str, tuple[str, Norms, QKNorm]] = {
    "llama": ("Llama", "before", "none"),
    "mistral": ("Mistral", "before", "none"),
    "qwen2": ("Qwen2", "before", "none"),
    "qwen3": ("Qwen3", "before", "head"),
    "olmo": ("Olmo", "plain", "none"),
    "olmo2": ("Olmo2", "after", "all"),
}
"""How the names of its classes begin, and what its blocks are, by the type of a dense decoder."""

_SOFTMAXES = ("softmax", "clean-softmax")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoder:
    """An upcycled decoder, as native classes see it.

    Attributes:
        kind: type of the dense model, `llama`.
        head: its class without the name of its kind, `ForCausalLM`.
        norms: see the module.
        qk_norm: see the module.
        biases: see the module.
        windows: how far back each layer attends, None for all the way.
        mixtures: by the number of their layer.
    """

    kind: str
    head: str
    norms: Norms
    qk_norm: QKNorm
    biases: Biases
    windows: tuple[int | None, ...]
    mixtures: Mapping[int, MoE]

    @property
    def dense(self) -> tuple[int, ...]:
        """Numbers of the layers that are no mixtures."""
        return tuple(i for i in range(len(self.windows)) if i not in self.mixtures)

    @property
    def first(self) -> MoE:
        """The first mixture; where `reasons_against_mixtures` is empty, the others are alike."""
        return next(iter(self.mixtures.values()))


def as_decoder(model: nn.Module) -> Decoder | None:
    """Describes an upcycled decoder; None if its blocks are like those of no native class."""
    config = getattr(model, "config", None)
    kind = str(getattr(type(config), "model_type", "")).removeprefix(PREFIX)
    if not isinstance(model, PreTrainedModel) or config is None or kind not in _BLOCKS:
        return None
    name, norms, qk_norm = _BLOCKS[kind]
    layers = list(model.base_model.get_submodule("layers").children())
    has_bias = bool(getattr(config, "attention_bias", False))
    return Decoder(
        kind=kind,
        head=type(model).__name__.removeprefix("Moefold").removeprefix(name),
        norms=norms,
        qk_norm=qk_norm,
        biases="qkv" if kind == "qwen2" else "qkvo" if has_bias else "none",
        windows=_windows(config, len(layers)),
        mixtures={
            number: getattr(layer, MIXTURE)
            for number, layer in enumerate(layers)
            if is_moe_layer(layer)
        },
    )


def _windows(config: object, layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def reasons_against_mixtures(decoder: Decoder) -> list[Reason]:
    """Why no native class computes what the mixtures do; what is alike is said once."""
    sites: dict[tuple[Reason, ...], list[str]] = {}
    for moe in decoder.mixtures.values():
        reasons = (*_against_router(moe.router), *_against_experts(moe))
        sites.setdefault(reasons, []).append(moe.site)
    if set(sites) == {()}:
        return _differences(decoder)
    found = []
    for reasons, where in sites.items():
        for number, (why, instead) in enumerate(reasons):
            place = "" if number else f"{_sites(where, decoder)}: "
            found.append(Reason(place + why, instead))
    return found


def _sites(where: list[str], decoder: Decoder) -> str:
    every = len(where) == len(decoder.mixtures)
    return "every mixture" if every and len(where) > 1 else ", ".join(where)


def _against_router(router: nn.Module) -> list[Reason]:
    if not isinstance(router, SparseRouter):
        why = f"its router is a {type(router).__name__}, not token choice by a softmax"
        return [Reason(why, ROUTER)]
    recipe, reasons = router.recipe, []
    if not isinstance(recipe.choice, TopExperts):
        chooser = type(recipe.choice).__name__
        reasons.append(f"its router chooses by {chooser}, not the top k experts of each token")
    else:
        if not recipe.choice.capacity.is_unlimited:
            reasons.append("its experts have a capacity")
        if recipe.choice.top_groups != recipe.choice.expert_groups:
            reasons.append("its experts lie in groups, of which a token takes the best")
    if recipe.cosine is not None:
        reasons.append("its router's logits are cosines, not a linear map")
    if recipe.adapt is not None:
        reasons.append(f"its router adapts without gradient ({type(recipe.adapt).__name__})")
    elif not isinstance(recipe.score, Softmax | Sigmoid | Identity):
        reasons.append(
            f"its router scores by {type(recipe.score).__name__}, which does not order experts as "
            f"a softmax does"
        )
    if recipe.weight.source not in _SOFTMAXES and not (
        recipe.weight.source == "scores" and isinstance(recipe.score, Softmax)
    ):
        of = recipe.weight.source
        of = type(recipe.score).__name__ if of == "scores" else of
        reasons.append(f"its combine weights are not a softmax ({of})")
    if recipe.weight.scale != 1.0:
        reasons.append(f"its combine weights are scaled by {recipe.weight.scale}")
    return [Reason(why, ROUTER) for why in reasons]


def _against_experts(moe: MoE) -> list[Reason]:
    reasons: list[Reason] = []
    if not moe.experts.gated:
        reasons.append(Reason("its experts have no gate"))
    if moe.experts.bias:
        reasons.append(Reason("its experts have biases"))
    return reasons


def _differences(decoder: Decoder) -> list[Reason]:
    """A native config has one number for all layers."""
    each = [settings(moe) for moe in decoder.mixtures.values()]
    values = {name: sorted({int(one[name]) for one in each}) for name in each[0]}
    return [
        Reason(
            f"the mixtures differ in {name} ({', '.join(map(str, found))})",
            f"give all mixtures the same {name}",
        )
        for name, found in values.items()
        if len(found) > 1
    ]


def settings(moe: MoE) -> dict[str, int | bool]:
    """What a native config says of every mixture that no reason speaks against."""
    router = moe.router
    assert isinstance(router, SparseRouter)
    assert isinstance(router.recipe.choice, TopExperts)
    return {
        "num_experts": moe.experts.num_experts,
        "expert_width": moe.experts.width,
        "k": router.recipe.choice.k,
        # A softmax over all experts sums to one by itself.
        "renormalize": router.recipe.weight.normalize == "chosen",
    }
