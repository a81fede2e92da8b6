"""Compiled layers compute what eager ones do: every router, half precision, any shape, recorded.

Runs by itself (`pytest -m compile`), without the typing hook, which sees wrong types under
torch.compile. Most of it uses the backend "aot_eager", which traces forward and backward and runs
what it traced; where speed would come from, "inductor", is tried on a few.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from moefold import MoE, MoEConfig, record_routing, routers
from moefold.experts import AbstractBackend, AbstractMixer, backends
from moefold.experts.backends import PRIORITY
from moefold.experts.backends.fused import FusedBackend
from moefold.experts.backends.reference import ReferenceBackend
from moefold.losses import balance
from moefold.metrics import metrics
from moefold.routers import AbstractRouter, RouterConfig
from moefold.routing import Routing, SparseRouting
from moefold.testing import (
    BACKEND_CHECKS,
    LAYER_CHECKS,
    MIX_CHECKS,
    ROUTER_CHECKS,
    check_router,
)
from moefold.testing.contract import run
from moefold.testing.layer_probe import layer_case
from moefold.testing.probe import RouterCase
from moefold.testing.problems import SLACK, BackendCase, error_of, floor

pytestmark = [
    pytest.mark.compile,
    # torch.compile itself instantiates what it traces (torch 2.13, autograd functions).
    pytest.mark.filterwarnings(
        "ignore:.*torch.autograd.function.Function.* should not be instantiated:DeprecationWarning"
    ),
]

# Quick settings: what takes long to trace is a loop that is unrolled.
QUICK = {
    name: {"iterations": 3}
    for name in (
        "sinkhorn-token-choice",
        "sinkhorn-expert-choice",
        "sparse-transport-expert-choice",
    )
}
TOP_2 = routers.config("token-choice", k=2, renormalize=True)
EXPERT_CHOICE = routers.config("expert-choice")
UNIFIED = routers.config("unified", budget=1.5)
SOFT = routers.config("soft", slots=2)
CLOSELY = [routers.config("token-choice", k=1), TOP_2, EXPERT_CHOICE, UNIFIED, SOFT]
OTHERS = [
    routers.config("token-choice", capacity_factor=0.5, priority="gate"),
    routers.config("threshold"),
    routers.config("bias-balanced"),
    routers.config("sinkhorn-token-choice", iterations=3, capacity_factor=1.0),
]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def layer_of(router: RouterConfig, **settings: Any) -> MoE:
    torch.manual_seed(0)
    config = MoEConfig(**{"num_experts": 4, "expert_width": 8, "router": router, **settings})
    return config.build(6, site="layer.3")


def compiled(module: nn.Module, backend: str = "aot_eager") -> tuple[Callable, Any]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, fullgraph=True, backend=counter), counter


def chosen(routing: Routing) -> Tensor:
    assert isinstance(routing, SparseRouting)
    return routing.chosen


def logits(routing: Routing) -> Tensor:
    assert routing.logits is not None
    return routing.logits


def some(*shape: int, padded: bool = True) -> tuple[Tensor, Tensor | None]:
    mask = torch.rand(shape) < 0.7
    return torch.randn(*shape, 6), mask if padded else None


# Every router, in training, with losses on board.


@pytest.mark.parametrize("name", sorted(set(routers.names()) - {"base", "compete"}))
def test_every_router_compiles_in_a_layer(name: str):
    config = MoEConfig(
        num_experts=5,
        expert_width=6,
        router=routers.config(name, **QUICK.get(name, {})),
        gated=True,
        bias=True,
        activation="silu",
        shared_width=3,
    )
    case = layer_case(config, ids=name == "hash", compile=True)
    report = run(name, {"compiles": LAYER_CHECKS["compiles"]}, case)
    assert report.ran == ("compiles",)


def test_balanced_assignment_compiles_in_evaluation_and_says_so_in_training():
    layer = layer_of(routers.config("base")).eval()
    x, mask = some(2, 5)
    call, _ = compiled(layer)
    assert torch.equal(call(x, mask), layer(x, mask))
    layer.train()
    with pytest.raises(Exception, match="compile the model in eval mode, or train it in eager"):
        call(x, mask)


@pytest.mark.parametrize("name", backends.names())
def test_every_backend_compiles_or_says_why_not(name: str):
    case = BackendCase(backend=backends.get(name), device="cpu", compile=True)
    report = run(name, {"compiles": BACKEND_CHECKS["compiles"]}, case)
    if name == "reference":
        assert "it reads rows_per_expert on the host" in report.skipped["compiles"]
    elif name in PRIORITY:
        assert report.ran == ("compiles",)
    if report.ran and isinstance(case.backend, AbstractMixer):
        assert run(name, {"mix": MIX_CHECKS["mixing: compiles"]}, case).ran == ("mix",)


# That these checks can fail.


class ReadsItsData(AbstractRouter):
    """Chooses on the host, which cannot be traced."""

    def forward(self, x, mask=None, ids=None):
        chosen = torch.zeros(*x.shape[:2], self.num_experts, dtype=torch.bool)
        chosen[..., 0 if x.sum().item() > 0 else 1] = True
        chosen = chosen if mask is None else chosen & mask.unsqueeze(-1)
        return SparseRouting.from_choice(chosen, chosen.to(x.dtype), mask=mask)


class ForgetsItsGradient(AbstractRouter):
    """Learns in eager mode only."""

    def __init__(self, dim: int, num_experts: int):
        super().__init__(dim, num_experts)
        self.weight = nn.Parameter(torch.randn(num_experts, dim))

    def forward(self, x, mask=None, ids=None):
        scores = (x @ self.weight.t()).softmax(-1)
        if torch.compiler.is_compiling():
            scores = scores.detach()
        chosen = scores > 0.2
        chosen = chosen if mask is None else chosen & mask.unsqueeze(-1)
        return SparseRouting.from_choice(chosen, scores, mask=mask)


@pytest.mark.parametrize(
    ("router", "says"),
    [(ReadsItsData, "raised .*data-dependent"), (ForgetsItsGradient, "compiling loses a gradient")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_router_that_does_not_compile_is_caught(router: type[AbstractRouter], says: str):
    case = RouterCase(make=router, dim=7, num_experts=5, compile=True)
    with pytest.raises(AssertionError, match=f"compiles: {says}"):
        run("router", {"compiles": ROUTER_CHECKS["compiles"]}, case)


def test_one_call_compiles_a_router():
    assert "compiles" in check_router("unified", compile=True).ran


def test_a_backend_that_does_not_compile_is_caught():
    class LosesAGradient(AbstractBackend):
        def reasons_against(self, rows, weights):
            return []

        def compute(self, rows, rows_per_expert, weights):
            if torch.compiler.is_compiling():
                rows = rows.detach()
            return ReferenceBackend().compute(rows, rows_per_expert, weights)

    case = BackendCase(backend=LosesAGradient(), device="cpu", compile=True)
    with pytest.raises(AssertionError, match="compiling loses the gradient of rows"):
        run("backend", {"compiles": BACKEND_CHECKS["compiles"]}, case)


def test_a_mixer_that_does_not_compile_is_caught():
    class LosesAGradient(AbstractMixer):
        def reasons_against(self, rows, weights):
            return []

        def compute(self, rows, rows_per_expert, weights):
            return FusedBackend().compute(rows, rows_per_expert, weights)

        def mix(self, x, routing, weights):
            if torch.compiler.is_compiling():
                x = x + 1e-3 * x.detach()
            return FusedBackend().mix(x, routing, weights)

    case = BackendCase(backend=LosesAGradient(), device="cpu", compile=True)
    with pytest.raises(AssertionError, match="compiling changes the result"):
        run("backend", {"compiles": MIX_CHECKS["mixing: compiles"]}, case)


def test_a_layer_that_does_not_compile_is_caught(monkeypatch: pytest.MonkeyPatch):
    case = layer_case(MoEConfig(num_experts=5, expert_width=6), compile=True)
    monkeypatch.setattr(MoE, "hand_over", lambda self, routing: self.sinks and print(routing))
    with pytest.raises(AssertionError, match="compiles: "):
        run("layer", {"compiles": LAYER_CHECKS["compiles"]}, case)


# Spare rows: a graph cannot know how many rows there will be.


def test_spare_rows_count_nowhere():
    layer = layer_of(routers.config("token-choice", capacity_factor=0.5, k=2))
    x, mask = some(3, 8)
    call, _ = compiled(layer)
    with record_routing(layer) as record:
        assert torch.allclose(call(x, mask), layer(x, mask), atol=1e-6)
    fast, plain = record[""]
    assert isinstance(fast, SparseRouting)
    assert isinstance(plain, SparseRouting)
    used = int(plain.rows_per_expert.sum())
    assert plain.token_of_row.shape == (used,)
    assert fast.token_of_row.shape == (3 * 8 * 2,), "as many rows as there could ever be"
    assert (fast.expert_of_row[used:] == 4).all()
    assert (fast.weight_of_row[used:] == 0).all()
    assert torch.equal(fast.token_of_row[:used], plain.token_of_row)
    assert torch.equal(fast.rows_per_expert, plain.rows_per_expert)
    assert torch.equal(fast.chosen, plain.chosen)
    assert metrics(fast) == pytest.approx(metrics(plain), abs=1e-6)
    assert balance(fast).item() == pytest.approx(balance(plain).item(), abs=1e-6)


def test_spare_rows_may_be_made_of_broken_padding():
    # Spare rows are copies of token 0. Here it is padding, and holds NaN.
    layer = layer_of(routers.config("token-choice", capacity=1), gated=True, bias=True)
    x, mask = some(2, 6)
    assert mask is not None
    mask[0, 0] = False
    x = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    call, _ = compiled(layer)
    y = call(x, mask)
    assert torch.allclose(y, layer(x, mask), atol=1e-6)
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all(), name


# Numbers: the eager layer, and the reference loop. One graph for any number of tokens, and one more
# for inference, which keeps nothing for a backward pass.


def numbers(
    layer: MoE, call: Callable, x: Tensor, mask: Tensor | None, *, autocast: bool = False
) -> dict[str, Tensor]:
    """The result, and in training every gradient."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_(layer.training)
    low = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with low, torch.set_grad_enabled(layer.training):
        y = call(leaf, mask)
    if not layer.training:
        return {"result": y}
    back = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape)
    (y.double() * back).square().sum().backward()
    named = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    assert leaf.grad is not None
    return {"result": y.detach(), "gradient of x": leaf.grad, **named}


