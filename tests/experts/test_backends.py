"""Backends: how one is chosen, and what the fused one does by hand.

That every backend computes what `reference` computes is the contract suite's claim
(`moefold.testing.check_backend`); here is what that suite cannot know.
"""

import threading
from dataclasses import replace
from itertools import product
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moefold.experts import (
    AbstractBackend,
    Experts,
    ExpertWeights,
    backends,
    choose_backend,
    explain_backends,
)
from moefold.experts.backends import (
    PRIORITY,
    fused_blocks,
    fused_ops,
    fused_parts,
    fused_workers,
)
from moefold.experts.backends.fused import FusedBackend
from moefold.experts.backends.fused_blocks import Blocks, room
from moefold.experts.backends.fused_hidden import WRITTEN
from moefold.experts.backends.fused_workers import run_on, share_out, workers_for
from moefold.experts.backends.grouped import GroupedBackend
from moefold.experts.backends.reference import ReferenceBackend
from moefold.ops.cpu import experts as cpu_experts
from moefold.ops.grouped import padded
from moefold.ops.precise import work_dtype
from moefold.testing import BACKEND_CHECKS, MIX_CHECKS
from moefold.testing.contract import run
from moefold.testing.mixers import mix_problem, solve_mix
from moefold.testing.problems import BackendCase
from tests.routers.common import untyped

ROWS = torch.zeros(3, 4)


def weights_of(**kind) -> ExpertWeights:
    return Experts(2, 4, 3, **kind).weights


@pytest.fixture(autouse=True)
def _poison_inside_operators():
    torch.use_deterministic_algorithms(True)  # fills memory that nobody wrote with NaN
    yield
    torch.use_deterministic_algorithms(False)


# The choice.


def test_the_first_that_can_run_is_chosen():
    assert PRIORITY == ("fused", "grouped", "reference")
    assert isinstance(choose_backend("auto", ROWS, weights_of()), FusedBackend)
    # fused has no derivative of tanh; on another device it is out of the question
    tanh = weights_of(activation="tanh")
    assert isinstance(choose_backend("auto", ROWS, tanh), GroupedBackend)
    assert isinstance(choose_backend("auto", ROWS.to("meta"), weights_of()), GroupedBackend)


def test_a_named_backend_is_taken():
    for name in PRIORITY:
        assert choose_backend(name, ROWS, weights_of()) is backends.get(name)


def test_a_named_backend_that_cannot_run_says_all_its_reasons():
    match = (
        "backend 'fused' cannot run here: it is for the cpu, and the rows are on meta; it knows "
        "the derivative of gelu, gelu_tanh, relu, silu, not of tanh. Choose another, or 'auto'"
    )
    with pytest.raises(ValueError, match=match):
        choose_backend("fused", ROWS.to("meta"), weights_of(activation="tanh"))


def test_an_unknown_backend_is_met_with_the_nearest():
    with pytest.raises(ValueError, match="unknown backend 'groupedd'; did you mean 'grouped'"):
        choose_backend("groupedd", ROWS, weights_of())


def test_when_none_can_run_all_say_why(monkeypatch):
    class Never(AbstractBackend):
        def reasons_against(self, rows, weights):
            return ["it is Monday", "it rains"]

        def compute(self, rows, rows_per_expert, weights):
            raise NotImplementedError

    monkeypatch.setattr(backends, "get", lambda name: Never())
    with pytest.raises(ValueError, match=r"fused: it is Monday; it rains\. grouped: it is Monday"):
        choose_backend("auto", ROWS, weights_of())


def test_the_whole_table_is_explained():
    verdicts = explain_backends(ROWS, weights_of(activation=torch.sin))
    assert [v.name for v in verdicts][:3] == list(PRIORITY)
    assert all(v.summary == backends.describe()[v.name] for v in verdicts)
    (reason,) = verdicts[0].reasons
    assert "not of <built-in method sin" in reason
    assert verdicts[1].reasons == verdicts[2].reasons == ()


# The fused backend, which differentiates by hand. Where the suite is about equality with the
# reference, these are about its own operators.


