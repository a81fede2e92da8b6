"""The contract of a backend: what `reference` computes, values and gradients.

    moefold.testing.check_backend("grouped")

Shapes: `rows dim` in and out, sorted by expert. How close is close: see `testing.problems`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moefold.experts import AbstractBackend, AbstractMixer, ExpertWeights, activations, backends
from moefold.experts.backends.reference import ReferenceBackend
from moefold.testing.contract import Check, Report, run
from moefold.testing.mixers import MIX_CHECKS
from moefold.testing.problems import (
    SLACK,
    BackendCase,
    Problem,
    equals_reference,
    error_of,
    floor,
    solve,
    tensors_of,
)

# (counts of rows, dim, width): odd and even, wide enough for a sum to round, with empty experts
# first, last and in between.
SIZES = (
    ((33, 7, 64), 40, 24),
    ((0, 29, 0, 41, 1, 0), 37, 51),
    ((5, 3), 1, 1),
    ((17,), 129, 3),
)


def _kinds(case: BackendCase, dtype: torch.dtype) -> Iterator[tuple[str, Problem]]:
    for counts, dim, width in SIZES:
        for gated in (False, True):
            for bias in (False, True):
                given = case.problem(counts, dim, width, gated=gated, bias=bias)
                what = f"{'gated' if gated else 'plain'}, {'biases, ' if bias else ''}{dim} wide"
                if not _reasons(case, given.to(dtype)):
                    yield f"{what}, rows {list(counts)}", given


def _reasons(case: BackendCase, given: Problem) -> list[str]:
    return case.backend.reasons_against(given.rows, given.weights)


def _in_dtype(case: BackendCase, dtype: torch.dtype) -> str | None:
    ran = False
    for what, given in _kinds(case, dtype):
        equals_reference(case.backend, given, dtype, what)
        ran = True
    if ran:
        return None
    return "; ".join(_reasons(case, case.problem(*SIZES[0]).to(dtype)))


def in_float32(case: BackendCase) -> str | None:
    """Plain and gated, with and without biases, odd widths, empty experts."""
    return _in_dtype(case, torch.float32)


def in_float64(case: BackendCase) -> str | None:
    """The same in float64."""
    return _in_dtype(case, torch.float64)


def in_bfloat16(case: BackendCase) -> str | None:
    """The same in bfloat16."""
    return _in_dtype(case, torch.bfloat16)


def _any_runs(case: BackendCase, problems: Iterable[tuple[str, Problem]]) -> str | None:
    """Compare in float32 what the backend does not refuse; if it refuses all, say why."""
    ran, refused = False, []
    for what, given in problems:
        reasons = _reasons(case, given.to(torch.float32))
        refused += reasons
        if not reasons:
            equals_reference(case.backend, given, torch.float32, what)
            ran = True
    return None if ran else "; ".join(dict.fromkeys(refused))


def every_activation(case: BackendCase) -> str | None:
    """Every known activation, gated and plain, and a function in place of a name."""
    problems = []
    for name in activations.names():
        for gated in (False, True):
            given = case.problem((9, 0, 14), 12, 10, gated=gated, activation=name)
            problems.append((f"{name}{', gated' if gated else ''}", given))
    given = case.problem((9, 0, 14), 12, 10)
    own = replace(given, weights=replace(given.weights, activation=torch.sin))
    return _any_runs(case, [*problems, ("a function as activation", own)])


def no_rows(case: BackendCase) -> str | None:
    """No rows at all: an empty result, and zero gradients."""
    return _any_runs(case, [("no rows", case.problem((0, 0, 0), 8, 6))])


def one_expert_has_all(case: BackendCase) -> str | None:
    """All rows at the first, the middle, the last expert, or at the only one."""
    counts = ((50, 0, 0), (0, 50, 0), (0, 0, 50), (50,))
    return _any_runs(case, [(f"rows {list(c)}", case.problem(c, 8, 6)) for c in counts])


def empty_experts_learn_nothing(case: BackendCase) -> str | None:
    """The gradient of an expert without a row is exactly zero."""
    given = case.problem((0, 21, 0, 30, 0), 16, 8).to(torch.float32)
    if reasons := _reasons(case, given):
        return "; ".join(reasons)
    solve(case.backend, given)
    for name, tensor in tensors_of(given.weights).items():
        assert tensor.grad is not None, f"no gradient of {name}"
        assert (tensor.grad[given.counts == 0] == 0).all(), (
            f"the gradient of {name} is not zero for an expert without a row"
        )
    return None


def spare_rows(case: BackendCase) -> str | None:
    """Rows past the last expert's come back as zero and touch no gradient, even if they are NaN."""
    given = case.problem((6, 0, 11, 3), 16, 8, spare=9)
    if reasons := _reasons(case, given.to(torch.float32)):
        return "; ".join(reasons)
    used = int(given.counts.sum())
    short = replace(given, rows=given.rows[:used], back=given.back[:used])
    want = solve(case.backend, short.to(torch.float32))
    for filled in (1.0, float("nan")):
        rows = given.rows.clone()
        rows[used:] *= filled
        got = solve(case.backend, replace(given, rows=rows).to(torch.float32))
        for name, tensor in got.items():
            if name in ("result", "gradient of rows"):
                assert (tensor[used:] == 0).all(), f"the {name} of a spare row is not zero"
                tensor = tensor[:used]
            # As many roundings as in the reference; a spare row would add numbers of order 1.
            assert error_of(tensor, want[name].double()) < 1e-5, (
                f"spare rows{' of NaN' if filled != filled else ''} change the {name}"
            )
    return None