def same_numbers(layer: MoE, call: Callable, x: Tensor, mask: Tensor | None) -> None:
    """Raise unless a traced graph gives the layer's own bits: it runs the same operators."""
    want, found = (numbers(layer, each, x, mask) for each in (layer, call))
    assert set(found) == set(want)
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def exact_numbers(router: RouterConfig, dtype: torch.dtype, backend: str) -> MoE:
    """A layer of numbers that bfloat16 can hold: whatever computes it, it is the same one."""
    layer = layer_of(router, gated=True, bias=True, shared_width=4, backend=backend)
    return layer.bfloat16().to(dtype)


@pytest.mark.parametrize(
    ("backend", "router", "precision"),
    [
        *(("aot_eager", router, p) for router in CLOSELY for p in ("float32", "bfloat16")),
        *(("aot_eager", router, "autocast") for router in (TOP_2, SOFT)),
        ("inductor", TOP_2, "float32"),
        ("inductor", EXPERT_CHOICE, "autocast"),
        ("inductor", UNIFIED, "bfloat16"),
    ],
    ids=str,
)
# Else dynamic=True takes settings that are fractions for unknowns too, finds that it cannot use
# that, and traces everything a second time (torch 2.13); `test_any_shape` lets it.
@torch._dynamo.config.patch(specialize_float=True)
def test_one_graph_computes_what_the_reference_does(
    backend: str, router: RouterConfig, precision: str
):
    autocast = precision == "autocast"
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    rounded = torch.float32 if precision == "float32" else torch.bfloat16
    layer = exact_numbers(router, dtype, "auto")
    loop = exact_numbers(router, dtype, "reference")
    truth = exact_numbers(router, torch.float64, "reference")
    counter = CompileCounterWithBackend(backend)
    call = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for training in (True, False):
        for each in (layer, loop, truth):
            each.train(training)
        for shape in ((2, 5), (3, 9), (2, 23)):
            x, mask = some(*shape)
            assert mask is not None
            # Nothing may come of what padding holds.
            x = x.bfloat16().masked_fill(~mask.unsqueeze(-1), float("nan")).to(dtype)
            found = numbers(layer, call, x, mask, autocast=autocast)
            eager = numbers(layer, layer, x, mask, autocast=autocast)
            usual = numbers(loop, loop, x, mask, autocast=autocast)
            want = numbers(truth, truth, x.double(), mask)
            assert set(found) == set(eager) == set(usual) == set(want)
            for name, exact in want.items():
                assert found[name].dtype == eager[name].dtype == usual[name].dtype, name
                # Another order of sums changes rounding by a small factor, see testing.problems.
                limit = SLACK * error_of(usual[name], exact) + floor(rounded)
                assert error_of(eager[name], exact) <= limit, name
                assert error_of(found[name], exact) <= limit, name
                # The same operators, one after another; only autocast casts elsewhere.
                if backend == "aot_eager" and not autocast:
                    assert torch.equal(found[name], eager[name]), name
    assert counter.frame_count == 2
    for graph in counter.graphs:
        operators = {str(node.target) for node in graph.graph.nodes}
        assert "moefold.fused_experts.default" in operators


