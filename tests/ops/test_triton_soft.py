"""Soft mixtures by kernels, against their slow twins in float64: values and gradients.

Shapes: `groups members dim` tokens, `groups members experts slots` logits.

Bounds are those of a running error analysis. A result is a sum of products, each with a relative
error of so many roundings, so it is off by at most that many times the sum of the products'
absolute values, which the test computes (Higham, *Accuracy and Stability of Numerical Algorithms*,
2002, section 3.3). What is summed over and over is counted once for each term.
"""

import pytest
import torch
from torch import Tensor

from tests.ops.triton_library import DEVICE  # isort: skip - before any kernel is defined

from moefold.ops.soft import (
    KernelMaps,
    TorchMaps,
    combine_reference,
    combine_weight,
    dispatch_reference,
    dispatch_weight,
)
from moefold.ops.triton.soft import soft_mix, soft_mix_backward
from moefold.routers.soft import SoftRouter
from moefold.routing import SoftRouting
from tests.ops.triton_interpreter import kernels_everywhere, rounding, unwritten_memory_is_poison

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

EPS = torch.finfo(torch.float32).eps
MAPS = KernelMaps()

# groups, members, experts, slots, dim: more than one tile of 32 each way; odd; one of each.
SIZES = [(2, 40, 3, 13, 20), (1, 5, 2, 1, 70), (1, 1, 1, 1, 1)]


@pytest.fixture(autouse=True)
def _poisoned():
    with unwritten_memory_is_poison():
        yield


def masks(groups: int, members: int) -> list[Tensor | None]:
    """No mask, and one that leaves the last group without real tokens."""
    mask = torch.rand(groups, members) < 0.6
    mask[-1] = False
    return [None, mask]


def roundings(logits: Tensor, dim: int) -> int:
    """Roundings that a term of any sum here goes through, at most.

    A sum over sources, targets or the width; four for the exponential (two for itself, one each for
    its argument and for the product); the logarithm of the sum, whose rounding is that of a number
    as large as a logit; and as many again for rescaling what was added before.
    """
    _, members, experts, slots = logits.shape
    return 2 * (max(members, experts * slots, dim) + 4) + int(logits.abs().max()) + 1


def check(name: str, logits: Tensor, values: Tensor, real: Tensor | None) -> None:
    """One map, its values and both gradients, within the bounds."""
    fast = [t.to(DEVICE).requires_grad_() for t in (logits, values)]
    slow = [t.double().requires_grad_() for t in (logits, values)]
    to_rows = name == "dispatch"
    on_device = None if real is None else real.to(DEVICE)
    found = getattr(MAPS, name)(fast[0], fast[1], on_device)
    expected = (dispatch_reference if to_rows else combine_reference)(slow[0], slow[1], real)
    back = torch.randn(expected.shape).to(values.dtype)
    of_fast = torch.autograd.grad(found, fast, back.to(DEVICE))
    of_slow = torch.autograd.grad(expected, slow, back.double())

    again = getattr(MAPS, name)(fast[0], fast[1], on_device)
    assert torch.equal(found, again)
    for left, right in zip(of_fast, torch.autograd.grad(again, fast, back.to(DEVICE)), strict=True):
        assert torch.equal(left, right)

    # Sums of absolute values: of the values, of their gradient, of that of the logits.
    weight = (dispatch_weight if to_rows else combine_weight)(logits.double(), real)
    shown = values.double().abs()
    if real is not None and to_rows:
        shown = torch.where(real.unsqueeze(-1), shown, 0.0)
    groups, _, experts, slots = logits.shape

    def of_slots(rows: Tensor) -> Tensor:
        return rows.reshape(experts, groups, slots, -1)

    if to_rows:
        of_values = torch.einsum("gmes,gmd->egsd", weight, shown).flatten(0, 2)
        products = torch.einsum("gmd,egsd->gmes", shown, of_slots(back.double().abs()))
        of_back = torch.einsum("gmes,egsd->gmd", weight, of_slots(back.double().abs()))
        means = (weight * products).sum(1, keepdim=True)
    else:
        of_values = torch.einsum("gmes,egsd->gmd", weight, of_slots(shown))
        products = torch.einsum("gmd,egsd->gmes", back.double().abs(), of_slots(shown))
        of_back = torch.einsum("gmes,gmd->egsd", weight, back.double().abs()).flatten(0, 2)
        means = (weight * products).sum((2, 3), keepdim=True)
    unit = roundings(logits, values.shape[-1]) * EPS
    if values.dtype != torch.float32:
        # Shares are rounded to it before the product, and the result is; and a little for both.
        unit += 2.1 * rounding(values.dtype)
    for left, right, bound in (
        (found, expected, of_values),
        (of_fast[0], of_slow[0], weight * (products + means)),
        (of_fast[1], of_slow[1], of_back),
    ):
        far = (left.cpu().double() - right).abs() > unit * bound
        assert not far.any(), (name, int(far.sum()), far.numel())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["dispatch", "combine"])
