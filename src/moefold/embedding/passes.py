"""One pass of a causal model: its hidden states, and what its routers said of every token.

A mixture of ours hands its routings over. A pretrained one that is not rerouted says the same
through its gates, which are listened to for the length of the pass: nothing is changed.

Shapes: `batch tokens` ids; hidden states `batch tokens hidden`; logits `batch tokens experts`, one
tensor for each mixture, first layer first.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moefold.record import AbstractRouted, record_routing
from moefold.rerouting.blocks import find_blocks
from moefold.routers.base import float32_or_better
from moefold.routing import Routing, SparseRouting

Heard = Callable[[], dict[str, Float[Tensor, "batch tokens experts"]]]
"""Logits by mixture; asked after the pass."""


def run(
    model: Any,
    ids: Int[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    *,
    layer: int = -1,
    routing: bool = False,
) -> tuple[Float[Tensor, "batch tokens hidden"], dict[str, Float[Tensor, "batch tokens experts"]]]:
    """Hidden states of a layer and, if asked, logits of the routers by mixture.

    Positions are counted along the real tokens, so that padding on the left moves nothing.

    Args:
        model: a causal model of transformers, with or without its head.
        ids: token ids.
        mask: True for real tokens.
        layer: which hidden states, -1 for the last, after the final norm.
        routing: whether logits are wanted.
    """
    body = model.base_model
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    if "position_ids" in inspect.signature(body.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    wanted = layer != -1
    with _listening(model, ids.shape) if routing else _nothing() as heard:
        made = body(**inputs, output_hidden_states=wanted)
        logits = heard()
    hidden = made.hidden_states[layer] if wanted else made.last_hidden_state
    return float32_or_better(hidden), logits


@contextmanager
def _nothing() -> Iterator[Heard]:
    yield dict


@contextmanager
def _listening(model: nn.Module, shape: torch.Size) -> Iterator[Heard]:
    if any(isinstance(module, AbstractRouted) for module in model.modules()):
        with record_routing(model) as record:
            yield lambda: {site: _said(site, record[site], shape) for site in record}
        return
    gates = {block.name: getattr(block.block, block.gate) for block in find_blocks(model)}
    found: dict[str, Tensor] = {}

    def listener(name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, made: tuple[Tensor, ...]) -> None:
            found[name] = float32_or_better(made[0].reshape(*shape, -1))

        return keep

    handles = [gate.register_forward_hook(listener(name)) for name, gate in gates.items()]
    try:
        yield lambda: {name: _heard(name, found) for name in gates}
    finally:
        for handle in handles:
            handle.remove()


def _said(site: str, routings: list[Routing], shape: torch.Size) -> Tensor:
    if len(routings) != 1:
        raise ValueError(
            f"{site}: {len(routings)} routings in one pass, not 1; routing weights are taken of a "
            f"model that runs each mixture once. kind='hidden' works"
        )
    (routing,) = routings
    if not isinstance(routing, SparseRouting) or routing.logits is None:
        raise ValueError(
            f"{site}: its router has no logits of tokens by experts to make an embedding of; "
            f"kind='hidden' works"
        )
    return float32_or_better(routing.logits.reshape(*shape, -1))


def _heard(name: str, found: dict[str, Tensor]) -> Tensor:
    if name not in found:
        raise ValueError(
            f"{name}: nothing was heard of its gate, as in a model that is compiled; call "
            f"moefold.reroute(model, 'token-choice') before compiling it"
        )
    return found[name]
