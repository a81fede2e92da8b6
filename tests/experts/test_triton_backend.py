"""The Triton backend: from tokens to tokens as the definition does, and what it keeps and refuses.

That `compute` is what `reference` computes is the contract suite's claim; it runs here as well.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.ops.triton_library import DEVICE  # isort: skip - before any kernel is defined

from moefold.experts import Experts, ExpertWeights
from moefold.experts.backends import triton as ours
from moefold.experts.backends.reference import ReferenceBackend
from moefold.experts.backends.triton import ACTIVATIONS, TritonBackend
from moefold.ops import kernels
from moefold.routing import SparseRouting
from moefold.testing import BACKEND_CHECKS, check_backend
from moefold.testing.mixers import MIX_CHECKS
from moefold.testing.problems import BackendCase, equals_reference, problem, tensors_of
from tests.ops.triton_interpreter import rounding
from tests.routers.common import untyped

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

BACKEND = TritonBackend()
TOKENS, EXPERTS, DIM, WIDTH = 23, 5, 40, 24


@pytest.fixture(autouse=True)
def _ready(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "everywhere", True)
    torch.use_deterministic_algorithms(True)  # fills memory that nobody wrote with NaN
    yield
    torch.use_deterministic_algorithms(False)


def routing_of(chosen: Tensor, spare: int = 0) -> SparseRouting:
    """A routing of one sequence with random weights, and some spare rows."""
    pairs = chosen.unsqueeze(0)
    weights = torch.rand(pairs.shape) + 0.5
    made = SparseRouting.from_choice(pairs, weights, most_rows=int(chosen.sum()))
    return replace(
        made,
        token_of_row=nn.functional.pad(made.token_of_row, (0, spare)).to(DEVICE),
        weight_of_row=nn.functional.pad(made.weight_of_row, (0, spare)).to(DEVICE),
        rows_per_expert=made.rows_per_expert.to(DEVICE),
    )


def chosen(layout: str) -> Tensor:
    """Which of the tokens has a row of which expert."""
    if layout.startswith("k="):
        best = torch.rand(TOKENS, EXPERTS).topk(int(layout[2:]), 1).indices
        return torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, best, True)
    every = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    if layout == "any number":
        every = torch.rand(TOKENS, EXPERTS) < 0.4
        every[::4] = False  # dropped tokens
        every[:, 1] = False  # an expert without a row
    elif layout == "one row":
        every[17, 3] = True
    elif layout == "all to the last expert":
        every[:, -1] = True
    return every


LAYOUTS = ("k=1", "k=2", "k=5", "any number", "one row", "all to the last expert", "no row")


def experts_of(dtype: torch.dtype, **kind) -> ExpertWeights:
    """Weights that make results of order 1 out of tokens of order 1."""
    made = Experts(EXPERTS, DIM, WIDTH, **kind, device=DEVICE).weights
    drawn = {
        name: (torch.randn_like(t) * (t.shape[-1] ** -0.5 if t.ndim == 3 else 1.0)).to(dtype)
        for name, t in tensors_of(made).items()
    }
    return replace(made, **drawn)


def leaves_of(x: Tensor, routing: SparseRouting, weights: ExpertWeights) -> dict[str, Tensor]:
    return {"x": x, "weight_of_row": routing.weight_of_row, **tensors_of(weights)}


def as_leaves(x, routing, weights, dtype) -> tuple[Tensor, SparseRouting, ExpertWeights]:
    """The same numbers in another dtype, as leaves that want a gradient."""

    def leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.detach().to(dtype, copy=True).requires_grad_()

    of_row = torch.float64 if dtype == torch.float64 else torch.float32
    moved = {name: leaf(tensor, dtype) for name, tensor in tensors_of(weights).items()}
    return (
        leaf(x, dtype),
        replace(routing, weight_of_row=leaf(routing.weight_of_row, of_row)),
        replace(weights, **moved),
    )


def by_definition(x: Tensor, routing: SparseRouting, weights: ExpertWeights) -> Tensor:
    rows = routing.dispatch(x.unsqueeze(0))
    rows = ReferenceBackend().compute(rows, routing.rows_per_expert, weights)
    return routing.combine(rows).squeeze(0)


def solve(mix, given, back: Tensor) -> dict[str, Tensor]:
    """The result and all gradients."""
    for leaf in leaves_of(*given).values():
        leaf.grad = None  # of whoever was asked before
    out = mix(*given)
    out.backward(back.to(out.dtype))
    found = {name: leaf.grad for name, leaf in leaves_of(*given).items()}
    assert not [name for name, grad in found.items() if grad is None]
    return {"result": out.detach(), **{n: g for n, g in found.items() if g is not None}}


def distance(found: Tensor, wanted: Tensor) -> float:
    """The error as a part of the length of all numbers together; what is zero must be exact."""
    length, error = wanted.norm(), (found.double() - wanted).norm()
    return float(error / length if length > 0 else torch.where(error == 0, 0.0, float("inf")))


def limit(dtype: torch.dtype) -> float:
    """What rounding explains.

    A gradient passes at most four stored tensors: `pre`, what is made of it, a row, the sum of
    rows. If every number of one is off by at most a part of itself, all of them together are by at
    most that part of their length. Three sums of at most 64 terms in float32 add sqrt(64) roundings
    each, as random walks.
    """
    return 4 * rounding(dtype) + 3 * 64**0.5 * 2**-24


@pytest.mark.slow
def test_contract():
    skipped = check_backend(BACKEND, device=DEVICE).skipped
    assert set(skipped) == {"float64", "compiles", "mixing: compiles"}


# What takes longest in the interpreter; below, fewer problems of the same kind.
LONG = ("float32", "bfloat16", "every activation", "mixing: values and gradients")


@pytest.mark.parametrize("name", [n for n in {**BACKEND_CHECKS, **MIX_CHECKS} if n not in LONG])
def test_contract_in_part(name):
    case = BackendCase(backend=BACKEND, device=DEVICE)
    refused = {**BACKEND_CHECKS, **MIX_CHECKS}[name](case)
    assert (refused is not None) == (name == "float64" or name.endswith("compiles"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_compute_is_the_reference(gated, dtype):
    given = problem((33, 7, 0, 64), DIM, WIDTH, gated=gated, bias=True, spare=5, device=DEVICE)
    equals_reference(BACKEND, given, dtype, "with spare rows")


@pytest.mark.compile
def test_contract_compiled():
    case = BackendCase(backend=BACKEND, device=DEVICE, compile=True)
    for check in (BACKEND_CHECKS["compiles"], MIX_CHECKS["mixing: compiles"]):
        assert check(case) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mix_is_the_definition(layout, dtype):
    gated, bias = layout in ("k=2", "any number", "one row"), layout in ("k=1", "any number")
    x = torch.randn(TOKENS, DIM, device=DEVICE).to(dtype)
    routing = routing_of(chosen(layout), spare=0 if layout == "k=1" else 6)
    given = x, routing, experts_of(dtype, gated=gated, bias=bias)
    back = torch.randn(TOKENS, DIM, device=DEVICE).to(dtype)
    wanted = solve(by_definition, as_leaves(*given, torch.float64), back)
    found = solve(BACKEND.mix, as_leaves(*given, dtype), back)
    assert list(found) == list(wanted)
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if name == "weight_of_row" else dtype)
        assert distance(tensor, wanted[name]) < limit(dtype), name
    # exactly nothing: tokens without a row, experts without one, spare rows
    without = ~chosen_of(routing).any(1)
    assert (found["result"][without] == 0).all()
    assert (found["x"][without] == 0).all()
    for name in tensors_of(given[2]):
        assert (found[name][routing.rows_per_expert == 0] == 0).all(), name
    assert (found["weight_of_row"][int(routing.rows_per_expert.sum()) :] == 0).all()


def chosen_of(routing: SparseRouting) -> Tensor:
    return routing.chosen.squeeze(0)


def test_mix_in_float16():
    for name in ACTIVATIONS[::3]:
        routing = routing_of(chosen("any number"))
        given = (
            torch.randn(TOKENS, DIM, device=DEVICE).half(),
            routing,
            experts_of(torch.float16, gated=True, activation=name),
        )
        back = torch.randn(TOKENS, DIM, device=DEVICE)
        wanted = solve(by_definition, as_leaves(*given, torch.float64), back)
        found = solve(BACKEND.mix, as_leaves(*given, torch.float16), back)
        for part, tensor in found.items():
            assert distance(tensor, wanted[part]) < limit(torch.float16), (name, part)


def test_mix_is_compute_with_dispatch_and_combine():
    given = (
        torch.randn(TOKENS, DIM, device=DEVICE),
        routing_of(chosen("any number"), spare=4),
        experts_of(torch.float32, bias=True),
    )
    x, routing, weights = given
    rows = BACKEND.compute(routing.dispatch(x.unsqueeze(0)), routing.rows_per_expert, weights)
    wanted = routing.combine(rows).squeeze(0).double()
    # the same rows; only their sum may have another order
    assert distance(BACKEND.mix(*given), wanted) < 8 * 2**-24


def test_spare_rows_may_name_any_token_and_weight():
    x, weights = torch.randn(TOKENS, DIM, device=DEVICE), experts_of(torch.float32, bias=True)
    routing = routing_of(chosen("any number"), spare=9)
    used = int(routing.rows_per_expert.sum())
    token, weight = routing.token_of_row.clone(), routing.weight_of_row.clone()
    token[used:], weight[used:] = 7, float("nan")
    other = replace(routing, token_of_row=token, weight_of_row=weight)
    back = torch.randn(TOKENS, DIM, device=DEVICE)
    one = solve(BACKEND.mix, as_leaves(x, routing, weights, torch.float32), back)
    two = solve(BACKEND.mix, as_leaves(x, other, weights, torch.float32), back)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_rows_may_be_a_column_of_pairs():
    # as `SparseRouting.from_choice` leaves them where it may not wait for the device
    x, weights = torch.randn(TOKENS, DIM, device=DEVICE), experts_of(torch.float32)
    routing = routing_of(chosen("k=2"))
    token, weight = (
        torch.stack([t, torch.full_like(t, 3)], 1)[:, 0]
        for t in (routing.token_of_row, routing.weight_of_row)
    )
    assert not token.is_contiguous()
    back = torch.randn(TOKENS, DIM, device=DEVICE)
    wanted = solve(BACKEND.mix, as_leaves(x, routing, weights, torch.float32), back)
    other = replace(routing, token_of_row=token, weight_of_row=weight.detach().requires_grad_())
    given = x.clone().requires_grad_(), other, as_leaves(x, routing, weights, torch.float32)[2]
    found = solve(BACKEND.mix, given, back)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_twice_gives_the_same_bits():
    x, weights = torch.randn(TOKENS, DIM, device=DEVICE), experts_of(torch.bfloat16, bias=True)
    given = x, routing_of(chosen("k=5")), weights
    back = torch.randn(TOKENS, DIM, device=DEVICE)
    one, two = (solve(BACKEND.mix, as_leaves(*given, torch.bfloat16), back) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def kept_by(call: Callable[[], Tensor]) -> list[Tensor]:
    """What is kept for the backward pass."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return kept


