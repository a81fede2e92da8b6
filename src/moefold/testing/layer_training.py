"""Checks of how a layer behaves in a training run: repetition, losses that ride, state, compiling.

Shapes: `batch tokens dim` in and out.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moefold.losses import has_choice
from moefold.moe import MoEConfig, set_loss_scale
from moefold.output_losses import output_losses
from moefold.record import record_routing
from moefold.testing.contract import from_seed
from moefold.testing.layer_probe import (
    LayerCase,
    forward,
    gradients,
    recorded,
    same_gradients,
    task,
)
from moefold.testing.probe import Batch, assert_close

LOSSES = {"balance": 0.3, "z": 0.2}


def checkpointing(case: LayerCase) -> str | None:
    """Activation checkpointing changes nothing, with losses on board, and records once."""
    for batch in case.batches():
        plain, repeated = (case.layer(training=True, losses=LOSSES) for _ in range(2))
        x, other = (batch.x.clone().requires_grad_() for _ in range(2))
        y = forward(plain, replace(batch, x=x))
        task(y).backward()
        with record_routing(repeated) as record:
            again = forward(
                partial(checkpoint, repeated, use_reentrant=False), replace(batch, x=other)
            )
            task(again).backward()
        assert len(record[""]) == 1, f"one pass left {len(record[''])} routings in the record"
        assert_close(again, y, "with checkpointing")
        same_gradients(gradients(repeated, other), gradients(plain, x), "with checkpointing")
    return None


def losses_ride(case: LayerCase) -> str | None:
    """A loss that rides trains as one that is added: with accumulation and checkpointing too."""
    batches = list(case.batches())[:2]
    steps = len(batches)
    own = case.layer().losses
    for coefficients in (own, LOSSES) if own else (LOSSES,):
        added = _added(case, batches, coefficients)
        for repeat in (False, True):
            layer = case.layer(training=True, losses=coefficients)
            set_loss_scale(layer, 1 / steps)
            call = partial(checkpoint, layer, use_reentrant=False) if repeat else layer
            for seed, batch in enumerate(batches):
                (task(forward(call, batch, seed=seed)) / steps).backward()
            what = f"riding{', checkpointed,' if repeat else ''} against added, {steps} batches"
            same_gradients(gradients(layer), added, what)
    return _would_show(case, batches[0])


def _added(
    case: LayerCase, batches: list[Batch], coefficients: Mapping[str, float]
) -> dict[str, Tensor]:
    layer = case.layer(training=True, losses={})
    of_results = {n: c for n, c in coefficients.items() if n in output_losses}
    of_routings = {n: c for n, c in coefficients.items() if n not in output_losses}
    by_name = {name.replace("-", "_"): c for name, c in of_routings.items()}
    for seed, batch in enumerate(batches):
        with record_routing(layer) as record:
            y = forward(layer, batch, seed=seed)
        routing = record[""][0]
        rows = layer.experts(routing.dispatch(batch.x), routing.rows_per_expert)
        of_rows = [c * output_losses.get(n)(routing, rows) for n, c in of_results.items()]
        ((task(y) + record.loss(**by_name) + sum(of_rows)) / len(batches)).backward()
    return gradients(layer)


def _would_show(case: LayerCase, batch: Batch) -> str | None:
    """Losses that move nothing would agree in every comparison; see that these move something."""
    layer = case.layer(training=True, losses={})
    y, routing = recorded(layer, batch)
    if not has_choice(routing):
        return None
    task(y).backward()
    without, within = gradients(layer), _added(case, [batch], LOSSES)
    moved = any((within[n] - without.get(n, torch.zeros_like(within[n]))).any() for n in within)
    assert moved, "the losses have no gradient, so that riding could not be seen"
    return None


def losses_ride_in_training_only(case: LayerCase) -> str | None:
    """In evaluation, and without gradients, no loss is computed and none rides."""
    batch = next(case.batches())
    quiet, loud = case.layer(losses={}), case.layer(losses=LOSSES)
    for layer in (quiet, loud):
        task(forward(layer, batch)).backward()
    same_gradients(gradients(loud), gradients(quiet), "a loss rides in eval mode")
    with torch.no_grad():
        assert not forward(case.layer(training=True, losses=LOSSES), batch).requires_grad, (
            "under no_grad the output needs a gradient"
        )
    return None


def forward_changes_nothing(case: LayerCase) -> str | None:
    """No parameter, buffer or attribute is other after a pass with gradients."""
    for training in (False, True):
        layer = case.layer(training=training)
        for batch in case.batches():
            before = {name: t.clone() for name, t in layer.state_dict().items()}
            held = {n: dict(vars(m)) for n, m in layer.named_modules()}
            x = batch.x.clone()
            task(forward(layer, replace(batch, x=x))).backward()
            for name, tensor in layer.state_dict().items():
                assert torch.equal(tensor, before[name]), f"a pass changed {name}"
            for name, module in layer.named_modules():
                now = vars(module)
                new = [k for k in now if k not in held[name] or now[k] is not held[name][k]]
                assert not new, f"a pass changed {name} {', '.join(new)}"
            assert torch.equal(x, batch.x), "a pass changed its input in place"
    return None


def copies_and_saved_state(case: LayerCase) -> str | None:
    """A deep copy, and a new layer that loads the state dict, compute the same, bit for bit."""
    layer = case.layer()
    with from_seed(99):
        fresh = case.config.build(case.dim).to(case.tokens.device, torch.float64).eval()
    fresh.load_state_dict(layer.state_dict())
    twin = copy.deepcopy(layer)
    for batch in case.batches():
        y = forward(layer, batch)
        assert torch.equal(forward(twin, batch), y), "a deep copy computes something else"
        assert torch.equal(forward(fresh, batch), y), "the state dict does not hold everything"
    with torch.no_grad():
        next(twin.experts.parameters()).zero_()
    assert next(layer.experts.parameters()).any(), "a deep copy shares its parameters"
    return None


def config_as_data(case: LayerCase) -> str | None:
    """The configuration survives JSON."""
    read = MoEConfig.from_dict(json.loads(json.dumps(case.config.to_dict())))
    assert read.to_dict() == case.config.to_dict(), "from_dict(to_dict()) is another configuration"
    batch = next(case.batches())
    again = replace(case, config=read).layer()
    assert torch.equal(forward(again, batch), forward(case.layer(), batch)), (
        "the configuration read back builds another layer"
    )
    return None


def compiles(case: LayerCase) -> str | None:
    """`torch.compile(fullgraph=True)` equals eager in values and gradients, and records once."""
    if not case.tokens.compile:
        return "it takes seconds; ask for it by compile=True"
    for batch in list(case.batches())[:2]:
        torch.compiler.reset()
        found = []
        for compiled in (False, True):
            layer = case.layer(training=True, losses=LOSSES)
            x = batch.x.clone().requires_grad_()
            call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
            with record_routing(layer) as record:
                y = forward(call, replace(batch, x=x))
            assert len(record[""]) == 1, f"one pass left {len(record[''])} routings in the record"
            task(y).backward()
            found.append({"output": y.detach(), **gradients(layer, x)})
        same_gradients(found[1], found[0], "compiled against eager")
    return None