@pytest.mark.parametrize("router", [TOP_2, UNIFIED], ids=str)
def test_one_token_or_none(router: RouterConfig):
    layer = exact_numbers(router, torch.float32, "auto")
    call, _ = compiled(layer)
    for shape in ((1, 1), (2, 0)):
        same_numbers(layer, call, *some(*shape))


# Precision.


@pytest.mark.parametrize("router", OTHERS, ids=str)
def test_bfloat16_layers_compile(router: RouterConfig):
    layer = exact_numbers(router, torch.bfloat16, "auto")
    call, _ = compiled(layer)
    x, mask = some(2, 9)
    same_numbers(layer, call, x.bfloat16(), mask)


def test_autocast_compiles():
    layer = layer_of(routers.config("token-choice", k=2), gated=True, shared_width=4)
    x, mask = some(2, 9)
    call, _ = compiled(layer)
    with torch.autocast("cpu", torch.bfloat16), record_routing(layer) as record:
        low, want = call(x, mask), layer(x, mask)
    assert low.dtype == want.dtype == torch.bfloat16
    assert torch.equal(chosen(record[""][0]), chosen(record[""][1]))
    assert torch.allclose(
        low.float(), want.float(), atol=4 * 2**-8 * float(want.detach().abs().max())
    )


# Inductor: generated code, in training, with losses and padding.


