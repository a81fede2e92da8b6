"""Compiled choice and list of rows: what torch's operations give, in values and gradients.

Shapes: `tokens experts` pairs.
"""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moefold.ops.cpu import routing
from moefold.ops.rows_torch import list_reference
from moefold.ops.select import top
from moefold.ops.weigh import weigh, weigh_backward
from moefold.routers import Recipe, RouterConfig
from moefold.routers.choice import TopExperts
from moefold.routers.score import Sigmoid
from moefold.routers.sparse import LogitRouter
from moefold.routers.weight import Weight
from moefold.routing import SparseRouting
from tests.ops.compiled_here import needs_compiled_code

pytestmark = needs_compiled_code

# Around 8 experts, which are read at once, and 256 tokens, which a thread takes at once; from the
# fourth on there are pairs enough for several threads.
SIZES = [
    *((0, 8, 2), (1, 1, 1), (255, 3, 3), (700, 64, 8), (513, 130, 32), (40, 1024, 5)),
    (2100, 20, 2),
]
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


@pytest.mark.parametrize("twice", [False, True])
def test_sequences_are_tokens_one_after_another(twice):
    # Groups of one position lie across each other in memory.
    scores = torch.rand(150, 2, 6).transpose(0, 1).requires_grad_()
    real = torch.rand(2, 150) < 0.8
    chosen, weights = routing.choose(scores.detach(), scores, 2, real=real, normalize=True)
    found = routing.list_rows(chosen, weights)
    flat = scores.detach().flatten(0, 1).requires_grad_()
    expected = list_reference(
        *routing.choose(flat.detach(), flat, 2, real=real.flatten(), normalize=True)
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    of_row = torch.randn(len(found[0]))
    (of_scores,) = torch.autograd.grad(found[1], scores, of_row, create_graph=twice)
    (of_flat,) = torch.autograd.grad(expected[1], flat, of_row)
    assert of_flat.any()
    torch.testing.assert_close(of_scores, of_flat.reshape(2, 150, 6))


def test_a_mark_is_any_byte_but_zero():
    marks = torch.arange(256, dtype=torch.uint8).reshape(8, 32).view(torch.bool)
    found = routing.list_rows(marks, torch.ones(8, 32))
    for one, other in zip(found, list_reference(marks, torch.ones(8, 32)), strict=True):
        assert torch.equal(one, other)


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


@pytest.mark.parametrize("normalize", [False, True])
def test_the_gradient_by_torch_is_that_of_autograd(normalize):
    # What was not chosen is as good as not there, whatever it is.
    scores = torch.rand(20, 6, dtype=torch.float64)
    scores[:, 3], scores[:, 4] = math.inf, math.nan
    chosen, of_weights = torch.rand(20, 6) < 0.5, torch.randn(20, 6, dtype=torch.float64)
    chosen[:, 3:5] = False
    scores.requires_grad_()
    weights = weigh(chosen, scores, normalize, 1.5)
    (expected,) = torch.autograd.grad(weights, scores, of_weights)
    found = weigh_backward(chosen, scores, of_weights, normalize, 1.5)
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected)


ROUTER = RouterConfig("token-choice", {"k": 2, "renormalize": True})


