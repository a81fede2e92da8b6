"""Checks of how a router behaves in a training run: gradients, state, repetition, precision.

Shapes: `batch tokens dim` in, a routing out.
"""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from moefold.record import record_routing
from moefold.routers import AbstractRouter
from moefold.routing import Routing, SparseRouting
from moefold.testing.contract import from_seed
from moefold.testing.probe import (
    Batch,
    RouterCase,
    ToyLayer,
    assert_close,
    combine_weight,
    output,
    portrait,
    route,
    same_routing,
    untyped,
)

STEP = 1e-3  # a point is away from every selection boundary if steps of this size change no choice


def gradient_reaches_parameters(case: RouterCase) -> str | None:
    """Every parameter of the router learns from the output."""
    router = case.router(training=True)
    if not any(parameter.requires_grad for parameter in router.parameters()):
        return "the router has no parameters"
    for batch in case.batches():
        y = output(route(router, batch), batch.x)
        if y.requires_grad:
            y.square().sum().backward()
    for name, parameter in router.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"no gradient reaches {name}"
            assert parameter.grad.abs().max() > 1e-8, f"the gradient of {name} is always zero"
    return None


def gradient_is_the_derivative(case: RouterCase) -> str | None:
    """`gradcheck` in float64 of the output by the tokens and all parameters."""
    router = case.router(training=True)
    batch = _away_from_boundaries(case, router)
    names = [name for name, _ in router.named_parameters()]

    def layer(x: Tensor, *parameters: Tensor) -> Tensor:
        given = (x, batch.mask) if batch.ids is None else (x, batch.mask, batch.ids)
        with from_seed(0):  # as route() does, at the point that was found with it
            routing = functional_call(router, dict(zip(names, parameters, strict=True)), given)
        return output(routing, x)

    inputs = [batch.x, *(p.detach().clone() for p in router.parameters())]
    # Central differences with a step of 1e-6 in float64: rounding 1e-10, curvature 1e-12. Untyped,
    # because one call is repeated some hundred times; all other checks see to its types.
    with untyped():
        torch.autograd.gradcheck(
            layer, [tensor.requires_grad_() for tensor in inputs], eps=1e-6, atol=1e-6, rtol=1e-5
        )
    return None


def _away_from_boundaries(case: RouterCase, router: AbstractRouter) -> Batch:
    for seed in range(20):
        batch = case.batch(2, 2, seed=seed)
        here = _chosen(route(router, batch))
        steady = True
        for _ in range(4):
            near = copy.deepcopy(router)
            with torch.no_grad():
                for parameter in near.parameters():
                    parameter += STEP * torch.randn_like(parameter)
                step = replace(batch, x=batch.x + STEP * torch.randn_like(batch.x))
            steady = steady and torch.equal(_chosen(route(near, step)), here)
        if steady:
            return batch
    raise AssertionError(
        f"its choice changes under steps of {STEP} at 20 of 20 random points; a choice must be "
        "constant almost everywhere"
    )


def _chosen(routing: Routing) -> Tensor:
    # A soft routing chooses nothing that could change.
    return routing.chosen if isinstance(routing, SparseRouting) else torch.ones(())


def forward_changes_nothing(case: RouterCase) -> str | None:
    """No buffer, parameter or attribute is other after a forward pass, in training or not."""
    for training in (False, True):
        router = case.router(training=training)
        for batch in case.batches():
            given = replace(batch, x=batch.x.clone())
            before = _state(router)
            route(router, given)
            after = _state(router)
            changed = sorted(
                name
                for name in {*before, *after}
                if name not in before or name not in after or not _alike(before[name], after[name])
            )
            assert not changed, (
                f"forward in {'training' if training else 'eval'} changed {', '.join(changed)}; "
                "return what you want to keep, or compute it in update()"
            )
            assert torch.equal(given.x, batch.x), "forward changed its input in place"
    return None


def _state(router: AbstractRouter) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for path, module in router.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                state[f"{path}.{name}".lstrip(".")] = _frozen(value)
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        state[name] = _frozen(tensor)
    return state


