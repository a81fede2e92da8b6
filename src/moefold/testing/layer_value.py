"""Checks of what a layer computes: its definition, special cases, padding, sizes, precision.

Shapes: `batch tokens dim` in and out.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from moefold.experts import backends
from moefold.moe import MoE
from moefold.routers import known_settings
from moefold.routing import SparseRouting
from moefold.testing.layer_probe import (
    LayerCase,
    by_definition,
    forward,
    gradients,
    mlp,
    recorded,
    same_gradients,
    shared,
    task,
)
from moefold.testing.probe import Batch, assert_close, untyped


def equals_definition(case: LayerCase) -> str | None:
    """The layer is `C @ experts(D @ x)`, in values and gradients."""
    for training in (False, True):
        for batch in case.batches():
            layer, slow = (case.layer(training=training, losses={}) for _ in range(2))
            x, slow_x = (batch.x.clone().requires_grad_() for _ in range(2))
            y, _ = recorded(layer, replace(batch, x=x))
            _, routing = recorded(slow, replace(batch, x=slow_x))
            want = by_definition(slow, routing, replace(batch, x=slow_x))
            assert_close(y, want, "the layer against its definition")
            task(y).backward()
            task(want).backward()
            same_gradients(gradients(layer, x), gradients(slow, slow_x), "against the definition")
    return None


def equals_one_mlp(case: LayerCase) -> str | None:
    """With copies of one expert, the layer is that expert times the weights of the token."""
    layer = case.layer(losses={})
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    for batch in case.batches():
        y, routing = recorded(layer, batch)
        if not isinstance(routing, SparseRouting):
            return "rows of a soft routing mix tokens"
        real = torch.ones_like(batch.x[..., 0], dtype=torch.bool)
        real = real if batch.mask is None else batch.mask
        dense = mlp(layer.experts, 0, batch.x) * routing.weights.sum(-1, keepdim=True)
        assert_close(y, dense + shared(layer, batch.x, real), "copies against one dense MLP")
    return None


def equals_dense_ensemble(case: LayerCase) -> str | None:
    """All experts for every token, with normalised weights, are a dense ensemble."""
    name, experts = case.config.router.name, case.config.num_experts
    known = known_settings(name) or ()
    if "k" not in known or "renormalize" not in known:
        return f"router {name!r} has no settings k and renormalize"
    limits = {"capacity", "capacity_factor", "expert_groups", "top_groups"}
    settings = {s: v for s, v in case.config.router.settings.items() if s not in limits}
    router = replace(case.config.router, settings={**settings, "k": experts, "renormalize": True})
    layer = case.layer(router=router, losses={})
    for batch in case.batches():
        y, routing = recorded(layer, batch)
        assert isinstance(routing, SparseRouting), "a router with k makes a sparse routing"
        real = torch.ones_like(batch.x[..., 0], dtype=torch.bool)
        real = real if batch.mask is None else batch.mask
        weights = routing.weights
        assert routing.chosen[real].all(), "k = num_experts leaves experts out"
        assert_close(weights.sum(-1), real.to(weights), "the weights of a token are normalised")
        each = torch.stack([mlp(layer.experts, e, batch.x) for e in range(experts)], 2)
        dense = (weights.unsqueeze(-1) * each).sum(2)
        assert_close(y, dense + shared(layer, batch.x, real), "against the dense ensemble")
    return None


def padding(case: LayerCase) -> str | None:
    """Padding comes back as zero, and what it holds changes nothing and gets no gradient."""
    for batch in case.batches():
        if batch.mask is None:
            continue
        layer = case.layer(training=True)
        clean = forward(layer, batch)
        x = batch.x.masked_fill(~batch.mask.unsqueeze(-1), float("nan")).requires_grad_()
        y = forward(layer, replace(batch, x=x))
        assert (y[~batch.mask] == 0).all(), "padding does not come back as zero"
        assert_close(y, clean, "with NaN in the padding")
        task(y).backward()
        for name, gradient in gradients(layer, x).items():
            assert torch.isfinite(gradient).all(), f"NaN in the padding reached {name}.grad"
        assert x.grad is None or (x.grad[~batch.mask] == 0).all(), "padding gets a gradient"
    return None


def any_rank(case: LayerCase) -> str | None:
    """A sequence `[tokens, dim]` is treated as a batch of one."""
    layer = case.layer()
    one = case.tokens.batch(1, 7)
    for mask in (None, torch.arange(one.x.shape[1], device=case.tokens.device).unsqueeze(0) < 4):
        batch = replace(one, mask=mask)
        flat = Batch(
            x=one.x[0],
            mask=None if mask is None else mask[0],
            ids=None if one.ids is None else one.ids[0],
        )
        assert_close(forward(layer, flat), forward(layer, batch)[0], "[tokens, dim]")
    return None


def odd_and_empty_sizes(case: LayerCase) -> str | None:
    """No token, one token, only padding: finite values, losses and gradients."""
    for training in (False, True):
        for count, tokens in ((1, 1), (2, 0), (3, 5)):
            given = case.tokens.batch(count, tokens, dtype=torch.float32)
            nobody = torch.zeros(given.x.shape[:2], dtype=torch.bool, device=case.tokens.device)
            for batch in (given, replace(given, mask=nobody)):
                layer = case.layer(training=training, dtype=torch.float32)
                x = batch.x.clone().requires_grad_()
                y = forward(layer, replace(batch, x=x))
                assert torch.isfinite(y).all(), f"{count} x {tokens} tokens: not finite"
                task(y).backward()
                for name, gradient in gradients(layer, x).items():
                    assert torch.isfinite(gradient).all(), (
                        f"{count} x {tokens} tokens: the gradient of {name} is not finite"
                    )
    return None


def autocast(case: LayerCase) -> str | None:
    """Under bfloat16 autocast the layer makes the same choices and nearly the same output."""
    kind = torch.device(case.tokens.device).type
    for batch in case.batches():
        layer = case.layer(dtype=torch.float32)
        given = replace(batch, x=batch.x.float())
        y, routing = recorded(layer, given)
        with torch.autocast(kind, torch.bfloat16):
            low, cast = recorded(layer, given)
            task(low.float()).backward()
        if isinstance(routing, SparseRouting) and isinstance(cast, SparseRouting):
            assert torch.equal(routing.chosen, cast.chosen), "autocast changes the choice"
        _near(low, y, "under autocast")
        for name, gradient in gradients(layer).items():
            assert torch.isfinite(gradient).all(), f"autocast: gradient of {name} is not finite"
    return None


def half_precision(case: LayerCase) -> str | None:
    """A layer in bfloat16 is nearly the layer with the same numbers in float32."""
    for batch in case.batches():
        low = case.layer(dtype=torch.bfloat16)
        high = copy.deepcopy(low).float()
        given = replace(batch, x=batch.x.bfloat16())
        y = forward(low, given)
        assert y.dtype == torch.bfloat16, f"bfloat16 came back as {y.dtype}"
        _near(y, forward(high, replace(given, x=given.x.float())), "in bfloat16")
    return None


def _near(got: Tensor, want: Tensor, what: str) -> None:
    if want.numel() == 0:
        return
    # A few roundings of 2^-9 each, of numbers as large as the largest: inputs, hidden values,
    # results, and their weighted sum. Another choice or a lost row is off by some 10 percent.
    error = ((got.float() - want).abs().max() / want.abs().max().clamp_min(1e-6)).item()
    assert error < 8 * 2**-8, f"{what} the output is off by {error:.2g} of its largest number"


def every_backend(case: LayerCase) -> str | None:
    """Every backend that can run gives the same output and gradients, in float32."""
    batch = list(case.batches())[1]
    given = replace(batch, x=batch.x.float())
    want, ran = None, []
    for name in sorted(backends.names(), key=lambda name: name != "reference"):
        layer = case.layer(training=True, dtype=torch.float32, backend=name)
        weights = layer.experts.weights
        if not backends.get(name).reasons_against(given.x.flatten(0, 1), weights):
            y = forward(layer, given)
            task(y).backward()
            found = {"output": y, **gradients(layer)}
            want = found if want is None else want
            # Float32, and sums of a few dozen terms in another order.
            same_gradients(found, want, f"backend {name} against reference", 1e-4)
            ran.append(name)
    return None if len(ran) > 1 else f"only {ran} can run"


def bad_input(case: LayerCase) -> str | None:
    """Wrong input is refused by a ValueError that names the site."""
    layer = case.layer(dtype=torch.float32)
    given = case.tokens.batch(2, 6, dtype=torch.float32)
    ones = torch.ones(given.x.shape[:2], device=case.tokens.device)
    wrong = {
        "x of rank 4": replace(given, x=given.x.unsqueeze(0)),
        "x of another width": replace(given, x=given.x[..., :-1]),
        "integer x": replace(given, x=given.x.long()),
        "a mask of another shape": replace(given, mask=ones.bool()[:, :-1]),
        "a mask of ones and zeros": replace(given, mask=ones),
    }
    with untyped():
        for what, batch in wrong.items():
            message = _refusal(layer, batch)
            assert message is not None, f"{what} is accepted"
            assert "encoder.layer.3" in message, f"{what}: no layer is named: {message}"
    return None


def _refusal(layer: MoE, batch: Batch) -> str | None:
    try:
        forward(layer, batch)
    except ValueError as error:
        return str(error)
    return None