@pytest.mark.parametrize(
    "router",
    [
        routers.config("token-choice", capacity_factor=1.0, k=2),
        routers.config("soft"),
    ],
    ids=str,
)
def test_inductor_equals_eager(router: RouterConfig):
    found = []
    for fast in (False, True):
        layer = layer_of(router, shared_width=4, losses={"balance": 0.1, "z": 0.1})
        call = compiled(layer, "inductor")[0] if fast else layer
        torch.manual_seed(1)
        x, mask = some(2, 9)
        x.requires_grad_()
        y = call(x, mask)
        y.square().sum().backward()
        gradients = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        found.append({"output": y.detach(), "gradient of x": x.grad, **gradients})
    eager, generated = found
    assert set(eager) == set(generated)
    for name, want in eager.items():
        # Float32 sums of some dozen terms, fused and ordered differently.
        assert (generated[name] - want).abs().max() < 1e-5 * (1 + want.abs().max()), name


# One compilation serves all.


@pytest.mark.parametrize("router", CLOSELY[1:] + OTHERS, ids=str)
def test_other_data_does_not_compile_anew(router: RouterConfig):
    layer = layer_of(router)
    call, counter = compiled(layer)
    x, mask = some(2, 6)
    assert mask is not None
    call(x, mask)
    alike = x[:1, :1].expand_as(x).clone()
    for data, kept in ((alike, mask), (x, torch.zeros_like(mask)), (5 * x, torch.ones_like(mask))):
        assert torch.allclose(call(data, kept), layer(data, kept), atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("router", OTHERS, ids=str)
def test_any_shape(router: RouterConfig):
    layer = layer_of(router)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 3), (2, 5), (4, 7)):
        x, mask = some(*shape)
        y = call(x, mask)
        assert torch.allclose(y, layer(x, mask), atol=1e-6)
        y.sum().backward()
    # A graph for any shape, and perhaps one for the first.
    assert counter.frame_count <= 2


