"""Checks of a host: what the router sees of the inputs, and what it must not.

Shapes: a mask is `batch tokens`; outputs are compared where tokens are real, `real dim`.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moefold import surgery
from moefold.record import record_routing
from moefold.testing.host_probe import (
    ROUTERS,
    TOLERANCE,
    TOLERANCE_PADDED,
    HostCase,
    Inputs,
    config_of,
    distance,
    is_causal,
    mixtures_in,
    spread_experts,
)


def causality(case: HostCase) -> str | None:
    """Where later tokens are hidden, a router that sees them is refused, and others are named."""
    causal = tuple(site.name for site in case.sites if site.causal)
    if not causal:
        return "it hides no later token"
    for name, router in ROUTERS.items():
        if is_causal(router):
            continue
        model = case.fresh()
        said = ""
        try:
            surgery.plan(model, config_of(router, causal))
        except ValueError as error:
            said = str(error)
        assert said, f"router {name!r} sees later tokens and was not refused"
        assert "a causal host cannot use it. Causal routers: token-choice" in said, said
    return None


def padding_is_in_no_routing(case: HostCase) -> str | None:
    """Every router is told which tokens are real, by the mask its own site must see."""
    for router in (ROUTERS["token"], ROUTERS["sequence"]):
        names = case.names(router)
        if not names:
            continue
        model = case.fresh()
        made = surgery.upcycle(model, config_of(router, names), inputs=False)
        where = {id(moe): name for name, moe in mixtures_in(model).items()}
        for inputs in (case.inputs, *(pad(case.inputs, 3) for pad in case.paddings.values())):
            with record_routing(model) as record:
                case.run(model, inputs)
            for site in made.chosen:
                moe = where[id(next(iter(mixtures_in(model.get_submodule(site)).values())))]
                (routing,) = record[moe]
                _same_mask(site, routing.mask, case.mask_of(site, inputs))
    if not case.paddings:
        return "it takes no padding"
    return None


def padding_further(case: HostCase) -> str | None:
    """Padding a batch further changes no real token's output, whatever the router looks at."""
    if not case.paddings:
        return "it takes no padding"
    for name, router in ROUTERS.items():
        if not case.names(router):
            continue
        model = case.fresh()
        surgery.upcycle(model, config_of(router, case.names(router)), inputs=False)
        spread_experts(model)
        for side, pad in case.paddings.items():
            before = case.run(model, pad(case.inputs, 0))
            for by in (1, 6):
                change = distance(case.run(model, pad(case.inputs, by)), before)
                assert change < TOLERANCE_PADDED, (
                    f"{by} more tokens of padding ({side}) change real tokens by {change:.1e} "
                    f"with router {name!r}"
                )
    return None


def checkpointing(case: HostCase) -> str | None:
    """With activation checkpointing: the same output and gradients, one record, and it happens."""
    for router in (ROUTERS["token"], ROUTERS["sequence"]):
        names = case.names(router)
        if not names:
            continue
        model = case.fresh()
        surgery.upcycle(model, config_of(router, names), inputs=False)
        spread_experts(model)
        model.train()
        twin = copy.deepcopy(model)
        if not _checkpoint(twin):
            return "it has no switch for checkpointing"
        runs: list[str] = []
        for name, moe in mixtures_in(twin).items():
            moe.register_forward_pre_hook(lambda *_, name=name, runs=runs: runs.append(name))
        output, expected = _gradients(case, model, case.inputs)
        with record_routing(twin) as record:
            again, found = _gradients(case, twin, case.inputs)
        otherwise = [name for name in mixtures_in(twin) if runs.count(name) != 2]
        assert not otherwise, (
            f"mixtures that did not run once forward and once backward: {otherwise}"
        )
        assert all(len(record[site]) == 1 for site in record), "a routing was recorded twice"
        assert distance(again, output) < TOLERANCE, "checkpointing changes the output"
        assert found.keys() == expected.keys(), (
            f"checkpointing changes what has a gradient: {set(found) ^ set(expected)}"
        )
        for name, gradient in expected.items():
            change = distance(found[name], gradient)
            assert change < TOLERANCE, f"checkpointing changes the gradient of {name} by {change}"
    return None


def _same_mask(site: str, found: Tensor | None, wanted: Tensor | None) -> None:
    if wanted is None:
        assert found is None or bool(found.all()), f"{site}: a router is told of padding"
        return
    if found is None:
        assert bool(wanted.bool().all()), f"{site}: no mask reaches the router"
        return
    assert torch.equal(found, wanted.bool()), f"{site}: another mask reaches the router: {found}"


def _checkpoint(model: nn.Module) -> bool:
    """Turns checkpointing on where the model has a switch for it."""
    # Of transformers by its new name and its old one, and of timm.
    for name, given in (
        ("activation_checkpointing_enable", {"use_reentrant": False}),
        ("gradient_checkpointing_enable", {"use_reentrant": False}),
        ("set_grad_checkpointing", True),
    ):
        switch: Any = getattr(model, name, None)
        if switch is not None:
            switch(given)
            return True
    return False


def _gradients(
    case: HostCase, model: nn.Module, inputs: Inputs
) -> tuple[Tensor, dict[str, Tensor]]:
    output = case.answer(model, inputs)
    (output.sin() * output).sum().backward()
    named = model.named_parameters()
    return output.detach(), {name: p.grad for name, p in named if p.grad is not None}
