"""Operations are counted as they run, whatever computes them: a loop, one operator, a kernel."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from moefold import MoE, MoEConfig, routers
from moefold.experts import Experts
from moefold.ops import kernels
from moefold.ops.flops import flop_counter
from moefold.ops.soft import combine_reference, dispatch_reference

EXPERTS, DIM, WIDTH = 4, 6, 8
ROUTERS = [
    routers.config("token-choice", k=2, capacity_factor=0.5),
    routers.config("expert-choice"),
    routers.config("unified", budget=1.5),
    routers.config("soft", slots=2),
]


def counted(run, *args) -> tuple[int, int]:
    """Operations of a forward pass, and of the backward pass where there is one."""
    with flop_counter() as counter:
        made = run(*args)
        forward = counter.get_total_flops()
        if made.requires_grad:
            made.sum().backward()
    return forward, counter.get_total_flops() - forward


def test_a_grouped_product_costs_each_row_one_group():
    # 12 rows of width 16, in groups of 5, 0 and 7, with 16 x 8 weights for each group.
    rows = torch.randn(12, 16, requires_grad=True)
    weights = torch.randn(3, 16, 8, requires_grad=True)
    ends = torch.tensor([5, 5, 12], dtype=torch.int32)
    with flop_counter() as counter:
        made = torch.nn.functional.grouped_mm(rows, weights, offs=ends)
    assert counter.get_total_flops() == 2 * 12 * 16 * 8
    # Backward there are two products of the same size: for the rows and for the weights.
    with flop_counter() as counter:
        made.backward(torch.randn(12, 8))
    assert counter.get_total_flops() == 2 * (2 * 12 * 16 * 8)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_the_cpu_counts_whole(causal):
    q, k, v = torch.randn(3, 2, 4, 10, 8).unbind()  # 2 sequences, 4 heads, 10 tokens, width 8
    with flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # Scores and sums, each 10 x 10 x 8 products in each of the heads.
    assert counter.get_total_flops() == 2 * (2 * 2 * 4 * 10 * 10 * 8)


# Whole layers. The reference loop runs plain products, which torch counts.


def layer_of(
    router: routers.RouterConfig, backend: str, gated: bool, bias: bool
) -> tuple[MoE, Tensor]:
    torch.manual_seed(0)
    config = MoEConfig(
        num_experts=EXPERTS,
        expert_width=WIDTH,
        router=router,
        gated=gated,
        bias=bias,
        backend=backend,
        losses={},
    )
    return config.build(DIM), torch.randn(2, 9, DIM)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize(("gated", "bias"), list(product((False, True), repeat=2)))
@pytest.mark.parametrize("backend", ["auto", "fused", "grouped"])
def test_a_layer_costs_what_the_reference_loop_does(router, gated, bias, backend):
    def cost(backend: str) -> tuple[int, int]:
        layer, x = layer_of(router, backend, gated, bias)
        with_gradients = counted(layer, x.requires_grad_())
        with torch.no_grad():
            assert counted(layer, x) == (with_gradients[0], 0)
        return with_gradients

    extra = 0
    if backend == "grouped" and bias:
        # It adds biases by products of depth 8, and as many give their gradients.
        layer, x = layer_of(router, backend, gated, bias)
        wide = 2 * WIDTH if gated else WIDTH
        extra = 2 * int(layer.router(x).rows_per_expert.sum()) * 8 * (wide + DIM)
    forward, backward = cost("reference")
    assert backward == 2 * forward
    assert cost(backend) == (forward + extra, backward + extra)


@pytest.mark.parametrize("backend", ["fused", "grouped"])
@pytest.mark.parametrize("wanted", list(product((False, True), repeat=3))[1:])
def test_what_is_not_wanted_is_not_counted(backend, wanted):
    # Leaves: rows, the first matrices, the second ones. Spare rows are computed by nobody.
    counts, used, first, second = torch.tensor([3, 0, 4, 1]), 8, 2 * WIDTH * DIM, WIDTH * DIM

    def cost(backend: str) -> tuple[int, int]:
        experts, rows = Experts(EXPERTS, DIM, WIDTH), torch.randn(used + 5, DIM)
        for leaf, flag in zip([rows, *experts.parameters()], wanted, strict=True):
            leaf.requires_grad_(flag)
        return counted(experts, rows, counts, backend)

    for_rows, for_up, for_down = wanted
    products = second * (for_rows or for_up) + second * for_down + first * (for_rows + for_up)
    assert cost(backend) == cost("reference") == (2 * used * (first + second), 2 * used * products)


# Operators where nothing can be read, or no device is at hand.


def experts_operator(name: str, rows: Tensor, counts: Tensor) -> Tensor:
    """One of ours, for gated experts, from 9 tokens to 9 tokens."""
    x, weight = rows.new_zeros(9, DIM), rows.new_zeros(rows.shape[0])
    up, down = rows.new_zeros(EXPERTS, 2 * WIDTH, DIM), rows.new_zeros(EXPERTS, DIM, WIDTH)
    tokens = torch.zeros_like(rows[:, 0], dtype=torch.long)
    given = {
        "x": x,
        "token_of_row": tokens,
        "weight_of_row": weight,
        "rows_per_expert": counts,
        "up": up,
        "down": down,
        "up_bias": None,
        "down_bias": None,
        "gated": True,
        "activation": "silu",
        "dtype": torch.float32,
        "keep": True,
        "grad": x,
        "pre": rows.new_zeros(rows.shape[0], WIDTH),
        "value": rows.new_zeros(rows.shape[0], WIDTH),
        "order": tokens,
        "bounds": tokens,
        "wanted": [True, True, True, True, False, False],
    }
    operator = getattr(torch.ops.moefold, name)
    names = [argument.name for argument in operator.default._schema.arguments]
    return operator(*(given[name] for name in names))[0]


@pytest.mark.parametrize("kind", ["fused_experts", "triton_experts"])
def test_where_counts_are_not_data_every_row_of_the_list_counts(kind):
    longest, numbers = 11, 3 * WIDTH * DIM

    def costs(rows: Tensor, counts: Tensor) -> list[int]:
        names = (kind, f"{kind}_backward")
        return [counted(experts_operator, name, rows, counts)[0] for name in names]

    upper = [2 * longest * numbers, 4 * longest * numbers]
    meta = torch.zeros(longest, DIM, device="meta"), torch.zeros(EXPERTS, device="meta")
    assert costs(*meta) == upper
    with FakeTensorMode():
        assert costs(torch.zeros(longest, DIM), torch.tensor([3, 0, 4, 1])) == upper


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_grouped_products_count_rows_that_have_an_expert(device):
    rows = torch.zeros(11, DIM, device=device, requires_grad=True)
    weights = torch.zeros(EXPERTS, WIDTH, DIM, device=device, requires_grad=True)
    counts = torch.tensor([3, 0, 4, 1], device=device)
    used = 8 if device == "cpu" else 11
    one = 2 * used * WIDTH * DIM
    assert counted(torch.ops.moefold.grouped_mm, rows, weights, counts) == (one, 2 * one)


@pytest.mark.parametrize("to_rows", [True, False])
def test_soft_maps_by_kernels_cost_what_their_products_do(to_rows, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "everywhere", True)
    groups, members, slots = 2, 9, 3
    logits = torch.randn(groups, members, EXPERTS, slots)
    shape = (groups, members, DIM) if to_rows else (EXPERTS * groups * slots, DIM)
    values = torch.randn(shape)
    slow = dispatch_reference if to_rows else combine_reference
    wanted = counted(slow, logits.clone().requires_grad_(), values.clone().requires_grad_())
    assert wanted[0] == 2 * math.prod(logits.shape) * DIM

    def kernel(logits: Tensor, values: Tensor) -> Tensor:
        return torch.ops.moefold.soft_mix(logits, values, None, to_rows)[0]

    meta = (t.to("meta").requires_grad_() for t in (logits, values.reshape(-1, DIM)))
    assert counted(kernel, *meta) == wanted
