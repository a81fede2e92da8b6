"""Experts: their definition, their layout, their first weights, and what they refuse."""

import pytest
import torch
from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moefold.experts import Experts
from moefold.experts.backends import PRIORITY
from tests.routers.common import untyped

each_backend = pytest.mark.parametrize("backend", [*PRIORITY, "auto"])


@each_backend
def test_two_experts_worked_by_hand(backend):
    # width 1: expert 0 is [1, 0] * relu([1, 1] . x), expert 1 is [0, 2] * relu([1, -1] . x)
    experts = Experts(2, 2, 1, gated=False, activation="relu")
    with torch.no_grad():
        experts.weights.up.copy_(torch.tensor([[[1.0, 1]], [[1, -1]]]))
        experts.down_proj.copy_(torch.tensor([[[1.0], [0]], [[0], [2]]]))
    rows = torch.tensor([[3.0, 4], [-3, 1], [5, 2], [2, 5], [9, 9]])
    # expert 0 has rows 0 and 1, expert 1 rows 2 and 3; row 4 is spare
    y = experts(rows, torch.tensor([2, 2]), backend)
    assert y.tolist() == [[7, 0], [0, 0], [0, 6], [0, 0], [0, 0]]


@each_backend
@pytest.mark.parametrize("bias", [False, True])
def test_gated_experts_are_what_they_say(backend, bias):
    experts = Experts(3, 5, 4, gated=True, bias=bias, activation="silu", dtype=torch.float64)
    counts = torch.tensor([2, 0, 3])
    rows = torch.randn(5, 5, dtype=torch.float64)
    w = experts.weights
    up_bias = torch.zeros(3, 8) if w.up_bias is None else w.up_bias
    down_bias = torch.zeros(3, 5) if w.down_bias is None else w.down_bias
    wanted = []
    for x, e in zip(rows, [0, 0, 2, 2, 2], strict=True):
        # rows of the gate come first, then those of what it gates
        gate = w.up[e, :4] @ x + up_bias[e, :4]
        value = w.up[e, 4:] @ x + up_bias[e, 4:]
        wanted.append(w.down[e] @ (gate / (1 + torch.exp(-gate)) * value) + down_bias[e])
    assert torch.allclose(experts(rows, counts, backend), torch.stack(wanted), atol=0, rtol=1e-12)


def test_layout_is_that_of_transformers():
    config = OlmoeConfig(hidden_size=12, intermediate_size=7, num_experts=4)
    config._experts_implementation = "eager"
    theirs = OlmoeExperts(config).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = Experts(4, 12, 7, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())  # strict: the same names and shapes
    tokens = torch.randn(20, 12, dtype=torch.float64)
    # top-1 with weight 1, tokens already sorted by expert: rows are tokens
    expert = torch.arange(4).repeat_interleave(torch.tensor([6, 0, 9, 5])).unsqueeze(1)
    wanted = theirs(tokens, expert, torch.ones(20, 1, dtype=torch.float64))
    found = ours(tokens, torch.tensor([6, 0, 9, 5]))
    assert torch.allclose(found, wanted, atol=0, rtol=1e-10)


def test_parameters_by_kind():
    def of(**kind: bool) -> dict[str, list[int]]:
        experts = Experts(3, 4, 5, **kind)  # pyright: ignore[reportArgumentType]
        return {name: list(p.shape) for name, p in experts.named_parameters()}

    assert of() == {"gate_up_proj": [3, 10, 4], "down_proj": [3, 4, 5]}
    assert of(gated=False) == {"up_proj": [3, 5, 4], "down_proj": [3, 4, 5]}
    assert of(bias=True) == {
        "gate_up_proj": [3, 10, 4],
        "down_proj": [3, 4, 5],
        "gate_up_proj_bias": [3, 10],
        "down_proj_bias": [3, 4],
    }
    assert of(gated=False, bias=True)["up_proj_bias"] == [3, 5]