def any_strides(case: BackendCase) -> str | None:
    """Transposed rows and weights, and a gradient that is one number expanded."""
    given = case.problem((6, 0, 11), 16, 8).to(torch.float32)
    if reasons := _reasons(case, given):
        return "; ".join(reasons)

    def awkward(tensor: Tensor) -> Tensor:
        turned = tensor.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
        return turned.requires_grad_()

    want = solve(case.backend, replace(given, back=torch.ones_like(given.back)))
    turned = {name: awkward(t) for name, t in tensors_of(given.weights).items() if t.ndim == 3}
    other = replace(
        given,
        rows=awkward(given.rows),
        weights=replace(given.weights, **turned),
        back=torch.ones((), device=case.device).expand_as(given.back),
    )
    for tensor in other.leaves().values():
        tensor.grad = None
    for name, tensor in solve(case.backend, other).items():
        # Other strides may sum in another order: a few roundings of float32.
        assert error_of(tensor, want[name].double()) < 1e-5, f"other strides change the {name}"
    return None


def frozen_parts(case: BackendCase) -> str | None:
    """Gradients of some parts only, or of none, are those of all."""
    given = case.problem((6, 0, 11), 16, 8).to(torch.float32)
    if reasons := _reasons(case, given):
        return "; ".join(reasons)
    want = solve(case.backend, given)
    for alone in given.leaves():
        for name, tensor in given.leaves().items():
            tensor.requires_grad_(name == alone)
            tensor.grad = None
        y = case.backend.compute(given.rows, given.counts, given.weights)
        assert y.requires_grad, f"with only {alone} to be learnt, nothing is"
        y.backward(given.back)
        got = given.leaves()[alone].grad
        assert got is not None, f"with only {alone} to be learnt, it gets no gradient"
        name = f"gradient of {alone}"
        assert error_of(got, want[name].double()) < 1e-5, f"alone, the {name} is another"
    with torch.inference_mode():
        y = case.backend.compute(given.rows, given.counts, given.weights)
    assert error_of(y, want["result"].double()) < 1e-5, "inference mode changes the result"
    return None


def inputs_stay(case: BackendCase) -> str | None:
    """Neither forward nor backward changes its inputs; the same again gives the same again."""
    given = case.problem((6, 0, 11), 16, 8).to(torch.float32)
    if reasons := _reasons(case, given):
        return "; ".join(reasons)
    before = {name: tensor.detach().clone() for name, tensor in given.leaves().items()}
    before["counts"], before["back"] = given.counts.clone(), given.back.clone()
    first = {name: tensor.clone() for name, tensor in solve(case.backend, given).items()}
    for name, tensor in {**given.leaves(), "counts": given.counts, "back": given.back}.items():
        assert torch.equal(tensor, before[name]), f"{name} was changed in place"
        tensor.grad = None
    for name, tensor in solve(case.backend, given).items():
        assert torch.equal(tensor, first[name]), f"a second time the {name} is another"
    return None


