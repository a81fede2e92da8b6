"""Finding the mixtures of a pretrained model: blocks with a gate and stacked experts.

transformers 5 writes the block of every mixture alike, whatever the model:

    logits, weights, indices = gate(hidden)        tokens experts, tokens k, tokens k
    out = experts(hidden, indices, weights)        tokens dim

so that a block is found by that structure, and checked by running its gate on a few tokens. What
else is in the block (shared experts, scales) stays outside of the competition, as the model has it.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GATES = ("gate", "router")
"""What models call the module that chooses."""

EXPERTS = "experts"

MASK = "attention_mask"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """One mixture of a pretrained model.

    Attributes:
        name: path of the block in the model.
        block: the block.
        layer: the layer around it, which is given the attention mask.
        path: of the block in its layer.
        gate: the name of its gate.
        num_experts: number of experts.
        dim: width of a token.
        k: experts the model's own router gives a token.
        causal: whether the layer hides later tokens.
    """

    name: str
    block: nn.Module
    layer: nn.Module
    path: str
    gate: str
    num_experts: int
    dim: int
    k: int
    causal: bool


def find_blocks(model: nn.Module) -> list[Block]:
    """Every mixture of the model, first layer first.

    Raises:
        ValueError: a block looks like a mixture but does not work like one.
    """
    return list(_blocks(model))


def _blocks(model: nn.Module) -> Iterator[Block]:
    for name, module in model.named_modules():
        gate = next((g for g in GATES if hasattr(getattr(module, g, None), "weight")), None)
        experts = getattr(module, EXPERTS, None)
        if gate is None or not isinstance(experts, nn.Module) or not _is_stacked(experts):
            continue
        layer_name = _layer_around(model, name)
        if layer_name is None:
            continue
        layer = model.get_submodule(layer_name)
        weight = getattr(module, gate).weight
        yield Block(
            name=name,
            block=module,
            layer=layer,
            path=name.removeprefix(layer_name).removeprefix("."),
            gate=gate,
            num_experts=weight.shape[0],
            dim=weight.shape[1],
            k=_try_gate(name, getattr(module, gate), weight),
            causal=_is_causal(layer),
        )


def _is_stacked(experts: nn.Module) -> bool:
    down = getattr(experts, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.ndim == 3


def _layer_around(model: nn.Module, name: str) -> str | None:
    """The innermost module around a block whose forward takes an attention mask."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        path = ".".join(parts[:depth])
        if MASK in inspect.signature(model.get_submodule(path).forward).parameters:
            return path
    return None


@torch.no_grad()
def _try_gate(name: str, gate: nn.Module, weight: Tensor) -> int:
    """How many experts the gate gives a token; checks what it returns."""
    if weight.device.type == "meta":
        return int(getattr(gate, "top_k", 1))
    tokens = 3
    training = gate.training
    try:
        made = gate.eval()(torch.zeros(tokens, weight.shape[1]).to(weight))
    finally:
        gate.train(training)
    shapes = [tuple(t.shape) for t in made] if isinstance(made, tuple) else []
    if len(shapes) != 3 or shapes[0] != (tokens, weight.shape[0]) or shapes[1] != shapes[2]:
        raise ValueError(
            f"{name}: its {type(gate).__name__} returns {shapes or type(made).__name__}; a gate of "
            f"transformers 5 returns logits, weights and indices, "
            f"[{tokens}, {weight.shape[0]}] and twice [{tokens}, k]; upgrade transformers, or "
            f"report the model"
        )
    return shapes[1][1]


def _is_causal(layer: nn.Module) -> bool:
    found = [
        m.is_causal for m in layer.modules() if isinstance(getattr(m, "is_causal", None), bool)
    ]
    return any(found) or not found  # a mixture that does not say is a decoder's
