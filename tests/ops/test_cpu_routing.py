"""Compiled choice and list of rows: what torch's operations give, in values and gradients.

Shapes: `tokens experts` pairs.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from moefold.ops.cpu import routing
from moefold.ops.rows import list_reference
from moefold.ops.select import top
from moefold.ops.weigh import weigh
from moefold.routers import RouterConfig
from moefold.routing import SparseRouting
from tests.ops.compiled_here import needs_compiled_code

pytestmark = needs_compiled_code

# Around 8 experts, which are read at once, and 256 tokens, which a thread takes at once; from the
# fourth on there are pairs enough for several threads.
SIZES = [(0, 8, 2), (1, 1, 1), (255, 3, 3), (700, 64, 8), (513, 130, 32), (40, 1024, 5)]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def scores_with_ties(tokens: int, experts: int) -> Tensor:
    """Every third row has ties, every fifth is zero."""
    scores = torch.randn(tokens, experts).softmax(-1)
    scores[::3] = (scores[::3] * experts).round() / experts
    scores[::5] = 0.0
    return scores


def rounding(terms: int) -> float:
    """How far apart two sums of positive terms may be, relative to either, and two divisions."""
    return 2 * (terms + 2) * EPS


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "k"), SIZES)
def test_choice_and_weights(tokens, experts, k, normalize, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    scores = scores_with_ties(tokens, experts).requires_grad_()
    contest = scores.detach() + torch.randn(experts).round()
    chosen, weights = routing.choose(contest, scores, k, normalize=normalize, scale=1.5)
    assert torch.equal(chosen, top(contest, k, 1))
    exact = weigh(chosen, scores.double(), normalize, 1.5)
    torch.testing.assert_close(weights.double(), exact, rtol=rounding(k), atol=0)
    # A gradient is a difference of two numbers as large as the weights' gradients over the total.
    of_weights = torch.randn(tokens, experts)
    (of_scores,) = torch.autograd.grad(weights, scores, of_weights)
    (slow,) = torch.autograd.grad(exact, scores, of_weights.double())
    total = torch.where(chosen, scores, 0.0).detach().sum(-1, keepdim=True)
    size = 1.5 * of_weights.abs().amax(-1, keepdim=True) if tokens else of_weights
    if normalize:
        size = 2 * size / torch.where(total > 0, total, 1.0)
    assert ((of_scores - slow).abs() <= rounding(k) * size).all()
    assert not of_scores[~chosen].any()


def test_the_lowest_index_wins_by_hand():
    scores = torch.tensor([[0.2, 0.3, 0.3, 0.3], [0.0, 0.0, 0.0, 0.0]])
    chosen, weights = routing.choose(scores, scores, 2, normalize=True)
    assert chosen.tolist() == [[False, True, True, False], [True, True, False, False]]
    assert weights.tolist() == [[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_what_is_infinite_takes_part_and_what_is_no_number_does_not():
    contest = torch.tensor([[-math.inf, 1.0, -math.inf], [math.nan, -math.inf, math.nan]])
    chosen, _ = routing.choose(contest, torch.ones(2, 3), 2)
    assert chosen.tolist() == [[True, True, False], [False, True, False]]
    # None is taken twice.
    chosen, _ = routing.choose(torch.full((1, 4), -math.inf), torch.ones(1, 4), 3)
    assert chosen.tolist() == [[True, True, True, False]]


def test_padding_chooses_nothing():
    scores, real = torch.rand(300, 5).requires_grad_(), torch.rand(300) < 0.5
    chosen, weights = routing.choose(scores.detach(), scores, 2, real=real, normalize=True)
    assert torch.equal(chosen, top(scores.detach(), 2, 1) & real[:, None])
    assert not weights[~real].any()
    (of_scores,) = torch.autograd.grad(weights[:, 0].sum(), scores)
    assert not of_scores[~real].any()
    assert of_scores[real].any()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("tokens", "experts", "k"), SIZES)
def test_the_list_of_rows(tokens, experts, k, density, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    chosen = torch.rand(tokens, experts) < density
    weights = torch.rand(tokens, experts).requires_grad_()
    found, expected = routing.list_rows(chosen, weights), list_reference(chosen, weights)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    of_row = torch.randn(len(found[0]))
    grads = [torch.autograd.grad(made[1], weights, of_row)[0] for made in (found, expected)]
    assert torch.equal(*grads)


def test_memory_with_gaps_is_read_as_it_is_meant():
    scores = torch.rand(9, 40).t().requires_grad_()
    chosen, weights = routing.choose(scores.detach(), scores, 2)
    assert torch.equal(chosen, top(scores.detach(), 2, 1))
    wide = torch.zeros(40, 18, dtype=torch.bool)
    wide[:, ::2] = chosen
    found = routing.list_rows(wide[:, ::2], weights)
    assert torch.equal(found[1], list_reference(chosen, weights)[1])
    of_row = torch.ones(1).expand(80)
    (of_scores,) = torch.autograd.grad(found[1], scores, of_row)
    assert torch.equal(of_scores, chosen.float())


def test_memory_is_on_the_cpu_whatever_the_defaults():
    scores = torch.rand(20, 6).requires_grad_()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            chosen, weights = routing.choose(scores.detach(), scores, 2)
            found = routing.list_rows(chosen, weights)
            (of_scores,) = torch.autograd.grad(found[1].sum(), scores)
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(found, list_reference(chosen, weights), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(of_scores, chosen.float())


def test_second_derivatives():
    scores, of_row = torch.rand(20, 6).requires_grad_(), torch.randn(40).requires_grad_()

    def twice(choose, list_rows) -> tuple[Tensor, ...]:
        chosen, weights = choose(scores)
        _, weight_of_row, _ = list_rows(chosen, weights)
        (first,) = torch.autograd.grad(weight_of_row, scores, of_row, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), (scores, of_row))

    def slow(scores: Tensor) -> tuple[Tensor, Tensor]:
        chosen = top(scores.detach(), 2, 1)
        return chosen, weigh(chosen, scores, True, 1.0)

    def fast(scores: Tensor) -> tuple[Tensor, Tensor]:
        return routing.choose(scores.detach(), scores, 2, normalize=True)

    expected, found = twice(slow, list_reference), twice(fast, routing.list_rows)
    for one, other in zip(found, expected, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other)


def test_who_wants_no_gradient_gets_no_graph():
    scores = torch.rand(4, 3).requires_grad_()
    with torch.no_grad():
        chosen, weights = routing.choose(scores, scores, 1)
        _, weight_of_row, _ = routing.list_rows(chosen, weights)
    assert weights.grad_fn is None
    assert weight_of_row.grad_fn is None


class Seen(TorchDispatchMode):
    """Remembers the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run it."""
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_operators():
    scores = torch.rand(4, 3).requires_grad_()
    with Seen() as seen:
        _, weights = routing.choose(scores.detach(), scores, 1)
        weights.sum().backward()
    assert {"moefold.choose.default", "moefold.choose_backward.default"} <= seen.names


class Marked(Tensor):
    """A tensor of another class."""


def test_what_must_be_seen_is_left_to_torch():
    pairs, marks = torch.rand(4, 3), torch.ones(4, 3, dtype=torch.bool)
    assert routing.serves(pairs, marks=[marks])
    assert not routing.serves(pairs.double())
    assert not routing.serves(marks)
    assert not routing.serves(marks=[pairs])
    assert not routing.serves(indices=[marks])
    assert not routing.serves(pairs.to("meta"))
    assert not routing.serves(torch._neg_view(pairs))  # pyright: ignore[reportPrivateImportUsage]
    assert not routing.serves(pairs.as_subclass(Marked))
    seen = []

    def ask(x: Tensor) -> Tensor:
        seen.append(routing.serves(pairs))
        return x

    torch.vmap(ask)(pairs)
    make_fx(ask)(pairs)  # by a mode
    make_fx(lambda x: ask(x) if routing.serves(pairs, as_operator=True) else seen.clear())(pairs)
    with pytest.deprecated_call():
        torch.jit.trace(ask, pairs, check_trace=False)
    with forward_ad.dual_level():
        ask(pairs)
    assert seen == [False] * 5


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: routing.choose(torch.ones(3, 2), torch.ones(3, 4), 1), "contest is"),
        (lambda: routing.choose(torch.ones(3, 2), torch.ones(3, 2), 3), "k is 3 of 2"),
        (lambda: routing.choose(torch.ones(3, 2), torch.ones(3, 2), 0), "k is 0"),
        (lambda: routing.choose(torch.ones(1, 40), torch.ones(1, 40), 33), "k is 33 of 40"),
        (lambda: routing.choose(torch.ones(1, 1025), torch.ones(1, 1025), 1), "1025"),
        (
            lambda: routing.choose(
                torch.ones(3, 2), torch.ones(3, 2), 1, real=torch.ones(2, dtype=torch.bool)
            ),
            "3 tokens",
        ),
        (
            lambda: routing.list_rows(torch.ones(3, 2, dtype=torch.bool), torch.ones(3, 4)),
            "chosen is",
        ),
    ],
)
def test_sizes_that_compiled_code_would_read_beyond_are_refused(call, why):
    with pytest.raises(ValueError, match=why):
        call()


@pytest.mark.parametrize(
    "config",
    [
        RouterConfig("token-choice", {"k": 2, "renormalize": True}),
        RouterConfig("token-choice", {"k": 1}),
        RouterConfig("bias-balanced", {"k": 3}),
        RouterConfig("expert-choice"),
    ],
    ids=lambda config: config.name,
)
@pytest.mark.parametrize("masked", [False, True], ids=["all real", "masked"])
def test_a_router_makes_the_same_routing_without_a_compiler(config, masked, monkeypatch):
    router = config.build(16, 6)
    mask = torch.rand(3, 50) < 0.7 if masked else None
    x = torch.randn(3, 50, 16)

    def route() -> tuple[SparseRouting, Tensor]:
        made = router(x, mask)
        (grad,) = torch.autograd.grad(made.weight_of_row.square().sum(), made.logits)
        return made, grad

    fast, fast_grad = route()
    asked = []
    monkeypatch.setattr(routing, "_functions", lambda: asked.append(1))
    slow, slow_grad = route()
    assert asked
    assert torch.equal(fast.token_of_row, slow.token_of_row)
    assert torch.equal(fast.rows_per_expert, slow.rows_per_expert)
    torch.testing.assert_close(fast.weight_of_row, slow.weight_of_row, rtol=rounding(3), atol=0)
    # Gradients at weights are below 2, at scores below that over their sum, and a softmax takes
    # from each a mean of all; a difference of two such numbers is rounded like the larger.
    assert slow.scores is not None
    total = torch.where(slow.chosen, slow.scores, 1.0).detach().sum(-1).min()
    torch.testing.assert_close(fast_grad, slow_grad, rtol=0, atol=rounding(6) * float(4 / total))
    assert (slow_grad.abs().amax(-1) > 1e-3).any()


@pytest.mark.parametrize("normalize", [False, True])
def test_the_operator_of_a_graph_computes_without_a_compiler(normalize, monkeypatch):
    scores = scores_with_ties(50, 6).requires_grad_()
    real, of_weights = torch.rand(50) < 0.7, torch.randn(50, 6)

    def run() -> list[Tensor]:
        given = scores.detach(), scores, 2, real, normalize, 1.5
        chosen, weights = routing._chosen(*given)
        return [chosen, weights, *torch.autograd.grad(weights, scores, of_weights)]

    chosen, weights, of_scores = run()
    monkeypatch.setattr(routing, "_functions", lambda: None)
    slow_chosen, slow_weights, slow_of_scores = run()
    assert torch.equal(chosen, slow_chosen)
    torch.testing.assert_close(weights, slow_weights, rtol=rounding(2), atol=0)
    torch.testing.assert_close(of_scores, slow_of_scores)