def _frozen(value: Any) -> Any:
    """A copy that shows a change in place: of a tensor its numbers, of a collection its members."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return [(key, id(member)) for key, member in value.items()]
    if isinstance(value, list | set):
        return [id(member) for member in value]
    return value


def _alike(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return before.shape == after.shape and torch.equal(before, after)
    return before is after or (isinstance(before, list) and before == after)


def deterministic(case: RouterCase) -> str | None:
    """Out of training, the same tokens get the same routing, whatever the random state."""
    router = case.router()
    for batch in case.batches():
        same_routing(route(router, batch, seed=1), route(router, batch, seed=2), "routed twice")
    return None


def same_in_training(case: RouterCase) -> str | None:
    """Training routes as evaluation does; noise, jitter and the like are declared exceptions."""
    for batch in case.batches():
        training, evaluation = case.router(training=True), case.router()
        same_routing(route(training, batch), route(evaluation, batch), "training against eval")
    return None


def checkpointing(case: RouterCase) -> str | None:
    """Activation checkpointing changes neither output nor gradients, and records one routing."""
    for batch in case.batches():
        results = []
        for again in (False, True):
            layer = ToyLayer(case.router(training=True))
            x = batch.x.clone().requires_grad_()
            call = partial(checkpoint, layer, use_reentrant=False) if again else layer
            with record_routing(layer) as record:
                with from_seed(3):
                    y = call(batch, x)
                if y.requires_grad:
                    y.square().sum().backward()
            entries = len(record[""])
            assert entries == 1, f"one pass left {entries} routings in the record"
            gradients = [p.grad for p in layer.parameters() if p.grad is not None]
            results.append([y.detach(), *([] if x.grad is None else [x.grad]), *gradients])
        assert len(results[0]) == len(results[1]), "checkpointing loses a gradient"
        for plain, repeated in zip(*results, strict=True):
            assert_close(repeated, plain, "with checkpointing against without")
    return None


def update(case: RouterCase) -> str | None:
    """`update` leaves finite state, also after a step without tokens."""
    router = case.router(training=True)
    if type(router).update is AbstractRouter.update:
        return "the router has nothing to update"
    for batch in (*case.batches(), case.batch(2, 0)):
        nobody = torch.zeros(batch.x.shape[:2], dtype=torch.bool, device=case.device)
        for given in (batch, replace(batch, mask=nobody)):
            router.update([route(router, given), route(router, given)])
            for name, buffer in router.named_buffers():
                assert torch.isfinite(buffer).all(), f"update made {name} not finite"
    return None


def saved_state(case: RouterCase) -> str | None:
    """A new router that loads the state dict routes alike, bit for bit."""
    router = case.router()
    with from_seed(99):
        fresh = case.make(case.dim, case.num_experts).to(case.device, torch.float64).eval()
    fresh.load_state_dict(copy.deepcopy(router.state_dict()))
    for batch in case.batches():
        got, want = portrait(route(fresh, batch)), portrait(route(router, batch))
        assert torch.equal(got, want), (
            "a router with the same state dict routes differently: something that it uses is "
            "neither a parameter nor a buffer"
        )
    return None


def half_precision(case: RouterCase) -> str | None:
    """Half-precision tokens and autocast change no choice: scores are in float32 or better."""
    router = case.router(dtype=torch.float32)
    for batch in case.batches():
        half = replace(batch, x=batch.x.bfloat16())
        full = route(router, replace(batch, x=half.x.float()))
        _float32(route(router, half), "bfloat16 tokens")
        same_routing(route(router, half), full, "bfloat16 tokens against the same in float32")
        with torch.autocast(torch.device(case.device).type, torch.bfloat16):
            cast = route(router, replace(batch, x=half.x.float()))
        _float32(cast, "autocast")
        same_routing(cast, full, "under autocast against without")
        narrow = case.router(dtype=torch.bfloat16)
        _float32(route(narrow, half), "a router and tokens in bfloat16")
    return None


def _float32(routing: Routing, what: str) -> None:
    tensors = {"combine weights": combine_weight(routing), "logits": routing.logits}
    if isinstance(routing, SparseRouting):
        tensors["scores"] = routing.scores
    for name, tensor in tensors.items():
        if tensor is not None:
            assert tensor.dtype in (torch.float32, torch.float64), (
                f"{what}: {name} are {tensor.dtype}; they must be float32 or better"
            )


def bad_input(case: RouterCase) -> str | None:
    """Wrong input is refused by a ValueError that names the layer."""
    router = case.router(dtype=torch.float32)
    router.site = "encoder.layer.3"
    plain = case.batch(2, 6, dtype=torch.float32)
    ones = torch.ones(plain.x.shape[:2], device=case.device)
    cases = {
        "x of rank 2": replace(plain, x=plain.x[0]),
        "x of another width": replace(plain, x=plain.x[..., :-1]),
        "integer x": replace(plain, x=plain.x.long()),
        "a mask of another shape": replace(plain, mask=ones.bool()[:, :-1]),
        "a mask of ones and zeros": replace(plain, mask=ones),
    }
    # On a GPU the refusal comes from the device, after which its process can use it no more.
    if any(True for _ in router.parameters()) and plain.x.device.type == "cpu":
        broken = plain.x.clone()
        broken[0, 0] = float("nan")
        cases["NaN in a real token"] = replace(plain, x=broken)
    with untyped():
        for what, batch in cases.items():
            message = _refusal(router, batch)
            assert message is not None, (
                f"{what} is accepted; call self.check(x, mask) first and "
                "self.check_finite(logits, mask) before choosing"
            )
            assert router.site in message, (
                f"{what}: the error does not name the layer (self.site): {message}"
            )
    return None


def _refusal(router: AbstractRouter, batch: Batch) -> str | None:
    try:
        route(router, batch)
    except ValueError as error:
        return str(error)
    return None


def compiles(case: RouterCase) -> str | None:
    """`torch.compile(fullgraph=True)` equals eager in values and gradients, and records once."""
    if not case.compile:
        return "it takes seconds; ask for it by compile=True"
    for batch in case.batches():
        torch.compiler.reset()
        results = []
        for compiled in (False, True):
            layer = ToyLayer(case.router())
            call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
            x = batch.x.clone().requires_grad_()
            with record_routing(layer) as record:
                y = call(batch, x)
            assert len(record[""]) == 1, f"one pass left {len(record[''])} routings in the record"
            gradients = []
            if y.requires_grad:
                y.square().sum().backward()
                tensors = (x, *layer.parameters())
                gradients = [t.grad for t in tensors if t.grad is not None]
            results.append([y.detach(), *gradients])
        assert len(results[0]) == len(results[1]), "compiling loses a gradient"
        for eager, fast in zip(*results, strict=True):
            assert_close(fast, eager, "compiled against eager")
    return None