@pytest.mark.parametrize("gated", [False, True])
def test_nothing_of_the_size_of_all_rows_is_kept_but_the_first_products(gated):
    weights = experts_of(torch.float32, gated=gated, bias=True)
    for k in (1, 4):
        given = as_leaves(
            torch.randn(TOKENS, DIM, device=DEVICE),
            routing_of(chosen(f"k={k}")),
            weights,
            torch.float32,
        )
        kept = kept_by(lambda given=given: BACKEND.mix(*given))
        rows, wide = k * TOKENS, 2 * WIDTH if gated else WIDTH
        own = {t.data_ptr() for t in (given[0], *tensors_of(given[2]).values())}
        sizes = sorted(t.numel() for t in kept if t.data_ptr() not in own)
        # counts, bounds of tokens, then tokens, weights and order of rows, and `pre`
        assert sizes == sorted([EXPERTS, TOKENS + 1, rows, rows, rows, rows * wide])
    with torch.no_grad():
        given[0].requires_grad_(False)
        pre = ours._mix(*_arguments(*given), False)[1]
    assert pre.shape[0] == 0


def _arguments(x: Tensor, routing: SparseRouting, weights: ExpertWeights) -> tuple:
    return (
        x,
        routing.weight_of_row,
        routing.token_of_row,
        routing.rows_per_expert,
        weights.up,
        weights.down,
        weights.up_bias,
        weights.down_bias,
        weights.gated,
        weights.activation,
    )