def test_maps_are_their_slow_twins(name, size):
    groups, members, experts, slots, dim = size
    logits = 3 * torch.randn(groups, members, experts, slots)
    for real in masks(groups, members):
        shape = (groups, members, dim) if name == "dispatch" else (experts * groups * slots, dim)
        check(name, logits, torch.randn(shape), real)


@pytest.mark.parametrize("name", ["dispatch", "combine"])
def test_maps_in_bfloat16(name):
    logits = torch.randn(1, 40, 2, 20)
    values = torch.randn(1, 40, 24).bfloat16()
    check(name, logits, values if name == "dispatch" else values.flatten(0, 1), None)


def test_logits_far_apart():
    # The second tile has a logit that makes all earlier ones vanish; nothing overflows.
    logits = torch.zeros(1, 70, 1, 1)
    logits[0, 66] = 1000.0
    logits[0, :3] = -1000.0
    x = torch.randn(1, 70, 4)
    rows = MAPS.dispatch(logits.to(DEVICE), x.to(DEVICE), None)
    assert torch.equal(rows[0].cpu(), x[0, 66])


@pytest.mark.parametrize("junk", [float("nan"), float("inf")], ids=str)
def test_padding_may_hold_anything(junk):
    real = torch.tensor([[True, False, True], [False, False, False]])
    clean = torch.randn(2, 3, 4)
    x = torch.where(real.unsqueeze(-1), clean, junk).to(DEVICE).requires_grad_()
    logits = torch.randn(2, 3, 2, 2)
    logits = torch.where(real[..., None, None], logits, junk).to(DEVICE).requires_grad_()
    rows = MAPS.dispatch(logits, x, real.to(DEVICE))
    tokens = MAPS.combine(logits, rows + 1, real.to(DEVICE))
    expected = dispatch_reference(logits.detach().cpu().nan_to_num(0, 0, 0), clean, real)
    # Three terms, eight roundings each at most, of numbers no larger than the largest token.
    torch.testing.assert_close(
        rows.cpu(), expected, rtol=0, atol=24 * EPS * float(clean.abs().max())
    )
    assert not rows.reshape(2, 2, 2, 4)[:, 1].any()  # the rows of a group without real tokens
    assert not tokens[1].any()
    assert not tokens[0, 1].any()
    # Whatever comes back for padding stays there.
    back = torch.where(real.unsqueeze(-1).to(DEVICE), torch.ones_like(tokens), junk)
    for grad in torch.autograd.grad(tokens, [x, logits], back):
        assert torch.isfinite(grad).all()
        assert not grad[~real.to(DEVICE)].any()


@pytest.mark.parametrize("shape", [(0, 3, 2, 1), (2, 0, 2, 1)], ids=["no groups", "no members"])
def test_maps_of_nothing(shape):
    groups, members, experts, slots = shape
    logits = torch.zeros(shape, device=DEVICE, requires_grad=True)
    x = torch.zeros(groups, members, 4, device=DEVICE, requires_grad=True)
    rows = MAPS.dispatch(logits, x, None)
    assert rows.shape == (experts * groups * slots, 4)
    assert not rows.any()
    tokens = MAPS.combine(logits, rows, None)
    assert tokens.shape == (groups, members, 4)
    tokens.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