@pytest.mark.parametrize(
    ("gated", "bias", "activation"), list(product((False, True), (False, True), WRITTEN))
)
def test_fused_derivatives(gated, bias, activation):
    experts = Experts(4, 4, 3, gated, bias, activation, dtype=torch.float64)
    rows = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([2, 0, 4, 0])  # and a spare row
    names = list(dict(experts.named_parameters()))

    def compute(rows: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(experts, given, (rows, counts, "fused"))

    assert torch.autograd.gradcheck(compute, (rows, *experts.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_rounds_no_more_than_the_reference(dtype):
    # Padded blocks, several of them: 45, 64 and 91 rows. Both round at the same places, so their
    # distances to the exact result differ by chance only, and by a few percent.
    experts = Experts(4, 48, 40, bias=True, activation="gelu", dtype=dtype)
    rows, counts = torch.randn(200, 48).to(dtype), torch.tensor([45, 0, 64, 91])
    grad = torch.randn(200, 48).to(dtype)

    def solve(experts: Experts, rows: Tensor, backend: str) -> list[Tensor]:
        rows = rows.detach().requires_grad_()
        y = experts(rows, counts, backend)
        return [y, *torch.autograd.grad(y, [rows, *experts.parameters()], grad.to(y.dtype))]

    fused, reference = (solve(experts, rows, name) for name in ("fused", "reference"))
    exact = solve(experts.double(), rows.double(), "reference")
    for ours, theirs, true in zip(fused, reference, exact, strict=True):
        assert (ours - true).norm() <= 1.1 * (theirs - true).norm()


@pytest.mark.parametrize("wanted", list(product((False, True), repeat=5))[1:])
def test_fused_makes_the_gradients_that_are_wanted(wanted):
    experts = Experts(3, 6, 5, bias=True)
    leaves = [torch.randn(9, 6), *experts.parameters()]
    counts, grad = torch.tensor([4, 0, 5]), torch.randn(9, 6)
    for leaf in leaves:
        leaf.requires_grad_()
    all_of_them = torch.autograd.grad(experts(leaves[0], counts, "fused"), leaves, grad)
    # leaves: rows, gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias
    for leaf, flag in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(flag)
    experts(leaves[0], counts, "fused").backward(grad)
    for leaf, flag, same in zip(leaves, wanted, all_of_them, strict=True):
        assert torch.equal(leaf.grad, same) if flag else leaf.grad is None


def test_fused_keeps_nothing_where_nothing_is_learnt():
    experts, rows, counts = Experts(3, 6, 5), torch.randn(9, 6), torch.tensor([4, 0, 5])
    with torch.no_grad():
        found = experts(rows, counts, "fused")
    assert torch.equal(found, experts(rows, counts, "fused").detach())
    w = experts.weights
    for keep, kept in ((False, 0), (True, 9 * 5)):
        args = (w.up, w.down, None, None, True, "silu", rows.dtype, keep)
        _, pre, value = torch.ops.moefold.fused_experts(rows, torch.arange(9), None, counts, *args)
        assert (pre.numel(), value.numel()) == (kept, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["by torch", "compiled"])
def test_fused_keeps_what_a_linear_layer_of_torch_keeps(dtype, compiled, monkeypatch):
    # The first product in the dtype of the result, even if it was computed in another; for 5 rows,
    # and for more than compiled code takes.
    if not compiled:
        monkeypatch.setattr(cpu_experts, "can_compute", lambda like, *stacks: False)
    experts, counts = Experts(2, 6, 5, dtype=dtype), torch.tensor([5, 1100])
    w, rows = experts.weights, torch.randn(1105, 6, dtype=dtype)
    args = (w.up, w.down, None, None, True, "silu", dtype, True)
    _, *kept = torch.ops.moefold.fused_experts(rows, torch.arange(1105), None, counts, *args)
    size, kind = padded(5, rows.new_empty(0, dtype=work_dtype(dtype))), torch.finfo(dtype)
    for part, half in zip(kept, w.up.detach().chunk(2, 1), strict=True):
        assert part.dtype == dtype
        for own, expert, start in ((rows[:5], 0, 0), (rows[5:], 1, size)):
            own, matrix = own.double(), half[expert].double().T
            exact, terms = own @ matrix, own.abs() @ matrix.abs()
            # Six products summed in float32 or better, rounded once at the end.
            bound = (
                6 * 2.0**-24 * terms + kind.eps / 2 * exact.abs() + kind.smallest_normal * kind.eps
            )
            assert ((part[start : start + len(own)] - exact).abs() <= bound).all()


def test_fused_refuses_a_second_derivative():
    experts, counts = Experts(2, 4, 3), torch.tensor([1, 2])
    rows = torch.randn(3, 4, requires_grad=True)
    y = experts(rows, counts, "fused")
    (first,) = torch.autograd.grad(y.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("backend", PRIORITY)
def test_gradients_in_a_batch(backend):
    experts, counts = Experts(3, 6, 5), torch.tensor([4, 0, 5])
    rows = torch.randn(9, 6, requires_grad=True)
    found, each = experts(rows, counts, backend).sum(1), torch.eye(9)
    (batch,) = torch.autograd.grad(found, rows, each, is_grads_batched=True, retain_graph=True)
    for gradient, one in zip(batch, each, strict=True):
        (expected,) = torch.autograd.grad(found, rows, one, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


def test_grouped_has_a_second_derivative():
    experts = Experts(3, 4, 3, bias=True, activation="tanh", dtype=torch.float64)
    rows = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([2, 0, 3])
    assert torch.autograd.gradgradcheck(lambda r: experts(r, counts, "grouped"), rows)


@pytest.mark.parametrize("compiled", [False, True], ids=["by torch", "compiled"])
@pytest.mark.parametrize("wide", [False, True], ids=["as it is", "in float32"])
def test_fused_computes_low_precision_either_way(wide, compiled, monkeypatch):
    # What this processor does not do by itself is done all the same, padded blocks included.
    if not compiled:
        monkeypatch.setattr(cpu_experts, "can_compute", lambda like, *stacks: False)
    monkeypatch.setattr(
        fused_ops,
        "work_dtype",
        lambda dtype: torch.promote_types(dtype, torch.float32) if wide else dtype,
    )
    case = BackendCase(backend=FusedBackend(), device="cpu")
    names = ("mixing: values and gradients", "mixing: autocast", "mixing: spare rows")
    assert run("fused", {name: MIX_CHECKS[name] for name in names}, case).ran == names
    names = ("bfloat16", "autocast")
    assert run("fused", {name: BACKEND_CHECKS[name] for name in names}, case).ran == names


@pytest.fixture
def by_torch(monkeypatch):
    """No compiled code: torch's operations for every expert."""
    monkeypatch.setattr(cpu_experts, "can_compute", lambda like, *stacks: False)


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_fused_computes_the_same_in_blocks_of_any_size(rows, monkeypatch, by_torch):
    monkeypatch.setattr(fused_blocks, "BLOCK_ROWS", rows)
    case = BackendCase(backend=FusedBackend(), device="cpu")
    # The operator stays the same, so that it need not be compiled again.
    every = {**BACKEND_CHECKS, **MIX_CHECKS}.items()
    checks = {name: check for name, check in every if "compiles" not in name}
    assert run("fused", checks, case).ran == tuple(checks)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_fused_computes_the_same_with_several_workers(workers, monkeypatch, by_torch):
    # more of them than experts too; each with blocks of one expert and of several
    monkeypatch.setattr(fused_workers, "WORTH_IT", 0)
    shares = []
    split = fused_workers.share_out
    monkeypatch.setattr(
        fused_parts, "share_out", lambda *given: shares.append(split(*given)) or shares[-1]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(workers)
    try:
        case = BackendCase(backend=FusedBackend(), device="cpu")
        every = {**BACKEND_CHECKS, **MIX_CHECKS}.items()
        checks = {name: check for name, check in every if "compiles" not in name}
        assert run("fused", checks, case).ran == tuple(checks)
        assert torch.get_num_threads() == workers
    finally:
        torch.set_num_threads(before)
    assert max(sum(map(bool, found)) for found in shares) > 1


def test_blocks_are_shared_out_by_size():
    assert share_out([5, 1, 4, 3], 2) == [[0, 1], [2, 3]]  # 6 and 7
    assert share_out([2, 2, 2], 2) == [[0, 2], [1]]
    assert share_out([7], 3) == [[0], [], []]
    assert share_out([], 2) == [[], []]


def test_workers_are_for_large_work_and_few_threads(monkeypatch):
    up, down = torch.empty(4, 64, 32), torch.empty(4, 32, 64)
    monkeypatch.setattr(fused_workers, "WORTH_IT", 100 * 2 * 64 * 32)
    cases = ((1, 100, 1), (2, 99, 1), (2, 100, 2), (8, 100, 8), (9, 100, 0), (9, 99, 1))
    for threads, rows, expected in cases:
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert workers_for(rows, up, down) == expected


def test_workers_compute_without_autograd_and_autocast():
    found = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run_on(
            [0, 1, 2],
            lambda share: found.append(
                (share, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
            ),
        )
        assert torch.is_autocast_enabled("cpu")
    assert sorted(found) == [(0, False, False), (1, False, False), (2, False, False)]
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        run_on([0, 1], lambda share: found.append(torch.is_inference_mode_enabled()))
    assert found[-2:] == [True, True]
    run_on([0], lambda share: found.append(threading.current_thread()))
    assert found[-1] is threading.current_thread()


def test_what_fails_in_one_worker_is_told():
    done = []

    def work(share):
        if share == 1:
            raise IndexError("no such row")
        done.append(share)

    with pytest.raises(IndexError, match="no such row"):
        run_on([0, 1, 2], work)
    assert set(done) <= {0, 2}


class _Seen(TorchDispatchMode):
    """Notes the names of our own operators that pass."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moefold":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_fused_shows_itself_to_a_mode_and_computes_the_same_without_one():
    given = mix_problem((5, 0, 3), 9, 8, 6, spare=2).to(torch.float32)
    plain = solve_mix(FusedBackend().mix, given)
    with _Seen() as seen:
        watched = solve_mix(FusedBackend().mix, given)
    assert seen.names == ["fused_experts", "fused_experts_backward"]
    for name, tensor in plain.items():
        assert torch.equal(tensor, watched[name]), name


def test_fused_leaves_no_scratch_memory_in_a_result():
    for dtype, counts in product((torch.float32, torch.bfloat16), ((5, 0, 3), (0, 0, 0))):
        given = mix_problem(counts, 9, 8, 6, spare=2).to(dtype)
        for name, tensor in solve_mix(FusedBackend().mix, given).items():
            assert torch.isfinite(tensor).all(), f"{name} of {dtype} holds what nobody wrote"


def test_fused_has_room_for_every_padded_block():
    # rows fall to experts in any way: the kept rows must hold the padded blocks of all of them
    low = torch.bfloat16
    for experts, rows in product((1, 3, 64), (1, 31, 200, 5000)):
        like = torch.empty(rows, 1, dtype=low)
        for sharpness in (0.1, 1.0, 100.0):
            share = torch.distributions.Dirichlet(torch.full((experts,), sharpness)).sample()
            expert = torch.multinomial(share, rows, replacement=True)
            counts = torch.bincount(expert, minlength=experts).tolist()
            blocks = Blocks(counts, rows, 4, like)
            assert blocks.size <= room(rows, experts, like)


def _runs(blocks):
    return [[(run.first, run.experts, run.size) for run in block.runs] for block in blocks]


def test_fused_takes_many_experts_in_one_block_and_equally_many_rows_in_one_product():
    counts = [3, 3, 3, 4, 0, 4, 700, 324, 700, 1500, 1]
    assert _runs(Blocks(counts, 4000, 4, torch.empty(0))) == [
        [(0, 3, 9), (3, 1, 4), (5, 1, 4), (6, 1, 700)],
        [(7, 1, 324), (8, 1, 700)],
        [(9, 1, 1500)],  # one expert stays whole
        [(10, 1, 1)],
    ]
    # a wide matrix makes for few rows: 2 ** 21 numbers are 512 rows of 4096
    wide = Blocks([250] * 5, 1250, 4096, torch.empty(0))
    assert _runs(wide) == [[(0, 2, 500)], [(2, 2, 500)], [(4, 1, 250)]]
    # bfloat16 blocks that are padded stay alone; 17 rows become 32
    low = Blocks([16, 16, 17, 17], 66, 4, torch.empty(0, dtype=torch.bfloat16))
    assert _runs(low) == [[(0, 2, 32)], [(2, 1, 32)], [(3, 1, 32)]]
    assert [(b.count, b.size) for b in low] == [(32, 32), (17, 32), (17, 32)]


@pytest.mark.compile  # it traces with symbolic sizes, which the typing hook takes for wrong types
def test_fused_operators_are_registered_right():
    for dtype, gated in product((torch.float32, torch.bfloat16), (False, True)):
        w = Experts(3, 8, 6, gated, bias=True, dtype=dtype).weights
        x, weight = torch.randn(7, 8).to(dtype).requires_grad_(), torch.rand(12).requires_grad_()
        tokens = torch.tensor([0, 2, 3, 6, 1, 2, 3, 4, 5, 6, 0, 0])  # two spare rows
        args = (w.up, w.down, w.up_bias, w.down_bias, gated, "silu", dtype, True)
        given = (x, tokens, weight, torch.tensor([4, 0, 6]), *args)
        own = (x, None, None, torch.tensor([4, 0, 2]), *args)  # a spare row
        for some in (given, own):
            torch.library.opcheck(torch.ops.moefold.fused_experts.default, some)
            _, pre, value = torch.ops.moefold.fused_experts(*some)
            wanted = [True, some[2] is not None, True, True, True, True]
            back = (torch.randn(7, 8).to(dtype), *some[:-4], pre, value, gated, "silu", wanted)
            torch.library.opcheck(
                torch.ops.moefold.fused_experts_backward.default,
                back,
                test_utils=["test_schema", "test_faketensor"],
            )


@pytest.mark.parametrize("backend", PRIORITY)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(backend, reentrant):
    experts, counts = Experts(3, 6, 5, bias=True), torch.tensor([4, 0, 5])
    rows = torch.randn(9, 6, requires_grad=True)
    of = [rows, *experts.parameters()]
    experts(rows, counts, backend).sin().sum().backward()
    wanted = [leaf.grad.clone() for leaf in of]
    for leaf in of:
        leaf.grad = None
    y = checkpoint(lambda r: experts(r, counts, backend).sin(), rows, use_reentrant=reentrant)
    y.sum().backward()
    assert all(torch.equal(leaf.grad, same) for leaf, same in zip(of, wanted, strict=True))


def test_grouped_sums_the_gradient_of_a_bias_in_float32():
    # 4096 rows of gradient 1: a sum kept in bfloat16 would stop growing at 256
    experts = Experts(1, 8, 8, gated=False, bias=True, activation="tanh", dtype=torch.bfloat16)
    experts(torch.zeros(4096, 8, dtype=torch.bfloat16), torch.tensor([4096]), "grouped").backward(
        torch.ones(4096, 8, dtype=torch.bfloat16)
    )
    bias = experts.weights.down_bias
    assert bias is not None
    assert bias.grad is not None
    assert (bias.grad == 4096).all()


def test_backends_say_what_they_cannot_do():
    reference, grouped = ReferenceBackend(), GroupedBackend()
    assert reference.reasons_against(ROWS, weights_of()) == []
    assert grouped.reasons_against(ROWS, weights_of()) == []

    class Elsewhere:
        device = torch.device("mps")

    with untyped():
        (reason,) = grouped.reasons_against(cast(Tensor, Elsewhere()), weights_of())
    assert reason == "it was never run on mps, only on cpu and cuda"


def test_weights_are_a_value():
    weights = weights_of()
    with pytest.raises(AttributeError, match="cannot assign to field"):
        weights.up = ROWS  # pyright: ignore[reportAttributeAccessIssue]
    assert replace(weights, activation="relu").activation == "relu"


@pytest.mark.compile
def test_reference_is_not_chosen_for_a_compiled_graph():
    said = []

    def ask(rows: Tensor) -> Tensor:
        said.extend(ReferenceBackend().reasons_against(rows, weights))
        return rows + 1

    weights = weights_of()
    torch.compile(ask, fullgraph=True, backend="eager")(ROWS)
    assert said == ["it reads rows_per_expert on the host, which not every torch can compile"]
