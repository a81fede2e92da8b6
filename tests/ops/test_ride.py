"""A loss that rides: the output unchanged, the loss differentiated by exactly one."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moefold.ops.ride import ride


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values or 2.0, requires_grad=True)


def slope(of: torch.Tensor) -> torch.Tensor:
    assert of.grad is not None
    return of.grad


def test_as_if_the_loss_had_been_added():
    # task = sum(3 (2a)^2), riding = 5 b^2; d/da of their sum is 24 a, d/db is 10 b
    a, b = leaf(1.0, -2.0), leaf()
    y = ride(2 * a, 5 * b**2)
    (3 * y**2).sum().backward()
    assert slope(a).tolist() == [24.0, -48.0]
    assert slope(b).item() == 20.0


def test_the_output_is_the_input_without_a_copy():
    y = leaf(1.0, 2.0) * 3
    out = ride(y, leaf())
    assert out.data_ptr() == y.data_ptr()
    assert torch.equal(out, y)


def test_a_factor_on_the_task_does_not_reach_the_loss():
    a, b = leaf(1.0, 2.0), leaf()
    (ride(a * 1, b * 1).sum() * 1e6 + ride(a * 1, b * 1).square().sum()).backward()
    assert slope(b).item() == 2.0  # twice ridden; not 1e6


def test_output_used_many_times_counts_once():
    a, b = leaf(1.0, 2.0), leaf()
    y = ride(a, b)
    (y.sum() + y.exp().sum() * y.sin().sum()).backward()
    assert slope(b).item() == 1.0


def test_two_losses_on_one_output():
    a, b, c = leaf(1.0, 2.0), leaf(), leaf()
    ride(ride(a, b), 3 * c).sum().backward()
    assert (slope(b).item(), slope(c).item()) == (1.0, 3.0)
    assert slope(a).tolist() == [1.0, 1.0]


def test_any_shape_of_loss_gets_ones():
    a, b = leaf(1.0, 2.0), torch.zeros(2, 3, requires_grad=True)
    ride(a, b).sum().backward()
    assert torch.equal(slope(b), torch.ones(2, 3))


def test_output_without_gradient_of_its_own_carries_the_loss():
    b = leaf()
    y = ride(torch.ones(3), b)
    assert y.requires_grad
    y.sum().backward()
    assert slope(b).item() == 1.0


def test_no_gradient_no_ride():
    a, b = leaf(1.0, 2.0), leaf()
    with torch.no_grad():
        assert not ride(a, b).requires_grad
    (ride(a, b).detach() * a).sum().backward()
    assert b.grad is None


def test_what_follows_may_work_in_place():
    a, b = leaf(1.0, 2.0), leaf()
    y = ride(2 * a, b)
    y.add_(1).mul_(3)
    y.sum().backward()
    assert slope(a).tolist() == [6.0, 6.0]
    assert slope(b).item() == 1.0


def test_changing_in_place_what_another_operation_saved_is_still_an_error():
    # exp saved its result, which is what the output shares its memory with
    y = ride(leaf(1.0, 2.0).exp(), leaf())
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_once(reentrant):
    a, b = leaf(1.0, 2.0), leaf()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return ride(x.exp(), 3 * b).sin()

    checkpoint(layer, a, use_reentrant=reentrant).sum().backward()
    assert slope(b).item() == 3.0
    assert torch.allclose(slope(a), torch.cos(a.exp()) * a.exp())


def test_autocast_leaves_both_dtypes():
    a, b = torch.randn(4, 4, requires_grad=True), leaf()
    with torch.autocast("cpu", torch.bfloat16):
        y = ride(a @ a, b * 2)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert slope(b).dtype == torch.float32
    assert slope(b).item() == 2.0


def test_second_derivative_passes_through():
    a = torch.randn(3, dtype=torch.float64, requires_grad=True)
    b = torch.randn((), dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda x: ride(x**3, b), a)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_into_one_graph(dtype):
    torch.compiler.reset()
    a, b = torch.randn(5, dtype=dtype, requires_grad=True), leaf()
    compiled = torch.compile(lambda x, z: ride(x * 2, z * 3).relu(), fullgraph=True)
    out = compiled(a, b)
    assert torch.equal(out, (2 * a).relu())
    out.sum().backward()
    assert slope(b).item() == 3.0
    assert torch.equal(slope(a), 2 * (a > 0).to(dtype))


def test_a_loss_rides_under_torch_func():
    # d/dw (w^2 + 3 w) = 2 w + 3 at w = 2, where 3 w rides.
    def task(w):
        return ride(w * w, 3 * w)

    assert torch.func.grad(task)(torch.tensor(2.0)) == 7
