"""What a host's contract is checked with: copies of a dense model, inputs, masks and routers.

Shapes: a mask is `batch tokens`; ids are as long as the mask they belong to.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moefold import routers
from moefold.moe import MoE, MoEConfig
from moefold.routers import RouterConfig
from moefold.surgery import Copies, UpcycleConfig
from moefold.surgery.hosts import Site, find_host
from moefold.surgery.receipt import first_tensor_of

Inputs = Mapping[str, Any]
Padding = Callable[[Inputs, int], Inputs]
MaskOf = Callable[[str, Inputs], Tensor | None]

TOLERANCE = 1e-10
"""How far outputs in float64 may be apart, as a share of their length.

Sums in another order differ by some 1e-15. Many hosts compute norms or a softmax in float32, where
such a difference is rounded away: that it falls across the border of two float32 numbers instead
happens to one number in about 1e8.
"""

TOLERANCE_PADDED = 1e-5
"""The same between batches of another shape.

A softmax or norm that a host computes in float32 may then sum in another order, as the processor's
vectors have it, and be off by some 1e-7. What leaks from padding changes tokens by far more.
"""

ROUTERS: dict[str, RouterConfig] = {
    "token": routers.config("token-choice", k=2, renormalize=True),
    "capacity": routers.config("token-choice", k=2, capacity_factor=0.75),
    "sequence": routers.config("expert-choice", capacity_factor=1.5),
    "batch": routers.config("expert-choice", capacity_factor=1.5, group="batch"),
    "position": routers.config("expert-choice", capacity_factor=1.5, group="position"),
    "unified": routers.config("unified", budget=1.5),
    "unified, batch": routers.config("unified", budget=1.5, group="batch"),
    "soft": routers.config("soft", slots=2),
}
"""A router of every reach and kind, by what it looks at."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostCase:
    """A dense model and what to give it.

    Attributes:
        dense: the model, float64, in evaluation mode; checks work on copies.
        sites: its sites.
        inputs: arguments of its forward pass.
        paddings: ways to pad them further.
        mask_of: the mask a site must see; that of the output for the name "".
    """

    dense: nn.Module
    sites: tuple[Site, ...]
    inputs: Inputs
    paddings: Mapping[str, Padding]
    mask_of: MaskOf

    def fresh(self) -> nn.Module:
        """A dense model to operate on."""
        return copy.deepcopy(self.dense)

    def names(self, router: RouterConfig | None = None) -> tuple[str, ...]:
        """Names of the sites that may take the router: of all of them, if it is causal."""
        causal = router is None or is_causal(router)
        return tuple(site.name for site in self.sites if causal or not site.causal)

    def run(self, model: nn.Module, inputs: Inputs | None = None) -> Tensor:
        """What the model returns of real tokens, in evaluation mode and without a graph."""
        with torch.no_grad():
            return self.answer(model, self.inputs if inputs is None else inputs)

    def answer(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """What the model returns of real tokens."""
        output = first_tensor_of(model, inputs)
        mask = self.mask_of("", inputs)
        if mask is not None and output.shape[:2] == mask.shape:
            return output[mask.bool()]
        return output


def host_case(
    model: nn.Module, inputs: Inputs, paddings: Mapping[str, Padding] | None, mask_of: MaskOf
) -> HostCase:
    """Prepares a case.

    Raises:
        ValueError: no host claims the model.
    """
    dense = copy.deepcopy(model).double().eval()
    sites = find_host(dense).sites(dense)
    if paddings is None:
        padded = any(mask_of(name, inputs) is not None for name in ("", *(s.name for s in sites)))
        paddings = {"right": pad_right} if padded else {}
    return HostCase(
        dense=dense, sites=sites, inputs=dict(inputs), paddings=paddings, mask_of=mask_of
    )


def usual_mask(site: str, inputs: Inputs) -> Tensor | None:
    """The mask by the names of transformers; none for what is in a vision tower."""
    parts = site.split(".")
    if any(part.startswith("vision") for part in parts):
        return None
    decodes = "decoder_input_ids" in inputs and (not site or "decoder" in parts)
    return inputs.get("decoder_attention_mask" if decodes else "attention_mask")


def pad_right(inputs: Inputs, by: int) -> dict[str, Any]:
    """More padding behind every sequence, of ids that stand for something elsewhere."""
    padded = dict(inputs)
    for name, value in _texts(inputs):
        padded[name] = functional.pad(value, (0, by), value=_filler(name, value))
    return padded


def pad_left(inputs: Inputs, by: int) -> dict[str, Any]:
    """All the padding, and more, before every sequence; `position_ids` count real tokens."""
    order = inputs["attention_mask"].argsort(dim=1, stable=True)  # padding first, the rest in order
    padded = dict(inputs)
    for name, value in _texts(inputs):
        moved = value.gather(1, order)
        padded[name] = functional.pad(moved, (by, 0), value=_filler(name, value))
    padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return padded


def is_causal(router: RouterConfig) -> bool:
    """Whether no later token changes what an earlier one gets."""
    return router.build(8, 4).is_causal


def config_of(router: RouterConfig, sites: tuple[str, ...] | str = "all") -> UpcycleConfig:
    """Four experts and a router of some size, so that tokens differ in what they choose."""
    moe = MoEConfig(num_experts=4, router=router)
    return UpcycleConfig(moe=moe, sites=sites, birth=Copies(router_std=1.0))


def mixtures_in(model: nn.Module) -> dict[str, MoE]:
    """The mixtures of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


@torch.no_grad()
def spread_experts(model: nn.Module) -> None:
    """Makes experts differ, so that another routing is another output."""
    for moe in mixtures_in(model).values():
        for parameter in moe.experts.parameters():
            nn.init.normal_(parameter, std=0.3)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Length of the difference as a share of the length of what is wanted."""
    assert found.shape == wanted.shape, f"{tuple(wanted.shape)} became {tuple(found.shape)}"
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))


def _texts(inputs: Inputs) -> list[tuple[str, Tensor]]:
    """Ids and masks: what has a number for each token."""
    return [
        (name, value)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point()
    ]


def _filler(name: str, value: Tensor) -> int:
    # Any id of the vocabulary does but the one that some models take for padding themselves.
    return int(value[0, 0]) if name.endswith("ids") else 0
