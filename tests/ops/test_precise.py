"""Products in float32 of what has fewer bytes, and tokens over their lengths."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from moefold.ops import precise, soft
from moefold.ops.precise import over_length, product
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


@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64], ids=str)
def test_tokens_over_their_length_and_gradients(dtype):
    torch.manual_seed(0)
    x = torch.randn(6, 9)
    x[5] = 0.0
    # Directions along the tokens: the two parts of a token's gradient all but cancel, so that they
    # may not be rounded one by one.
    directions = (x[:5].T / 3 + torch.randn(9, 5) / 100).requires_grad_()
    x = x.to(dtype).requires_grad_()
    made = over_length(x, directions)
    back = torch.randn(6, 5)
    of_x, of_directions = torch.autograd.grad(made, (x, directions), back.to(made.dtype))
    wide = torch.promote_types(dtype, torch.float32)
    assert (made.dtype, of_x.dtype, of_directions.dtype) == (wide, dtype, torch.float32)

    exact_x, exact_directions = (t.detach().double().requires_grad_() for t in (x, directions))
    inverse = (exact_x.square().sum(-1, keepdim=True) + 1e-6) ** -0.5
    exact = (exact_x @ exact_directions) * inverse
    wanted = torch.autograd.grad(exact, (exact_x, exact_directions), back.double())
    with torch.no_grad():
        # Sums of 9 products and of 5, a root, and a dozen products behind each other.
        eps, steps, scaled = torch.finfo(wide).eps, 40, back.double().abs() * inverse
        sums = exact_x.abs() @ exact_directions.abs()
        along = (scaled * sums * inverse).sum(-1, keepdim=True) * inverse * exact_x.abs()
        halves = scaled @ exact_directions.abs().mT + along
        assert ((made - exact).abs() <= steps * eps * sums * inverse).all()
        bounds = steps * eps * halves, steps * eps * (exact_x.abs().mT @ scaled)
        for found, want, bound in zip((of_x, of_directions), wanted, bounds, strict=True):
            unit = torch.finfo(found.dtype).eps / 2
            assert ((found - want).abs() <= bound + unit * (want.abs() + bound)).all()
    assert of_x[:5].any()


@pytest.mark.parametrize("step", [precise._OverLength.apply, precise._over_length])
def test_derivatives_of_a_length_are_those_of_differences(step):
    torch.manual_seed(0)
    x = torch.randn(3, 4).double().requires_grad_()
    directions = torch.randn(4, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(step, (x, directions))
    assert torch.autograd.gradgradcheck(step, (x, directions))


def test_second_derivatives_of_a_product_are_those_of_its_slow_twin():
    torch.manual_seed(0)
    # Small integers: every product is exact in bfloat16, so that both ways give the same numbers.
    left = torch.randint(-2, 3, (2, 3)).bfloat16().requires_grad_()
    right = torch.randint(-2, 3, (3, 2)).bfloat16().requires_grad_()

    def second(multiply):
        made = multiply(left, right, torch.float32).square().sum()
        firsts = torch.autograd.grad(made, (left, right), create_graph=True)
        total = torch.stack([first.float().square().sum() for first in firsts]).sum()
        return torch.autograd.grad(total, (left, right))

    for one, other in zip(second(product), second(precise._product), strict=True):
        assert torch.equal(one, other)
        assert one.any()


def test_what_is_kept_is_what_was_given_and_is_needed():
    left = torch.randn(4, 6, requires_grad=True)
    right = torch.randn(6, 5).bfloat16().requires_grad_()

    def kept(run, *given):
        return [t.data_ptr() for t in kept_by(lambda: run(*given))]

    assert kept(product, left, right, torch.bfloat16) == [left.data_ptr(), right.data_ptr()]
    assert kept(product, left, right.detach(), torch.bfloat16) == [right.data_ptr()]
    assert kept(product, left.detach(), right, torch.bfloat16) == [left.data_ptr()]
    assert kept(product, left.detach(), right.detach(), torch.bfloat16) == []
    directions = torch.randn(5, 2)
    tokens, same, _ = kept(over_length, right, directions)
    assert (tokens, same) == (right.data_ptr(), directions.data_ptr())


def test_transforms_and_forward_mode_see_torch_operations():
    torch.manual_seed(0)
    right, directions = torch.randn(6, 5).bfloat16(), torch.randn(6, 5)
    stack = torch.randn(3, 4, 6).bfloat16()

    def multiplied(left):
        return product(left, right, torch.float32).sum()

    def measured(left):
        return over_length(left, directions).sum()

    def both(left):
        return multiplied(left) + measured(left)

    by_one = torch.stack([torch.func.grad(both)(one) for one in stack])
    assert torch.equal(torch.func.vmap(torch.func.grad(both))(stack), by_one)
    # Two gradients and their sum, each rounded to bfloat16.
    halves = [torch.func.grad(part)(stack[0]).abs() for part in (multiplied, measured)]
    bound = 2 * torch.finfo(torch.bfloat16).eps * (halves[0].float() + halves[1].float())
    leaf = stack[0].clone().requires_grad_()
    (of_leaf,) = torch.autograd.grad(both(leaf), leaf)
    assert ((of_leaf.float() - by_one[0].float()).abs() <= bound).all()
    along = torch.func.jvp(both, (stack[0],), (torch.ones_like(stack[0]),))[1]
    assert abs(float(along) - float(by_one[0].float().sum())) <= float(bound.sum())


@pytest.mark.parametrize("emulated", [False, True])
def test_maps_of_a_processor_with_and_without_low_precision(emulated, monkeypatch):
    monkeypatch.setattr(soft, "work_dtype", lambda dtype: torch.float32 if emulated else dtype)
    torch.manual_seed(0)
    real = torch.tensor([[True, True, False, True, True], [True, False, True, True, False]])
    weight = (torch.randn(2, 5, 3, 4).softmax(1) * real[..., None, None]).requires_grad_()
    x = torch.randn(2, 5, 8).bfloat16().masked_fill(~real.unsqueeze(-1), torch.nan).requires_grad_()
    rows = to_rows(weight, x, real).detach().requires_grad_()
    y = to_tokens(weight, rows)
    of_y, of_rows = torch.randn(2, 5, 8).bfloat16(), torch.randn(24, 8).bfloat16()
    by_combine = torch.autograd.grad(y, (weight, rows), of_y)
    by_dispatch = torch.autograd.grad(to_rows(weight, x, real), (weight, x), of_rows)

    def by_group(rows):
        return rows.detach().unflatten(0, (3, 2, 4)).transpose(0, 1).flatten(1, 2)

    flat, tokens = weight.detach().flatten(2), x.detach().nan_to_num(0.0)
    for made, left, right in (
        (by_group(rows), flat.mT, tokens),
        (y.detach(), flat, by_group(rows)),
        (by_combine[0].flatten(2), of_y, by_group(rows).mT),
        (by_group(by_combine[1]), flat.mT, of_y),
        (by_dispatch[0].flatten(2), tokens, by_group(of_rows).mT),
        (by_dispatch[1], flat, by_group(of_rows)),
    ):
        if emulated:
            rounded_once(made, left, right)
        else:  # weights are rounded first, as the matrix of a linear layer is
            assert torch.equal(made.bfloat16(), left.bfloat16() @ right.bfloat16())