@pytest.mark.parametrize("gated", [False, True])
def test_first_weights_are_those_of_a_linear_layer(gated):
    experts = Experts(6, 100, 400, gated=gated, bias=True)
    for name, parameter in experts.named_parameters():
        bound = (400 if name.startswith("down_proj") else 100) ** -0.5
        linear = nn.Linear(round(bound**-2), 10)
        assert linear.weight.abs().max() <= bound
        for expert in parameter:
            # n >= 100 uniform draws: none beyond the bound; the largest within 20 % of it but for
            # a chance of 0.8^100 = 2e-10, so a bound off by the number of experts cannot pass
            assert 0.8 * bound < expert.abs().max() <= bound
        # experts differ, or top-k could never tell them apart
        assert not torch.equal(parameter[0], parameter[1])


def test_forward_keeps_nothing():
    experts = Experts(3, 6, 4, bias=True)
    before = {name: t.clone() for name, t in experts.state_dict().items()}
    attributes = set(vars(experts))
    experts(torch.randn(9, 6), torch.tensor([4, 0, 5])).sum().backward()
    assert all(torch.equal(t, before[name]) for name, t in experts.state_dict().items())
    assert set(vars(experts)) == attributes


def test_autocast_computes_in_its_dtype_and_learns_in_float32():
    experts = Experts(3, 24, 16, bias=True)
    rows, counts = torch.randn(100, 24), torch.tensor([40, 0, 60])
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(rows, counts)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    grads = [p.grad for p in experts.parameters()]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
    exact = experts.double()(rows.double(), counts)
    # bfloat16 rounds to 2^-9 at input, weights, two products and the gate: under 2^-6 together
    assert (y - exact).norm() / exact.norm() < 2**-6


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="num_experts=0 is not possible; it must be at least 1"):
        Experts(0, 4, 4)
    with pytest.raises(ValueError, match="width=-3"):
        Experts(2, 4, -3)
    with pytest.raises(ValueError, match="unknown activation 'gulu'; did you mean 'gelu'"):
        Experts(2, 4, 4, activation="gulu")


def test_wrong_rows_are_named():
    experts, counts = Experts(2, 4, 3), torch.tensor([1, 2])
    with untyped():
        with pytest.raises(ValueError, match=r"rows are 5 wide, but these experts .* dim=4; build"):
            experts(torch.zeros(3, 5), counts)
        with pytest.raises(ValueError, match="has 3 counts, but there are 2 experts; router and"):
            experts(torch.zeros(3, 4), torch.tensor([1, 1, 1]))
        with pytest.raises(ValueError, match="bfloat16, but the experts torch"):
            experts(torch.zeros(3, 4, dtype=torch.bfloat16), counts)


def test_print_shows_the_geometry():
    assert "8 x 16 -> 32, gated=True, bias=False, activation=silu" in repr(Experts(8, 16, 32))


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("backend", ["auto", "grouped"])
def test_compiles_into_one_graph(backend, gated, dtype):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    experts = Experts(4, 24, 16, gated=gated, bias=True, activation="gelu", dtype=dtype)
    compiled = torch.compile(lambda rows, counts: experts(rows, counts, backend), fullgraph=True)
    for counts in ([30, 0, 40, 10], [0, 1, 79, 0], [20, 20, 20, 10]):
        rows = torch.randn(80, 24, dtype=dtype, requires_grad=True)
        grad = torch.randn(80, 24).to(dtype)
        of = [rows, *experts.parameters()]
        found = compiled(rows, torch.tensor(counts))
        wanted = experts(rows, torch.tensor(counts), backend)
        grads = torch.autograd.grad(found, of, grad)
        wanted_grads = torch.autograd.grad(wanted, of, grad)
        # "auto" compiles to the same operator. In "grouped" inductor fuses what lies between the
        # products and keeps float32 there, where eager code rounds to bfloat16 some five times.
        limit = 0 if backend == "auto" else {torch.float32: 1e-6, torch.bfloat16: 5 * 2**-9}[dtype]
        for one, other in zip((found, *grads), (wanted, *wanted_grads), strict=True):
            assert (one - other).double().norm() <= limit * other.double().norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.compile
def test_compiles_under_autocast():
    torch.compiler.reset()
    experts = Experts(3, 24, 16)
    rows, counts = torch.randn(70, 24), torch.tensor([30, 0, 40])
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(experts, fullgraph=True)(rows, counts)
        wanted = experts(rows, counts)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)