def test_a_weight_of_row_in_float64_gets_its_gradient_so():
    x, weights = torch.randn(TOKENS, DIM, device=DEVICE), experts_of(torch.float32)
    routing = routing_of(chosen("k=2"))
    weight = routing.weight_of_row.double().requires_grad_()
    BACKEND.mix(x, replace(routing, weight_of_row=weight), weights).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float64


# What it refuses.


def reasons(rows: Tensor, **kind) -> list[str]:
    with untyped():
        return BACKEND.reasons_against(rows, replace(experts_of(torch.float32), **kind))


OLD = "its bfloat16 products need a device of compute capability 8.0 or more"


class OnCuda:
    """What a tensor on a GPU says of itself."""

    device = torch.device("cuda:0")
    dtype = torch.bfloat16


def test_reasons(monkeypatch):
    rows = torch.zeros(3, DIM, device=DEVICE)
    assert reasons(rows) == []
    (reason,) = reasons(rows.double())
    assert reason == "it adds up in float32, for bfloat16, float16, float32, not for torch.float64"
    (reason,) = reasons(rows, activation="mish")
    assert reason.startswith("it has kernels for gelu, gelu_tanh, identity, ")
    assert reason.endswith(", not for mish")
    assert len(reasons(rows, activation=torch.sin)) == 1
    assert reasons(rows.to("meta")) == ["it is for cuda, and the rows are on meta"]
    monkeypatch.setattr(kernels, "everywhere", False)
    assert reasons(rows.cpu()) == ["it is for cuda, and the rows are on cpu"]
    monkeypatch.setattr(ours, "_INSTALLED", False)
    assert reasons(rows.to("meta"))[0] == "triton is not installed (pip install triton, on Linux)"


