"""A pretrained mixture under another router: the model's own forward, seen through two lenses.

The layer finds a block that knows the mask, the block a gate and experts that know each other:

    layer.forward   ->  block(x)      is told which tokens are real
    block.forward   ->  gate(x)       is the model's own, and its logits are kept for this call
                        experts(...)  are given rows by our routing instead of indices

Experts are called as the model calls them, each row as a token with one expert of weight 1, so that
whatever they compute (biases, clamps, a kernel from elsewhere) is what the model computes. Nothing
is copied, and nothing is kept between two calls. Shapes: `batch tokens dim` hidden states.
"""

import functools
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moefold.record import AbstractRouted
from moefold.rerouting.blocks import EXPERTS, MASK
from moefold.routers.base import float32_or_better
from moefold.routers.inference import Past
from moefold.routers.sparse import LogitRouter
from moefold.routing import SparseRouting
from moefold.surgery.hosts.lens import Lens, names_of_arguments, seen_class, standing_in
from moefold.surgery.hosts.masks import real_tokens
from moefold.surgery.hosts.past import CachedPast, past_of

REROUTER = "rerouter"
"""The name of our router in the block."""

BLOCKS = "_moefold_blocks"
"""Attribute of a layer: its rerouted blocks, path to name of the gate."""

FAITHFUL = "_moefold_faithful"
"""Attribute of a layer: whether padding competes."""


@final
class Rerouter(AbstractRouted):
    """What chooses in a pretrained block.

    Attributes:
        router: turns logits into a routing; None for the model's own choice.
        site: path of the block in the model, used in errors.
        own: whether the choice is the model's own.
    """

    def __init__(self, router: LogitRouter | None, site: str) -> None:
        super().__init__(nn.Identity() if router is None else router)
        self.own = router is None
        self.site = site
        if router is not None:
            router.site = site

    def forward(
        self,
        hidden: Float[Tensor, "flat_tokens dim"],
        native: tuple[Tensor, Tensor, Tensor],
        experts: nn.Module,
        shape: tuple[int, int],
        mask: Bool[Tensor, "batch tokens"] | None,
        past: Past | None = None,
    ) -> Float[Tensor, "flat_tokens dim"]:
        """Computes experts on the rows that are chosen.

        Args:
            hidden: the tokens.
            native: logits, weights and indices of the model's gate.
            experts: the model's experts.
            shape: sequences and tokens.
            mask: True for real tokens.
            past: earlier tokens, for a router that looks at them.
        """
        logits, weights, indices = native
        logits = logits.reshape(*shape, -1)
        if self.own:
            if self.sinks:
                self.hand_over(own_routing(logits, weights, indices, mask))
            return experts(hidden, indices, weights)
        tokens = hidden.reshape(*shape, -1)
        routing = self.router(logits, mask, past=past, hidden=tokens)
        self.hand_over(routing)
        rows = routing.dispatch(tokens)
        # Spare rows belong to no expert: any will do, their weight is zero.
        expert = routing.expert_of_row.clamp_max(routing.num_experts - 1).unsqueeze(1)
        made = experts(rows, expert, torch.ones_like(expert, dtype=weights.dtype))
        return routing.combine(made).reshape(hidden.shape)


def block_of(site: str) -> str:
    """The block that a site belongs to: what chooses in a rerouted one is a part of it."""
    return site.removesuffix(f".{REROUTER}")


def own_routing(
    logits: Float[Tensor, "batch tokens experts"],
    weights: Float[Tensor, "flat_tokens k"],
    indices: Int[Tensor, "flat_tokens k"],
    mask: Bool[Tensor, "batch tokens"] | None,
) -> SparseRouting:
    """The choice of the model's own gate as a routing, padding left out."""
    flat = logits.reshape(-1, logits.shape[-1])
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(1, indices, True)
    weight = torch.zeros_like(flat, dtype=weights.dtype).scatter(1, indices, weights)
    if mask is not None:
        chosen = chosen & mask.reshape(-1, 1)
    return SparseRouting.from_choice(
        chosen.reshape(logits.shape),
        float32_or_better(weight).reshape(logits.shape),
        mask=mask,
        logits=float32_or_better(logits),
    )


class _Call:
    """What the gate said in one call of a block."""

    native: tuple[Tensor, Tensor, Tensor]


def run_block(
    block: nn.Module, gate: str, x: Tensor, mask: Tensor | None, past: CachedPast | None
) -> Any:
    """A block's forward with our routing in it."""
    call = _Call()
    rerouter, own_gate, own_experts = (block.get_submodule(n) for n in (REROUTER, gate, EXPERTS))
    shape = (x.shape[0], x.shape[1])

    def gated(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        call.native = own_gate(hidden)
        return call.native

    def computed(hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        # Weights as the block hands them on: some scale them between gate and experts.
        native = (call.native[0], weights, indices)
        return rerouter(hidden, native, own_experts, shape, mask, past)

    return type(block).forward(Lens(block, {gate: gated, EXPERTS: computed}), x)  # pyright: ignore


@functools.cache
def rerouted_layer(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer whose blocks are rerouted; see `seen_class`."""
    names = names_of_arguments(base)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        given.update(kwargs)
        cache = given.get("past_key_values")
        index: int = self._moefold_layer_index  # pyright: ignore
        mask = None
        if not getattr(self, FAITHFUL):
            mask = real_tokens(given.get(MASK), given[names[0]], cache, index)  # pyright: ignore
        stand_ins: dict[str, Any] = {}
        for path, gate in getattr(self, BLOCKS).items():
            name, *rest = path.split(".")
            rerouter = self.get_submodule(f"{path}.{REROUTER}")
            assert isinstance(rerouter, Rerouter)
            past = past_of(rerouter.own_router, cache, index, rerouter.site)
            run = functools.partial(run_block, self.get_submodule(path), gate, mask=mask, past=past)
            stand_ins[name] = standing_in(getattr(self, name), rest, run)
        return base.forward(Lens(self, stand_ins), *args, **kwargs)

    return seen_class(base, forward, rerouted_layer)
