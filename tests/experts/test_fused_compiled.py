"""The fused backend where compiled code computes: the contract of a mixer, and its choice.

Shapes: `tokens dim` in and out.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from moefold.experts import Experts
from moefold.experts.backends import fused_blocks, fused_ops, fused_workers
from moefold.experts.backends.fused import FusedBackend
from moefold.ops.cpu import experts
from moefold.ops.cpu.compiled import PAIRS, instructions
from moefold.ops.precise import work_dtype
from moefold.testing import BACKEND_CHECKS, MIX_CHECKS
from moefold.testing.mixers import mix_problem, solve_mix
from moefold.testing.problems import BackendCase
from tests.ops.compiled_here import needs_compiled_code

pytestmark = needs_compiled_code


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """How often each function ran."""
    torch.set_num_threads(1)
    count: Counter[str] = Counter()

    def counted(name):
        function = getattr(experts, name)

        def run(*given, **settings):
            count[name] += 1
            return function(*given, **settings)

        return run

    for name in ("forward", "backward", "activate", "differentiate"):
        monkeypatch.setattr(experts, name, counted(name))
    return count


@pytest.fixture(autouse=True)
def _poison_inside_operators():
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # fills memory that nobody wrote with NaN
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


# Not what compiled code has no part in, and not what the compiler of graphs takes minutes for.
CHECKS = {**BACKEND_CHECKS, **MIX_CHECKS}
for name in ("float64", "no rows", "compiles", "mixing: compiles"):
    del CHECKS[name]


@pytest.mark.parametrize("name", CHECKS)
def test_the_contract_holds(name, calls):
    case = BackendCase(backend=FusedBackend(), device="cpu")
    assert CHECKS[name](case) is None
    # A processor that multiplies bfloat16, but not in pairs.
    low = any(word in name for word in ("autocast", "bfloat16"))
    left_to_torch = low and work_dtype(torch.bfloat16) == torch.bfloat16
    left_to_torch = left_to_torch and PAIRS[0] not in instructions()
    assert (calls["forward"] == 0) == left_to_torch


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_that_lie_otherwise(calls, gated):
    # An expanded gradient, tokens that are columns.
    given = mix_problem((9, 0, 30), 40, 24, 20, gated=gated).to(torch.float32)
    want = solve_mix(FusedBackend().mix, given)
    x = given.x.detach().T.contiguous().T.requires_grad_()
    y = FusedBackend().mix(x, given.routing, given.weights)
    assert torch.equal(y, want["result"])
    ones = torch.ones(()).expand_as(y)
    (strided,) = torch.autograd.grad(y, x, ones, retain_graph=True)
    (plain,) = torch.autograd.grad(y, x, ones.contiguous())
    assert torch.equal(strided, plain)
    assert calls["backward"] > 0


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 1024], ids=["a block each", "one block"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("most", [0, 8, 9])
def test_large_experts_are_left_to_torch(most, gated, rows, threads, calls, monkeypatch):
    # Of 9, 0, 30 and 1 rows none, the last or all but one stay with compiled code; what is done
    # number by number is compiled for all.
    given = mix_problem((9, 0, 30, 1), 40, 24, 20, gated=gated, bias=True).to(torch.float32)
    want = solve_mix(FusedBackend().mix, given)
    assert not calls["activate"]
    monkeypatch.setattr(experts, "MOST_ROWS", most)
    monkeypatch.setattr(fused_blocks, "BLOCK_ROWS", rows)
    monkeypatch.setattr(fused_workers, "WORTH_IT", 0)
    torch.set_num_threads(threads)
    for name, got in solve_mix(FusedBackend().mix, given).items():
        torch.testing.assert_close(got, want[name], msg=name)
    large = sum(count > most for count in (9, 30, 1))
    blocks = large if rows == 1 or threads > 1 else 1
    assert calls["activate"] == calls["differentiate"] == blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_as_by_torch(dtype, calls, monkeypatch):
    if work_dtype(dtype) == dtype:
        pytest.skip("hidden rows are rounded too where the processor multiplies such numbers")
    given = mix_problem((9, 0, 30), 40, 24, 20, bias=True).to(dtype)
    got = solve_mix(FusedBackend().mix, given)
    assert calls["forward"] == calls["backward"] == 1
    monkeypatch.setattr(experts, "can_compute", lambda *_: False)
    for name, want in solve_mix(FusedBackend().mix, given).items():
        # Both compute in float32, where sums of up to 40 products err like a random walk, and round
        # once, so that at most one number lies between them.
        assert got[name].dtype == want.dtype, name
        exact, apart = want.double().abs(), (got[name].double() - want.double()).abs()
        walk = 8 * torch.finfo(torch.float32).eps * (3 * 40) ** 0.5 * exact.max()
        rounded = torch.finfo(want.dtype).eps * exact if want.dtype == dtype else 0.0
        assert (apart <= walk + rounded).all(), name
    assert calls["forward"] == 1


@pytest.mark.parametrize("forward", ["forward compiled", "forward by torch"])
@pytest.mark.parametrize("most", [8, 1024], ids=["both", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_one_keeps_the_other_reads(dtype, most, forward, calls, monkeypatch):
    # As when the number of threads is changed between the two passes.
    given = mix_problem((9, 0, 30, 1), 40, 24, 20, gated=True, bias=True)
    compiled = [forward == "forward compiled", forward != "forward compiled"]
    if work_dtype(dtype) == torch.bfloat16 and PAIRS[0] not in instructions():
        pytest.skip("nothing of bfloat16 is compiled here")
    monkeypatch.setattr(experts, "can_compute", lambda *_: bool(compiled) and compiled.pop(0))
    monkeypatch.setattr(experts, "MOST_ROWS", most)
    got = solve_mix(FusedBackend().mix, given.to(dtype))
    ran = {name for name in ("forward", "backward") if calls[name]}
    assert ran == ({"forward"} if forward == "forward compiled" else {"backward"})
    want = solve_mix(FusedBackend().mix, given.to(torch.float64))
    for name, exact in want.items():
        # As for experts in pairs (tests/ops/test_cpu_experts.py); sums in float32 err less.
        unit = 2**-8 if dtype == torch.bfloat16 else 16 * torch.finfo(dtype).eps
        error = (got[name].double() - exact).norm() / exact.norm()
        assert error <= 2 * unit * (5 / 3) ** 0.5, name


def test_training_and_inference_agree_to_the_bit(calls):
    given = mix_problem((9, 0, 30), 40, 24, 20).to(torch.float32)
    trained = FusedBackend().mix(given.x, given.routing, given.weights)
    with torch.inference_mode():
        assert torch.equal(FusedBackend().mix(given.x, given.routing, given.weights), trained)


def test_many_threads_leave_large_products_to_torch(calls, monkeypatch):
    given = mix_problem((9, 0, 30), 40, 24, 20).to(torch.float32)
    monkeypatch.setattr(fused_workers, "MOST_WORKERS", 1)
    torch.set_num_threads(2)
    FusedBackend().mix(given.x, given.routing, given.weights)
    assert calls["forward"] == 1  # there is too little to do
    monkeypatch.setattr(fused_workers, "WORTH_IT", 0)
    FusedBackend().mix(given.x, given.routing, given.weights)
    assert calls["forward"] == 1


def test_several_threads_compute_the_same(calls, monkeypatch):
    given = mix_problem((9, 0, 30, 12, 12, 40), 45, 24, 20, bias=True).to(torch.float32)
    alone = solve_mix(FusedBackend().mix, given)
    torch.set_num_threads(3)
    monkeypatch.setattr(fused_workers, "WORTH_IT", 0)
    calls.clear()
    shares, really = [], experts._run
    monkeypatch.setattr(
        experts,
        "_run",
        lambda given, own, *rest, **kind: shares.append(own) or really(given, own, *rest, **kind),
    )
    for name, got in solve_mix(FusedBackend().mix, given).items():
        # Sums of several threads are added in another order.
        torch.testing.assert_close(got, alone[name], msg=name)
    assert calls["forward"] == calls["backward"] == 1
    # Every expert once; the one without rows is work in the backward pass alone.
    assert shares == [[[5], [2], [0, 3, 4]], [[5], [1, 2], [0, 3, 4]]]


@pytest.mark.parametrize("most", [0, 12, 1024], ids=["by torch", "both", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_their_own_tokens_share_one_sum(dtype, most, calls, monkeypatch):
    torch.manual_seed(0)
    layer = Experts(6, 21, 20, bias=True, dtype=dtype)  # a width that ends within a lane
    w, counts = layer.weights, torch.tensor([9, 0, 30, 12, 2, 40])
    torch.set_num_threads(3)
    monkeypatch.setattr(experts, "MOST_ROWS", most)
    monkeypatch.setattr(fused_workers, "WORTH_IT", 0)
    shared, really = [], fused_ops._sums

    def made(*given):
        sums = really(*given)
        shared.append((len(sums), len({own.data_ptr() for own in sums})))
        return sums

    monkeypatch.setattr(fused_ops, "_sums", made)
    rows = torch.randn(95, 21).to(dtype).requires_grad_()  # two of them belong to nobody
    back = torch.randn(95, 21).to(dtype)
    leaves, found = (rows, *layer.parameters()), []
    for tokens in (None, torch.arange(95)):
        y = fused_ops.mix(
            rows, tokens, None, counts, w.up, w.down, w.up_bias, w.down_bias, True, "silu",
            dtype, True,
        )  # fmt: skip
        found.append([y, *torch.autograd.grad(y, leaves, back)])
    for own, indexed in zip(*found, strict=True):
        assert own.any()
        assert torch.equal(own, indexed)
    assert shared == [(3, 1), (3, 1), (3, 3), (3, 3)]


def test_an_index_that_points_elsewhere_is_refused(calls):
    given = mix_problem((9, 0, 30), 40, 24, 20).to(torch.float32)
    for wrong in (-1, 40):
        tokens = given.routing.token_of_row.clone()
        tokens[3] = wrong
        routing = replace(given.routing, token_of_row=tokens)
        with pytest.raises(ValueError, match=f"names token {wrong}, but there are 40"):
            FusedBackend().mix(given.x, routing, given.weights)


def test_an_index_that_lies_elsewhere_is_refused(calls):
    given = mix_problem((9, 0, 30), 40, 24, 20).to(torch.float32)
    routing = replace(given.routing, token_of_row=given.routing.token_of_row.to("meta"))
    with pytest.raises(ValueError, match="token_of_row is on meta, but its tokens are on the cpu"):
        FusedBackend().mix(given.x, routing, given.weights)


def test_counts_below_zero_are_refused(calls):
    given = mix_problem((9, 0, 30), 40, 24, 20).to(torch.float32)
    with pytest.raises(ValueError, match="no expert can have fewer than 0 rows"):
        FusedBackend().compute(given.x[:10], torch.tensor([-5, 0, 13]), given.weights)


def test_what_autograd_kept_may_come_back_otherwise(calls):
    given = mix_problem((9, 0, 30), 40, 24, 20).to(torch.float32)
    want = solve_mix(FusedBackend().mix, given)

    def other_layout(kept):
        return kept.T.contiguous().T if kept.ndim == 2 else kept

    with torch.autograd.graph.saved_tensors_hooks(other_layout, lambda kept: kept):
        got = solve_mix(FusedBackend().mix, given)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_a_gradient_of_another_kind_is_seen_by_the_dispatcher(calls):
    given = mix_problem((9, 0, 30), 40, 24, 20).to(torch.float32)
    y = FusedBackend().mix(given.x, given.routing, given.weights)
    back = TwoTensor(torch.ones_like(y), torch.ones_like(y) * 2)
    (got,) = torch.autograd.grad(y, given.x, back, retain_graph=True)
    (one,) = torch.autograd.grad(y, given.x, torch.ones_like(y))
    assert isinstance(got, TwoTensor)
    assert torch.equal(got.a, one)
    torch.testing.assert_close(got.b, 2 * one)


@pytest.mark.compile  # the typing hook writes out sizes, which tracing makes tensors of
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_traced_layer_computes(calls):
    given = mix_problem((9, 0, 30), 40, 24, 20).to(torch.float32)
    for leaf in given.leaves().values():
        leaf.requires_grad_(False)

    def mix(x):
        return FusedBackend().mix(x, given.routing, given.weights)

    x = given.x
    traced: Any = torch.jit.trace(mix, (x,), check_trace=False)
    assert torch.equal(traced(x), mix(x))


def test_forward_mode_is_refused(calls):
    given = mix_problem((9, 0, 30), 40, 24, 20).to(torch.float32)
    x = given.x.detach()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: FusedBackend().mix(x, given.routing, given.weights), (x,), (x,))


def test_parameters_elsewhere_are_refused():
    layer = Experts(3, 24, 20).to("meta")
    with pytest.raises(ValueError, match="it is for the cpu, and experts are on meta"):
        layer(torch.randn(5, 24), torch.tensor([2, 0, 3]), "fused")


def test_a_short_index_and_strided_biases_are_read_right(calls):
    given = mix_problem((9, 0, 30), 40, 24, 20, bias=True).to(torch.float32)
    want = FusedBackend().mix(given.x, given.routing, given.weights)
    tokens = given.routing.token_of_row.to(torch.int32)
    bias = given.weights.up_bias
    assert bias is not None
    apart = torch.stack([bias, bias], -1)[..., 0]
    assert apart.stride(-1) == 2
    weights = replace(given.weights, up_bias=apart)
    got = FusedBackend().mix(given.x, replace(given.routing, token_of_row=tokens), weights)
    assert torch.equal(got, want)


def test_numbers_that_are_not_written_out_yet_are_read_right(calls):
    given = mix_problem((9, 0, 30), 40, 24, 20).to(torch.float32)
    want = FusedBackend().mix(-given.x, given.routing, given.weights)
    negative = torch._neg_view(given.x)  # pyright: ignore[reportPrivateImportUsage]
    assert negative.is_neg()
    assert torch.equal(FusedBackend().mix(negative, given.routing, given.weights), want)


def test_memory_is_float32_on_the_cpu_whatever_the_defaults(calls):
    given = mix_problem((9, 0, 30), 40, 24, 20).to(torch.float32)

    def both():
        rows = FusedBackend().compute(given.x, given.routing.rows_per_expert, given.weights)
        return rows, FusedBackend().mix(given.x, given.routing, given.weights)

    want, before = both(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            got = both()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