def autocast(case: BackendCase) -> str | None:
    """Under autocast, float32 weights give the result of bfloat16 ones, as a linear layer does."""
    given = case.problem((26, 0, 31), 16, 24)
    kind = torch.device(case.device).type
    if reasons := _reasons(case, given.to(torch.float32)):
        return "; ".join(reasons)
    truth = solve(ReferenceBackend(), given.to(torch.float64))
    plain = solve(ReferenceBackend(), given.to(torch.bfloat16))
    with torch.autocast(kind, torch.bfloat16):
        y = case.backend.compute(*_without_back(given.to(torch.float32)))
        got = solve(case.backend, given.to(torch.float32))
    assert y.dtype == torch.bfloat16, f"the result is {y.dtype}, not bfloat16"
    for name, tensor in got.items():
        limit = SLACK * error_of(plain[name], truth[name]) + floor(torch.bfloat16)
        assert error_of(tensor, truth[name]) <= limit, f"autocast gives another {name}"
    return None


def _without_back(given: Problem) -> tuple[Tensor, Tensor, ExpertWeights]:
    return given.rows, given.counts, given.weights


def compiles(case: BackendCase) -> str | None:
    """`torch.compile(fullgraph=True)` equals eager, values and gradients, spare rows included."""
    if not case.compile:
        return "it takes seconds; ask for it by compile=True"
    given = case.problem((6, 0, 11), 16, 8, spare=4)
    if reasons := _reasons(case, given.to(torch.float32)):
        return "; ".join(reasons)
    refused: list[str] = []  # what it says of a graph

    def compute(rows: Tensor, counts: Tensor, weights: ExpertWeights) -> Tensor:
        if torch.compiler.is_compiling():
            refused.extend(case.backend.reasons_against(rows, weights))
        return case.backend.compute(rows, counts, weights)

    want = solve(case.backend, given.to(torch.float32))
    torch.compiler.reset()
    fresh = given.to(torch.float32)
    call = torch.compile(compute, fullgraph=True, backend="aot_eager")
    try:
        call(*_without_back(fresh)).backward(fresh.back)
    except Exception:
        if not refused:
            raise
    if refused:
        return "; ".join(refused)
    for name, tensor in fresh.leaves().items():
        assert tensor.grad is not None, f"compiling loses the gradient of {name}"
        error = error_of(tensor.grad, want[f"gradient of {name}"].double())
        assert error < 1e-5, f"compiling changes the gradient of {name}"
    return None


BACKEND_CHECKS: dict[str, Check[BackendCase]] = {
    "float32": in_float32,
    "float64": in_float64,
    "bfloat16": in_bfloat16,
    "every activation": every_activation,
    "no rows": no_rows,
    "one expert has all": one_expert_has_all,
    "empty experts learn nothing": empty_experts_learn_nothing,
    "spare rows": spare_rows,
    "any strides": any_strides,
    "frozen parts": frozen_parts,
    "inputs stay": inputs_stay,
    "autocast": autocast,
    "compiles": compiles,
}
"""Every invariant of a backend by the name that messages and exceptions use."""


def check_backend(
    backend: str | AbstractBackend,
    *,
    exceptions: Mapping[str, str] | None = None,
    compile: bool = False,
    device: str = "cpu",
) -> Report:
    """Run the whole contract of `BACKEND_CHECKS` on a backend, of a mixer `MIX_CHECKS` too.

    Args:
        backend: a registered name, or the backend itself.
        exceptions: invariants it is known not to keep, name to reason. What it cannot run it should
            refuse by `reasons_against` instead: that is skipped.
        compile: also compile it, which takes seconds.
        device: where to run it.

    Returns:
        What was checked, and what was skipped with the reason.

    Raises:
        AssertionError: an invariant does not hold; names all of them, and how.
        ValueError: unknown backend or exception.
    """
    made = backends.get(backend) if isinstance(backend, str) else backend
    case = BackendCase(backend=made, device=device, compile=compile)
    subject = backend if isinstance(backend, str) else type(backend).__name__
    checks = {**BACKEND_CHECKS, **(MIX_CHECKS if isinstance(made, AbstractMixer) else {})}
    return run(f"backend {subject}", checks, case, exceptions)