def test_gradients_in_a_batch():
    router, x = ROUTER.build(16, 6), torch.randn(1, 5, 16, requires_grad=True)
    weights, each = router(x).weight_of_row, torch.eye(10)
    (found,) = torch.autograd.grad(weights, x, each, is_grads_batched=True, retain_graph=True)
    for gradient, one in zip(found, each, strict=True):
        (expected,) = torch.autograd.grad(weights, x, one, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_checkpointing_may_be_watched_once(where):
    router, x = ROUTER.build(16, 6), torch.randn(2, 10, 16, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return router(x).weight_of_row.square().sum()

    (expected,) = torch.autograd.grad(run(x), x)
    with Seen() if where == "forward" else nullcontext():
        made = checkpoint(run, x, use_reentrant=False)
    with Seen() if where == "backward" else nullcontext():
        made.backward()
    torch.testing.assert_close(x.grad, expected)


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
        chosen, weights = routing.choose(scores.detach(), scores, 1)
        routing.list_rows(chosen, weights)[1].sum().backward()
    own = {"moefold.choose.default", "moefold.choose_backward.default"}
    assert own | {"aten.nonzero.default"} <= seen.names


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
        (lambda: routing.choose(torch.ones(3, 2), torch.ones(3, 2), 3), "k is 3; .* 1 to 2"),
        (lambda: routing.choose(torch.ones(3, 2), torch.ones(3, 2), 0), "k is 0; .* 1 to 2"),
        (lambda: routing.choose(torch.ones(1, 40), torch.ones(1, 40), 33), "k is 33; .* 1 to 32"),
        (lambda: routing.choose(torch.ones(1, 1025), torch.ones(1, 1025), 1), "1025 experts; at"),
        (
            lambda: routing.choose(
                torch.ones(3, 2), torch.ones(3, 2), 1, real=torch.ones(2, dtype=torch.bool)
            ),
            r"real is \[2\], but scores are \[3, 2\]",
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
        RouterConfig("bias-balanced", {"k": 3, "scale": 2.5}),
        RouterConfig("expert-choice"),
    ],
    ids=lambda config: config.name,
)
@pytest.mark.parametrize("masked", [False, True], ids=["all real", "masked"])
def test_a_router_makes_the_same_routing_without_a_compiler(config, masked, monkeypatch):
    router = config.build(16, 6)
    for bias in router.buffers():  # so that it decides, and does not weigh
        bias.copy_(torch.linspace(-0.2, 0.2, 6))
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
    scores = scores_with_ties(50, 6).reshape(2, 25, 6).requires_grad_()
    real, of_weights = torch.rand(2, 25) < 0.7, torch.randn(2, 25, 6)

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


@pytest.mark.parametrize(
    ("experts", "k", "fits"), [(40, 32, True), (40, 33, False), (1025, 1, False)]
)
def test_a_router_of_any_size_routes(experts, k, fits, monkeypatch):
    choose, asked = routing.choose, []
    monkeypatch.setattr(routing, "choose", lambda *a, **b: asked.append(1) or choose(*a, **b))
    made = RouterConfig("token-choice", {"k": k}).build(8, experts)(torch.randn(1, 12, 8))
    assert made.rows_per_expert.sum() == 12 * k
    assert bool(asked) == fits


@pytest.mark.compile
def test_operators_are_registered_right():
    wide = torch.rand(7, 20)
    for scores in (wide, wide.t(), wide[:, ::2]):
        own = scores.detach().requires_grad_()
        chosen, of_weights = top(scores, 2, 1), torch.rand(1).expand(scores.shape)
        given = own.detach(), own, 2, torch.rand(len(scores)) < 0.7, True, 1.5
        # The check of a whole graph adds results up, which it cannot do with marks and numbers.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.moefold.choose.default, given, test_utils=checks)
        given = chosen, own.detach(), of_weights, True, 1.5
        torch.library.opcheck(torch.ops.moefold.choose_backward.default, given)


@pytest.mark.compile
def test_scores_may_lie_anyhow_in_a_graph():
    recipe = Recipe(score=Sigmoid(), choice=TopExperts(k=2), weight=Weight(normalize="chosen"))
    router, raw = LogitRouter(6, recipe), torch.randn(6, 20)

    def weights(raw: Tensor) -> Tensor:
        return router(raw.unsqueeze(0).transpose(1, 2)).weight_of_row

    found = torch.compile(weights, fullgraph=True)(raw)
    torch.testing.assert_close(found, weights(raw))


@pytest.mark.compile
def test_transforms_in_a_graph():
    router, x = ROUTER.build(16, 6), torch.randn(2, 10, 16)

    def weigh_all(x: Tensor) -> Tensor:
        return router(x).weight_of_row.square().sum()

    def along(x: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(weigh_all, (x,), (torch.ones_like(x),))

    def twice(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: torch.func.grad(weigh_all)(x).square().sum())(x)

    for transformed in (along, torch.func.grad(weigh_all), twice):
        found = torch.compile(transformed, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(found, transformed(x))


@pytest.mark.compile
def test_derivatives_of_a_graph():
    router, x = ROUTER.build(16, 6), torch.randn(2, 10, 16, requires_grad=True)

    def weigh_all(x: Tensor) -> Tensor:
        return router(x).weight_of_row.square().sum()

    def second(run) -> Tensor:
        (first,) = torch.autograd.grad(run(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    graph = torch.compile(weigh_all, backend="eager")
    torch.testing.assert_close(second(graph), second(weigh_all))

    def along(run) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            made = forward_ad.unpack_dual(run(forward_ad.make_dual(x.detach(), torch.ones_like(x))))
            assert made.tangent is not None
            return made.primal, made.tangent

    torch.testing.assert_close(along(graph), along(weigh_all))