# In the router


@pytest.mark.parametrize("group", ["sequence", "batch", "position", 3], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all real", "masked"])
def test_a_routing_made_of_logits(group, masked):
    router = SoftRouter(6, 2, slots=3, group=group).to(DEVICE)
    x = torch.randn(2, 6, 6).to(DEVICE)
    mask = (torch.rand(2, 6) < 0.6).to(DEVICE) if masked else None
    slow = router(x, mask)
    with kernels_everywhere():
        fast = router(x, mask)
    assert isinstance(fast, SoftRouting)
    assert isinstance(slow, SoftRouting)
    assert (fast.maps, slow.maps) == (KernelMaps(), TorchMaps())
    assert (fast.num_experts, fast.num_tokens) == (2, 12)
    assert torch.equal(fast.rows_per_expert, slow.rows_per_expert)
    assert torch.equal(fast.expert_of_row, slow.expert_of_row)
    rows, tokens = fast.dispatch(x), fast.combine(slow.dispatch(x))
    # Sums of at most 12 products of weights that add up to 1, in another order.
    apart = 2 * (12 + 8) * EPS * float(x.abs().max())
    torch.testing.assert_close(rows, slow.dispatch(x), rtol=0, atol=apart)
    torch.testing.assert_close(tokens, slow.combine(slow.dispatch(x)), rtol=0, atol=apart)
    to_rows, to_tokens = fast.as_matrices()
    torch.testing.assert_close(rows, to_rows @ x.reshape(12, 6), rtol=0, atol=apart)
    torch.testing.assert_close(tokens.reshape(12, 6), to_tokens @ rows, rtol=0, atol=3 * apart)


def test_the_router_learns():
    router = SoftRouter(4, 2, slots=2).to(DEVICE)
    x = torch.randn(1, 5, 4).to(DEVICE).requires_grad_()
    with kernels_everywhere():
        routing = router(x)
    routing.combine(torch.tanh(routing.dispatch(x))).square().sum().backward()
    for tensor in (x, router.phi, router.scale):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_float64_goes_the_slow_way():
    with kernels_everywhere():
        routing = SoftRouter(4, 2).double()(torch.randn(1, 5, 4).double())
    assert routing.maps == TorchMaps()


def test_autocast_gives_the_dtype_of_a_product():
    router = SoftRouter(4, 2).to(DEVICE)
    x = torch.randn(1, 5, 4).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        slow = router(x)
        with kernels_everywhere():
            fast = router(x)
        for one, other in ((fast, slow), (slow, fast)):
            rows = one.dispatch(x)
            assert rows.dtype == other.dispatch(x).dtype == torch.bfloat16
            assert one.combine(rows.float()).dtype == torch.bfloat16


def test_operators_declare_what_they_do():
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    logits = torch.randn(1, 3, 2, 1, device=DEVICE, requires_grad=True)
    for values, to_rows in ((torch.randn(3, 4), True), (torch.randn(2, 4), False)):
        values = values.to(DEVICE)
        torch.library.opcheck(soft_mix, (logits, values, None, to_rows), test_utils=tests)
        out, normalizers = soft_mix(logits.detach(), values, None, to_rows)
        given = (logits.detach(), values, None, out, normalizers, out, to_rows)
        torch.library.opcheck(soft_mix_backward, given, test_utils=tests)


@pytest.mark.compile
def test_maps_are_part_of_a_compiled_graph():
    router = SoftRouter(6, 3, slots=2).to(DEVICE)

    def there_and_back(x: Tensor) -> Tensor:
        routing = router(x)
        return routing.combine(torch.tanh(routing.dispatch(x)))

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager", dynamic=True)
    with kernels_everywhere():
        for members in (5, 8):
            x = torch.randn(2, members, 6, device=DEVICE)
            found, expected = compiled(x), there_and_back(x)
            assert torch.equal(found, expected)
            back = torch.randn_like(found)
            grads = [torch.autograd.grad(y, router.phi, back)[0] for y in (found, expected)]
            assert torch.equal(*grads)
