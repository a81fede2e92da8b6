"""Selection and the fused router by kernels, against their slow twins: the same marks."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tests.ops.triton_library import DEVICE  # isort: skip - before any kernel is defined

from moefold.ops import kernels
from moefold.ops.route import route, route_reference
from moefold.ops.select import top
from moefold.ops.triton.select import mark_short, route_backward
from moefold.ops.triton.select import route as kernel
from tests.ops.triton_interpreter import kernels_everywhere, unwritten_memory_is_poison

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

EPS = torch.finfo(torch.float32).eps
INF = float("inf")


@pytest.fixture(autouse=True)
def _poisoned():
    with unwritten_memory_is_poison():
        yield


def hard_scores(*shape: int) -> Tensor:
    """Few values, so that nearly every choice breaks a tie: zeros, infinities, tiny numbers."""
    values = torch.tensor([0.0, -0.0, 0.5, 1.0, -1.0, -INF, INF, 1e-45, -1e-45, 1.0 + EPS])
    return values[torch.randint(len(values), shape)]


def assert_same_marks(scores, count, dim, valid=None):
    expected = top(scores, count, dim, valid)
    scores, valid = scores.to(DEVICE), None if valid is None else valid.to(DEVICE)
    if isinstance(count, Tensor):
        count = count.to(DEVICE)
    with kernels_everywhere():
        found = [top(scores, count, dim, valid) for _ in range(2)]
    assert torch.equal(found[0].cpu(), expected)
    assert torch.equal(found[0], found[1])


# Selection


def test_top_by_hand():
    # Two of each row: the only two above the rest; the first two of four; one zero is like another.
    scores = torch.tensor([[0.2, 0.7, 0.7, 0.1], [0.5, 0.5, 0.5, 0.5], [-0.0, 0.0, -0.0, -1.0]])
    with kernels_everywhere():
        marked = top(scores.to(DEVICE), 2, 1)
    assert marked.int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (3, 1, 33), (2, 40, 1)], ids=str)
@pytest.mark.parametrize("dim", [1, 2], ids=["along members", "along experts"])
def test_top_is_its_slow_twin(shape, dim):
    scores, valid = hard_scores(*shape), torch.rand(shape) < 0.6
    size = shape[dim]
    for count in (1, size, size + 3, torch.arange(shape[0]) * size // 2):
        for mask in (None, valid):
            assert_same_marks(scores, count, dim, mask)


def test_masks_that_are_views_and_groups_without_members():
    # As routers make them: one number for each member, spread over experts. Nothing is real in 1.
    scores, real = hard_scores(2, 6, 5), torch.rand(2, 6) < 0.5
    real[1] = False
    spread = real.unsqueeze(-1).expand_as(scores)
    for dim in (1, 2):
        assert_same_marks(scores, 3, dim, spread)
        assert_same_marks(scores.transpose(1, 2).contiguous().transpose(1, 2), 3, dim, spread)


def test_as_many_as_a_program_holds_at_its_edge():
    # Rows that are as long as a block, one shorter, and more rows than one program takes.
    for rows, size in ((3, 64), (3, 63), (70, 64)):
        assert_same_marks(torch.randn(1, rows, size), 9, 2)


def test_half_precision_is_compared_as_float32():
    scores = torch.randn(1, 9, 17)
    for dtype in (torch.bfloat16, torch.float16):
        assert_same_marks(scores.to(dtype), 4, 2)


# When kernels serve


def test_where_kernels_serve(monkeypatch):
    assert not kernels.serve(torch.zeros(1))
    with kernels_everywhere():
        assert kernels.serve(torch.zeros(1))
        assert not kernels.serve(torch.zeros(1, dtype=torch.float64))
        assert not kernels.serve(torch.zeros(1, dtype=torch.int64))
        assert not kernels.serve(torch.zeros(1, device="meta"))
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        assert not kernels.serve(torch.zeros(1))
        monkeypatch.undo()
        monkeypatch.setattr(kernels, "_INSTALLED", False)
        assert not kernels.serve(torch.zeros(1))


@pytest.mark.parametrize("asked", [False, True])
def test_kernels_serve_a_gpu_that_asks_for_them(asked, monkeypatch):
    monkeypatch.setattr(kernels, "on_cuda", asked)
    with FakeTensorMode():
        assert kernels.serve(torch.zeros(1, device="cuda")) is asked
    assert not kernels.serve(torch.zeros(1))


def test_the_slow_twin_needs_no_triton():
    code = (
        "import sys, torch, moefold.ops.select, moefold.ops.route, moefold.ops.soft\n"
        "moefold.ops.select.top(torch.zeros(1, 3), 1, 1)\n"
        "moefold.ops.route.route(torch.zeros(1, 3), 1)\n"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# The fused router

SCORES = {"softmax": (1.0, 0.0), "sigmoid": (0.0, 1.0), "unified": (0.75, 0.125)}


def routed_by_kernel(logits, k, **settings):
    on_device: dict = {}
    for name, value in settings.items():
        on_device[name] = value.to(DEVICE) if isinstance(value, Tensor) else value
    with kernels_everywhere():
        return route(logits.to(DEVICE), k, **on_device)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(1, 1, 1), (37, 5, 2), (70, 64, 8), (9, 6, 6)], ids=str
)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "normalised, biased, masked"])
def test_route_is_its_slow_twin(score, tokens, experts, k, extras):
    softmax, sigmoid = SCORES[score]
    settings: dict = {"softmax": softmax, "sigmoid": sigmoid}
    if extras:
        settings |= {
            "bias": torch.randn(experts),
            "real": torch.rand(tokens) < 0.7,
            "normalize": True,
            "scale": 2.5,
        }
    logits = (4 * torch.randn(tokens, experts)).requires_grad_()
    found = routed_by_kernel(logits, k, **settings)
    again = routed_by_kernel(logits, k, **settings)
    for left, right in zip(found, again, strict=True):
        assert torch.equal(left, right)

    # The choice is exactly that of the slow twin, for the scores that come with it.
    contest = found.scores.detach().cpu() + settings.get("bias", 0.0)
    spread = None
    if "real" in settings:
        spread = settings["real"].unsqueeze(1).expand(tokens, experts)
    assert torch.equal(found.chosen.cpu(), top(contest, k, 1, spread))

    # A score is exp(a) / sum: two ulp of the exponential, one of the division, and the sum's order,
    # at most one rounding for each expert, in either of the two; likewise the sum of the chosen.
    apart = 2 * (experts + k + 6) * EPS
    slow = route_reference(logits, k, **settings)
    torch.testing.assert_close(found.scores.cpu(), slow.scores, rtol=apart, atol=0)
    weights = torch.where(found.chosen.cpu(), slow.scores, 0.0)
    if extras:
        total = weights.sum(1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
    scaled = weights * settings.get("scale", 1.0)
    torch.testing.assert_close(found.weights.cpu(), scaled, rtol=apart, atol=0)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", [False, True], ids=["scores", "normalised"])
def test_route_has_the_gradient_of_its_slow_twin(score, normalize):
    softmax, sigmoid = SCORES[score]
    tokens, experts, k = 33, 7, 3
    settings = {"softmax": softmax, "sigmoid": sigmoid, "normalize": normalize, "scale": 1.5}
    real = torch.rand(tokens) < 0.7
    logits = torch.randn(tokens, experts)
    # In float64 no two scores are close enough for the choices to differ: seen below.
    fast, slow = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = routed_by_kernel(fast, k, real=real, **settings)
    expected = route_reference(slow, k, real=real, **settings)
    assert torch.equal(found.chosen.cpu(), expected.chosen)
    back = [torch.randn(tokens, experts) for _ in range(2)]
    found.scores.backward(back[0].to(found.scores), retain_graph=True)
    assert fast.grad is not None
    alone = fast.grad.clone()
    found.weights.backward(back[1].to(found.weights))
    grads = torch.autograd.grad(expected.scores, slow, back[0].double(), retain_graph=True)
    both = torch.autograd.grad(
        [expected.scores, expected.weights], slow, [b.double() for b in back]
    )
    # A sum of so many products of numbers below 1 with gradients below the largest, twice, divided
    # by the sum of the chosen scores where these are normalised.
    least = 1.0
    if normalize:
        total = torch.where(expected.chosen, expected.scores.detach(), 0.0).sum(1)
        least = min(1.0, float(total[total > 0].min()))
    most = max(float(b.abs().max()) for b in back) * 1.5 / least
    apart = 4 * (experts + 8) * EPS * most
    torch.testing.assert_close(alone, grads[0].float(), rtol=0, atol=apart)
    torch.testing.assert_close(fast.grad, both[0].float(), rtol=0, atol=apart)


def test_scores_far_apart_neither_overflow_nor_vanish():
    logits = torch.tensor([[200.0, -200.0, 0.0], [-1e38, 1e38, 0.0]], requires_grad=True)
    for softmax, sigmoid in SCORES.values():
        settings = {"softmax": softmax, "sigmoid": sigmoid, "normalize": True}
        found, slow = (
            routed_by_kernel(logits, 2, **settings),
            route_reference(logits, 2, **settings),
        )
        assert torch.equal(found.chosen.cpu(), slow.chosen)
        torch.testing.assert_close(found.weights.cpu(), slow.weights, rtol=8 * EPS, atol=0)
        (grad,) = torch.autograd.grad(found.weights.sum(), logits)
        assert torch.isfinite(grad).all()


def test_route_in_float64_and_without_tokens():
    # Kernels are for float32: float64 goes another way and stays what it was.
    assert routed_by_kernel(torch.zeros(2, 3, dtype=torch.float64), 1).scores.dtype == torch.float64
    routed = routed_by_kernel(torch.zeros(0, 3, requires_grad=True), 2)
    assert routed.scores.shape == (0, 3)
    assert not routed.chosen.any()
    routed.weights.sum().backward()


def test_operators_declare_what_they_do():
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    logits = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    chosen = logits.detach() > 0
    grad = torch.ones(4, 3, device=DEVICE)
    torch.library.opcheck(mark_short, (logits.detach(), chosen, None, 2, 1), test_utils=tests)
    given = (logits, None, None, 2, 1.0, 0.0, True, 1.0)
    torch.library.opcheck(kernel, given, test_utils=tests)
    given = (logits.detach(), chosen, grad, grad, 1.0, 0.0, True, 1.0)
    torch.library.opcheck(route_backward, given, test_utils=tests)


@pytest.mark.compile
def test_selection_and_router_are_part_of_a_compiled_graph():
    def both(scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        return top(scores, 2, 1, valid), route(scores.flatten(0, 1), 2, normalize=True).weights

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    with kernels_everywhere():
        for members in (5, 8):
            scores = torch.randn(2, members, 4, device=DEVICE, requires_grad=True)
            valid = torch.rand(2, members, 4, device=DEVICE) < 0.5
            found, expected = compiled(scores, valid), both(scores, valid)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
            back = torch.randn_like(found[1])
            grads = [torch.autograd.grad(y, scores, back)[0] for y in (found[1], expected[1])]
            assert torch.equal(*grads)


@pytest.mark.compile
def test_an_exported_program_has_no_kernel_of_ours():
    class Choice(torch.nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return top(scores, 2, 1)

    with kernels_everywhere():
        graph = torch.export.export(Choice(), (torch.randn(2, 9, 3, device=DEVICE),)).graph
    assert not [node for node in graph.nodes if "moefold" in str(node.target)]
