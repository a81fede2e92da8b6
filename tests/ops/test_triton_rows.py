"""The list of rows by kernels, against that of `SparseRouting`: the same, bit by bit."""

import pytest
import torch

from tests.ops.triton_library import DEVICE  # isort: skip - before any kernel is defined

from moefold.ops.triton import rows as kernel
from moefold.routing import SparseRouting
from tests.ops.triton_interpreter import unwritten_memory_is_poison

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture(autouse=True)
def _poisoned():
    with unwritten_memory_is_poison():
        yield


def test_two_tokens_three_experts_by_hand():
    # Token 0 takes experts 0 and 2, token 1 expert 0; a list of five has two spare rows.
    chosen = torch.tensor([[True, False, True], [True, False, False]], device=DEVICE)
    weights = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], device=DEVICE)
    tokens, of_row, per_expert, *_ = kernel.list_rows(chosen, weights, 5)
    assert tokens.tolist() == [0, 1, 0, 0, 0]
    assert of_row.tolist() == torch.tensor([0.1, 0.4, 0.3, 0.0, 0.0]).tolist()
    assert per_expert.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("tokens", "experts"),
    [(1, 1), (257, 3), (40, 130), (33, 64)],
    ids=["1", "blocks", "columns", "2"],
)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_the_list_is_that_of_the_routing(tokens, experts, density):
    chosen = torch.rand(1, tokens, experts) < density
    weights = torch.rand(1, tokens, experts, requires_grad=True)
    expected = SparseRouting.from_choice(chosen, weights)
    real = len(expected.token_of_row)
    on_device = chosen[0].to(DEVICE), weights[0].to(DEVICE)
    for spare in (0, 3):
        found, again = (kernel.list_rows(*on_device, real + spare) for _ in range(2))
        for left, right in zip(found, again, strict=True):
            assert torch.equal(left, right)
        token_of_row, weight_of_row, rows_per_expert, *_ = found
        assert torch.equal(token_of_row[:real].cpu(), expected.token_of_row)
        assert torch.equal(weight_of_row[:real].cpu(), expected.weight_of_row)
        assert torch.equal(rows_per_expert.cpu(), expected.rows_per_expert)
        assert not token_of_row[real:].any()
        assert not weight_of_row[real:].any()
        # What comes back for spare rows reaches no weight.
        back = torch.randn(real + spare)
        (grad,) = torch.autograd.grad(weight_of_row, weights, back.to(DEVICE))
        (slow,) = torch.autograd.grad(
            expected.weight_of_row, weights, back[:real], retain_graph=True
        )
        assert torch.equal(grad, slow)


def test_rows_that_do_not_fit_are_left_out():
    # As nonzero_static does it; the numbers of rows are still those that were chosen.
    chosen = torch.ones(2, 2, dtype=torch.bool, device=DEVICE)
    weights = torch.rand(2, 2, device=DEVICE, requires_grad=True)
    tokens, of_row, per_expert, *_ = kernel.list_rows(chosen, weights, 3)
    assert tokens.tolist() == [0, 1, 0]
    assert per_expert.tolist() == [2, 2]
    (grad,) = torch.autograd.grad(of_row.sum(), weights)
    assert grad.tolist() == [[1.0, 1.0], [1.0, 0.0]]


def test_views_and_half_precision():
    chosen = (torch.rand(6, 9) < 0.5).to(DEVICE).t()
    weights = torch.rand(6, 9).to(DEVICE).t().bfloat16()
    expected = SparseRouting.from_choice(chosen[None].cpu(), weights[None].cpu())
    tokens, of_row, *_ = kernel.list_rows(chosen, weights, len(expected.token_of_row))
    assert torch.equal(tokens.cpu(), expected.token_of_row)
    assert torch.equal(of_row.cpu(), expected.weight_of_row)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=["no tokens", "no experts"])
def test_a_list_of_nothing(shape):
    weights = torch.rand(shape, device=DEVICE, requires_grad=True)
    tokens, of_row, per_expert, *_ = kernel.list_rows(weights > 2, weights, 2)
    assert tokens.tolist() == [0, 0]
    assert of_row.tolist() == [0.0, 0.0]
    assert per_expert.tolist() == [0] * shape[1]
    of_row.sum().backward()


def test_operators_declare_what_they_do():
    weights = torch.rand(5, 3, device=DEVICE, requires_grad=True)
    chosen = weights.detach() > 0.5
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(kernel.list_rows, (chosen, weights, 9), test_utils=tests)
    *_, counts, ends = kernel.list_rows(chosen, weights.detach(), 9)
    given = (chosen, counts, ends, torch.ones(9, device=DEVICE))
    torch.library.opcheck(kernel.list_rows_backward, given, test_utils=tests)