def test_reasons_on_old_devices(monkeypatch):
    rows = OnCuda()
    for major, count in ((7, 1), (8, 0)):
        properties = SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        found = reasons(rows)  # pyright: ignore[reportArgumentType]
        assert len(found) == count
        assert all(r == OLD for r in found)


# Compiled.


@pytest.mark.compile  # it traces with symbolic sizes, which the typing hook takes for wrong types
def test_operators_are_registered_right():
    x, routing, weights = as_leaves(
        torch.randn(TOKENS, DIM, device=DEVICE),
        routing_of(chosen("k=2")),  # no spare rows: what is kept of them is unwritten memory
        experts_of(torch.float32, gated=True, bias=True),
        torch.float32,
    )
    arguments = _arguments(x, routing, weights)
    operator = torch.ops.moefold.triton_experts.default
    torch.library.opcheck(operator, (*arguments, True))
    rows = routing.dispatch(x.unsqueeze(0)).detach().requires_grad_()
    torch.library.opcheck(operator, (rows, None, None, *arguments[3:], True))
    out, *kept = operator(*arguments, True)
    torch.library.opcheck(
        torch.ops.moefold.triton_experts_backward.default,
        (
            torch.randn_like(out),
            *(t.detach() for t in (*arguments[:6], arguments[7], *kept)),
            "silu",
            [True] * 6,
        ),
    )


@pytest.mark.compile
def test_compiles_into_one_graph_for_all_counts():
    torch.compiler.reset()
    compiled = torch.compile(BACKEND.mix, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    weights = experts_of(torch.float32, bias=True)
    for layout in ("k=2", "any number", "k=1"):
        pairs = chosen(layout)
        routing = routing_of(pairs, spare=EXPERTS * TOKENS - int(pairs.sum()))
        x = torch.randn(TOKENS, DIM, device=DEVICE)
        back = torch.randn(TOKENS, DIM, device=DEVICE)
        wanted = solve(BACKEND.mix, as_leaves(x, routing, weights, torch.float32), back)
        found = solve(compiled, as_leaves(x, routing, weights, torch.float32), back)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
