"""Padding: it takes no row, gets no gradient, counts nowhere, and may hold anything."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moefold.losses import losses
from moefold.metrics import coactivation, load, metrics
from moefold.routers import AbstractRouter
from moefold.routing import Routing, SparseRouting
from tests.routers.common import (
    DIM,
    DRAWN,
    ROUNDING,
    VARIANTS,
    Batch,
    batch,
    build,
    maps,
    output,
    route,
    shifted,
    variant_id,
)

NAN = float("nan")

Variant = tuple[str, dict[str, Any]]

# Without noise and jitter, only BASE routes otherwise in eval mode.
MADE = [(variant, True) for variant in VARIANTS]
MADE += [(variant, False) for variant in VARIANTS if variant[0] == "base"]
SAME_TWICE = [made for made in MADE if made[0][0] not in DRAWN]


def made_id(made: tuple[Variant, bool]) -> str:
    variant, training = made
    return variant_id(variant) + ("" if training else " eval")


every_router = pytest.mark.parametrize("made", MADE, ids=made_id)
same_twice = pytest.mark.parametrize("made", SAME_TWICE, ids=made_id)


def make(made: tuple[Variant, bool]) -> AbstractRouter:
    (name, settings), training = made
    return build(name, **settings).train(training)


def close(left: Tensor, right: Tensor) -> None:
    """Equal up to rounding; what is True or False must be equal."""
    torch.testing.assert_close(left.double(), right.double(), rtol=0, atol=ROUNDING)


def statistics(routing: Routing) -> dict[str, Tensor]:
    """Every loss and every metric that the routing has."""
    values = {name: torch.tensor(value) for name, value in metrics(routing).items()}
    values |= {"load": load(routing), "coactivation": coactivation(routing)}
    for name in losses.names():
        if name != "load":  # defined under noise only; see tests/test_losses.py
            values[f"{name} loss"] = losses.get(name)(routing)
    return values


def gradients(router: AbstractRouter, given: Batch, wanted: Tensor) -> dict[str, Tensor]:
    """Gradients of a weighted sum of the output: of the tokens and of every parameter."""
    x = given.x.clone().requires_grad_()
    out = output(router, given.with_x(x))
    loss = (out * wanted).sum()
    tensors = {"x": x, **dict(router.named_parameters())}
    if not loss.requires_grad:  # no row at all, and a router without parameters
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    of = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(tensors.items(), of, strict=True)
    }


@every_router
@pytest.mark.parametrize("junk", [NAN, math.inf], ids=str)
def test_padding_comes_back_as_zero_and_is_never_chosen(made, junk):
    router, given = make(made), batch()
    assert given.mask is not None
    given.x[~given.mask] = junk
    routing = route(router, given)
    for part in maps(routing):
        assert not part[~given.mask].any()
        assert torch.isfinite(part).all()
    if isinstance(routing, SparseRouting) and routing.wanted is not None:
        assert not routing.wanted[~given.mask].any()
    out = output(router, given)
    assert not out[~given.mask].any()
    assert torch.isfinite(out).all()


@same_twice
def test_more_padding_changes_nothing(made):
    # Three more columns at the end and two in front, as NaN: the real tokens are routed as before,
    # to the last gradient.
    router, given = make(made), batch()
    padded = shifted(given, left=2, right=3, junk=NAN)
    inside = slice(2, 2 + given.x.shape[1])
    one, two = route(router, given), route(router, padded)
    for left, right in zip(maps(one), maps(two), strict=True):
        close(right[:, inside], left)
        assert torch.equal(right[:, inside] != 0, left != 0)
        assert not right[:, :2].any()
        assert not right[:, 7 + 2 :].any()

    wanted = torch.randn(3, 12, DIM, dtype=torch.float64)
    before = gradients(router, given, wanted[:, inside])
    after = gradients(router, padded, wanted)
    assert not after["x"][:, :2].any()
    assert not after["x"][:, 9:].any()
    after["x"] = after["x"][:, inside]
    for name in before:
        close(after[name], before[name])

    left, right = statistics(one), statistics(two)
    for name in left:
        close(right[name], left[name])


@same_twice
def test_a_masked_sequence_might_as_well_not_be_there(made):
    router, given = make(made), batch()
    assert given.mask is not None
    given.mask[1] = False
    given.x[1] = NAN
    rest = given.only([0, 2])
    wanted = torch.randn(3, 7, DIM, dtype=torch.float64)
    one, two = route(router, given), route(router, rest)
    assert not output(router, given)[1].any()
    for left, right in zip(maps(one), maps(two), strict=True):
        close(left[[0, 2]], right)

    before, after = gradients(router, given, wanted), gradients(router, rest, wanted[[0, 2]])
    assert not before["x"][1].any()
    before["x"] = before["x"][[0, 2]]
    for name in before:
        close(before[name], after[name])

    left, right = statistics(one), statistics(two)
    for name in left:
        close(left[name], right[name])


@every_router
def test_where_all_is_padding_nothing_happens(made):
    router, given = make(made), batch(2, 4)
    masked = Batch(torch.full_like(given.x, NAN), torch.zeros(2, 4, dtype=torch.bool), given.ids)
    routing = route(router, masked)
    if isinstance(routing, SparseRouting):
        assert not routing.rows_per_expert.any()
    assert not output(router, masked).any()
    assert not any(g.any() for g in gradients(router, masked, torch.ones(2, 4, DIM)).values())
    values = statistics(routing)
    for name, value in values.items():
        assert torch.isfinite(value).all(), name
        if name.endswith("loss"):
            assert value == 0, name
    router.update([routing])
    assert all(torch.isfinite(value).all() for value in router.state_dict().values())


@every_router
def test_losses_of_padding_have_no_gradient(made):
    router, given = make(made), batch(2, 4)
    masked = Batch(given.x, torch.zeros(2, 4, dtype=torch.bool), given.ids)
    routing = route(router, masked)
    for name in ("balance", "sequence-balance", "importance", "z", "similarity", "l1"):
        value = losses.get(name)(routing)
        if value.requires_grad:
            grads = torch.autograd.grad(
                value, list(router.parameters()), retain_graph=True, allow_unused=True
            )
            assert not any(grad.any() for grad in grads if grad is not None), name


@same_twice
def test_a_mask_of_ones_is_no_mask(made):
    router, given = make(made), batch(padded=False)
    everything = Batch(given.x, torch.ones(3, 7, dtype=torch.bool), given.ids)
    one, two = route(router, given), route(router, everything)
    for left, right in zip(maps(one), maps(two), strict=True):
        close(left, right)


@every_router
def test_nothing_and_one_token_are_routed(made):
    router = make(made)
    for shape in ((0, 5), (3, 0), (1, 1)):
        x = torch.randn(*shape, DIM, dtype=torch.float64)
        for mask in (None, torch.ones(shape, dtype=torch.bool)):
            given = Batch(x, mask, torch.zeros(shape, dtype=torch.long))
            out = output(router, given)
            assert out.shape == x.shape
            assert torch.isfinite(out).all()
            for grad in gradients(router, given, torch.ones_like(x)).values():
                assert torch.isfinite(grad).all()
                assert x.numel() > 0 or not grad.any()
            for value in statistics(route(router, given)).values():
                assert torch.isfinite(value).all()
