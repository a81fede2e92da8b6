"""Products and lengths in float32 of what has fewer bytes."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from moefold.ops import precise, soft
from moefold.ops.precise import inverse_length, product
from moefold.ops.soft import to_rows, to_tokens

LOW = [torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps


def rounded_once(made: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Fail unless it is `left @ right` in float32, each number rounded once to its dtype."""
    exact, terms = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    bound = (left.shape[-1] + 1) * EPS * terms
    if made.dtype != torch.float32:
        bound = bound + torch.finfo(made.dtype).eps / 2 * (exact.abs() + bound)
        bound = bound + torch.finfo(made.dtype).tiny * torch.finfo(made.dtype).eps
    assert ((made.double() - exact).abs() <= bound).all()


def kept_by(run) -> list[torch.Tensor]:
    """What the backward pass of something will find."""
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    return kept


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_product_is_rounded_once_and_so_are_its_gradients(dtype, autocast):
    torch.manual_seed(0)
    left = torch.randn(3, 7, 600, requires_grad=True)
    right = torch.randn(3, 600, 5).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made = product(left, right, dtype)
        back = torch.randn(3, 7, 5).to(dtype)
        of_left, of_right = torch.autograd.grad(made, (left, right), back)
    assert made.dtype == of_right.dtype == dtype
    assert of_left.dtype == torch.float32
    rounded_once(made, left, right)
    rounded_once(of_left, back, right.mT)
    rounded_once(of_right, left.mT, back)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_length_and_its_gradient(dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 9).to(dtype)
    x[2] = 0.0
    x.requires_grad_()
    made = inverse_length(x, -1)
    assert made.dtype == torch.promote_types(dtype, torch.float32)
    (found,) = torch.autograd.grad(made, x, torch.ones_like(made))
    exact = x.detach().double().requires_grad_()
    wanted = (exact.square().sum(-1, keepdim=True) + 1e-6) ** -0.5
    (of_exact,) = torch.autograd.grad(wanted, exact, torch.ones_like(wanted))
    # Nine squares and their sum, a root, a cube and two products: 24 roundings; one to the dtype.
    torch.testing.assert_close(made.double(), wanted, rtol=24 * EPS, atol=0)
    one = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(found.double(), of_exact, rtol=24 * EPS + one, atol=0)
    assert not found[2].any()


def test_second_derivatives_are_those_of_the_slow_twins():
    torch.manual_seed(0)
    # Small integers: every product is exact in bfloat16, so that both ways give the same numbers.
    left = torch.randint(-2, 3, (2, 3)).bfloat16().requires_grad_()
    right = torch.randint(-2, 3, (3, 2)).bfloat16().requires_grad_()
    length = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).bfloat16().requires_grad_()

    def second(multiply, measure):
        made = multiply(left, right, torch.float32).square().sum()
        made = made + measure(length, -1).square().sum()
        firsts = torch.autograd.grad(made, (left, right, length), create_graph=True)
        total = torch.stack([first.float().square().sum() for first in firsts]).sum()
        return torch.autograd.grad(total, (left, right, length))

    fast = second(product, inverse_length)
    slow = second(precise._product, precise._inverse_length)
    for one, other in zip(fast[:2], slow[:2], strict=True):
        assert torch.equal(one, other)
        assert one.any()
    # Of the length, four gradients are rounded to bfloat16 on their way, each at another place.
    torch.testing.assert_close(fast[2], slow[2], rtol=4 * torch.finfo(torch.bfloat16).eps, atol=0)
    assert fast[2].any()


def test_what_is_kept_is_what_was_given():
    left = torch.randn(4, 6, requires_grad=True)
    right = torch.randn(6, 5).bfloat16().requires_grad_()
    assert [t.data_ptr() for t in kept_by(lambda: product(left, right, torch.bfloat16))] == [
        left.data_ptr(),
        right.data_ptr(),
    ]
    first, _ = kept_by(lambda: inverse_length(right, 0))
    assert first.data_ptr() == right.data_ptr()


def test_transforms_and_forward_mode_see_torch_operations():
    torch.manual_seed(0)
    right = torch.randn(6, 5).bfloat16()
    stack = torch.randn(3, 4, 6).bfloat16()

    def loss(left):
        return (product(left, right, torch.float32) * inverse_length(left, -1)).sum()

    by_one = torch.stack([torch.func.grad(loss)(one) for one in stack])
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(stack), by_one)
    leaf = stack[0].clone().requires_grad_()
    (of_leaf,) = torch.autograd.grad(loss(leaf), leaf)
    # Both gradients of the leaf are rounded before their sum here, and once after it there.
    scale = by_one[0].float().abs().max().item()
    torch.testing.assert_close(of_leaf, by_one[0], rtol=0, atol=3 * 2**-8 * scale)
    tangent = torch.ones_like(stack[0])
    along = torch.func.jvp(loss, (stack[0],), (tangent,))[1]
    slope = (by_one[0].float() * tangent.float()).sum()
    assert abs(float(along) - float(slope)) <= 24 * 2**-9 * scale  # 24 gradients, each rounded


@pytest.mark.parametrize("emulated", [False, True])
def test_maps_of_a_processor_with_and_without_low_precision(emulated, monkeypatch):
    monkeypatch.setattr(soft, "work_dtype", lambda dtype: torch.float32 if emulated else dtype)
    torch.manual_seed(0)
    weight, x = torch.randn(2, 5, 3, 4).softmax(1), torch.randn(2, 5, 8).bfloat16()
    rows = to_rows(weight, x)
    y = to_tokens(weight, rows)
    by_group = rows.unflatten(0, (3, 2, 4)).transpose(0, 1).flatten(1, 2)
    for made, left, right in (
        (by_group, weight.flatten(2).mT, x),
        (y, weight.flatten(2), by_group),
    ):
        if emulated:
            rounded_once(made, left, right)
        else:
            assert torch.equal(made, left.bfloat16() @ right)