def test_what_adapts_does_not_compile_anew():
    layer = layer_of(routers.config("bias-balanced", rate=0.5))
    call, counter = compiled(layer)
    x, _ = some(2, 6)
    states = set()
    for _ in range(4):
        states.add(tuple(layer.router.get_buffer("state").tolist()))
        with record_routing(layer) as record:
            assert torch.allclose(call(x), layer(x), atol=1e-6)
        assert torch.equal(chosen(record[""][0]), chosen(record[""][1]))
        record.update()
    assert counter.frame_count == 1
    assert len(states) > 1, "nothing was adapted"


# The record.


def test_many_passes_are_recorded_by_one_graph():
    # torch.compile gives up after eight compilations of the same function.
    layer = layer_of(routers.config("token-choice"), losses={})
    call, counter = compiled(layer)
    x, _ = some(1, 4)
    call(x)
    for _ in range(3):
        with record_routing(layer) as record:
            for scale in range(12):
                call(scale * x)
        for scale, routing in enumerate(record[""]):
            assert torch.allclose(logits(routing), scale * logits(record[""][1]), atol=1e-5)
        assert len(record[""]) == 12
    assert counter.frame_count == 2  # unheard and heard
    with record_routing(layer) as outer, record_routing(layer) as inner:
        call(x)
    assert len(outer[""]) == len(inner[""]) == 1


def test_losses_of_the_record_train_a_compiled_layer():
    gradients = []
    for fast in (False, True):
        layer = layer_of(routers.config("token-choice"), losses={}).double()
        call = compiled(layer)[0] if fast else layer
        torch.manual_seed(1)
        x, mask = some(2, 6)
        with record_routing(layer) as record:
            y = call(x.double(), mask)
        (y.square().sum() + record.loss(balance=1.0, z=0.5)).backward()
        gradients.append(layer.router.get_parameter("weight").grad)
    # Float64, traced and repeated operation by operation.
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)


class Checkpointed(nn.Module):
    def __init__(self, layer: MoE):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
def test_checkpointing_compiles_with_losses_on_board():
    gradients = []
    x, _ = some(2, 6)
    for fast in (False, True):
        layer = layer_of(routers.config("token-choice"), losses={"balance": 1.0}).double()
        model = Checkpointed(layer)
        call = compiled(model)[0] if fast else layer
        with record_routing(layer) as record:
            call(x.double()).square().sum().backward()
        assert len(record[""]) == 1
        gradients.append(layer.router.get_parameter("weight").grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)


# Errors.


def test_logits_that_are_not_finite_are_refused_in_a_graph():
    call, _ = compiled(layer_of(routers.config("token-choice")))
    x, _ = some(2, 3)
    call(x)
    with pytest.raises(RuntimeError, match=r"layer\.3: router logits are NaN or infinite"):
        call(x * float("nan"))


def test_bad_input_is_refused_while_compiling():
    call, _ = compiled(layer_of(routers.config("token-choice")))
    with pytest.raises(Exception, match="x has width 5, the router was built for dim=6"):
        call(torch.randn(2, 3, 5))
