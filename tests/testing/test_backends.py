"""The backend suite fails where it should: for every check, backends that break just that."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moefold.experts import AbstractBackend, ExpertWeights
from moefold.experts.backends.reference import ReferenceBackend
from moefold.testing import BACKEND_CHECKS, check_backend
from moefold.testing.contract import run
from moefold.testing.problems import BackendCase

Compute = Callable[[Tensor, Tensor, ExpertWeights], Tensor]
good: Compute = ReferenceBackend().compute


class Made(AbstractBackend):
    """A backend from a function."""

    def __init__(self, compute: Compute, reasons: Callable[[Tensor], list[str]] = lambda _: []):
        self._compute = compute
        self._reasons = reasons

    def reasons_against(self, rows, weights):
        return self._reasons(rows)

    def compute(self, rows, rows_per_expert, weights):
        return self._compute(rows, rows_per_expert, weights)


def in_dtype(dtype: torch.dtype, rows: Tensor, counts: Tensor, weights: ExpertWeights) -> Tensor:
    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    low = replace(
        weights,
        up=weights.up.to(dtype),
        down=weights.down.to(dtype),
        up_bias=cast(weights.up_bias),
        down_bias=cast(weights.down_bias),
    )
    return good(rows.to(dtype), counts, low).to(rows.dtype)


def rounds_to_bfloat16(rows, counts, weights):
    return in_dtype(torch.bfloat16, rows, counts, weights)


def rounds_to_float32(rows, counts, weights):
    return in_dtype(torch.float32, rows, counts, weights)


def swaps_the_gate(rows, counts, weights):
    if not weights.gated:
        return good(rows, counts, weights)
    bias = weights.up_bias
    turn = torch.arange(weights.up.shape[1]).roll(weights.down.shape[2])
    swapped = None if bias is None else bias[:, turn]
    return good(rows, counts, replace(weights, up=weights.up[:, turn], up_bias=swapped))


def forgets_the_last_bias(rows, counts, weights):
    bias = weights.down_bias
    forgotten = None if bias is None else bias * 0
    return good(rows, counts, replace(weights, down_bias=forgotten))


def gives_rows_half_a_gradient(rows, counts, weights):
    return good(rows / 2 + rows.detach() / 2, counts, weights)


def shifts_experts(rows, counts, weights):
    """The second expert computes the rows of the first, where both have as many."""
    return good(rows, counts, replace(weights, up=weights.up.roll(1, 0)))


def rounds_hidden_values_coarsely(rows, counts, weights):
    """Six bits of mantissa instead of bfloat16's eight: what a fused kernel in fp8 might do."""
    y = good(rows, counts, weights)
    if rows.dtype != torch.bfloat16:
        return y
    mantissa, exponent = torch.frexp(y.float())
    coarse = torch.ldexp((mantissa * 16).round() / 16, exponent)
    return y + (coarse.to(y.dtype) - y).detach()


def knows_only_silu(rows, counts, weights):
    return good(rows, counts, replace(weights, activation="silu"))


def needs_a_row(rows, counts, weights):
    return good(rows, counts, weights) + 0 * rows.max()


def has_room_for_twice_the_mean(rows, counts, weights):
    place = torch.cat([torch.arange(count) for count in counts.tolist()])
    return good(rows, counts, weights) * (place < 2 * counts.double().mean()).unsqueeze(1)


def decays_weights(rows, counts, weights):
    """Unchanged values, but a gradient for every expert."""
    total = weights.up.square().sum() + weights.down.square().sum()
    return good(rows, counts, weights) + 1e-9 * (total - total.detach())


def gives_spare_rows_to_the_last(rows, counts, weights):
    counts = counts.clone()
    counts[-1] += rows.shape[0] - counts.sum()
    return good(rows, counts, weights)


def leaves_spare_rows_unwritten(rows, counts, weights):
    y = good(rows, counts, weights)
    spare = torch.arange(rows.shape[0]) >= counts.sum()
    return torch.where(spare.unsqueeze(1), rows.detach().nan_to_num(), y)


def reads_memory_as_if_contiguous(rows, counts, weights):
    flat = rows.as_strided(rows.shape, (rows.shape[1], 1))
    return good(flat, counts, weights)


def learns_only_with_rows(rows, counts, weights):
    with torch.set_grad_enabled(rows.requires_grad):
        return good(rows, counts, weights)


def works_in_place(rows, counts, weights):
    y = good(rows, counts, weights)
    rows.data.mul_(1 + 1e-7)
    return y


def works_on_the_counts(rows, counts, weights):
    y = good(rows, counts, weights)
    counts += 1
    return y


def ignores_autocast(rows, counts, weights):
    with torch.autocast("cpu", enabled=False):
        return good(rows, counts, weights)


BROKEN = [
    (rounds_to_bfloat16, "float32", "result is off by"),
    (swaps_the_gate, "float32", "result is off by"),
    (forgets_the_last_bias, "float32", "biases, 40 wide"),
    (shifts_experts, "float32", "result is off by"),
    (gives_rows_half_a_gradient, "float32", "gradient of rows is off by 0.5"),
    (rounds_to_float32, "float64", "result is off by"),
    (rounds_hidden_values_coarsely, "bfloat16", "result is off by"),
    (knows_only_silu, "every activation", "gelu"),
    (needs_a_row, "no rows", "raised"),
    (has_room_for_twice_the_mean, "one expert has all", "rows [50, 0, 0]: result is off by"),
    (decays_weights, "empty experts learn nothing", "gradient of up is not zero"),
    (gives_spare_rows_to_the_last, "spare rows", "result of a spare row is not zero"),
    (leaves_spare_rows_unwritten, "spare rows", "result of a spare row is not zero"),
    (reads_memory_as_if_contiguous, "any strides", "other strides change the"),
    (learns_only_with_rows, "frozen parts", "with only up to be learnt"),
    (works_in_place, "inputs stay", "rows was changed in place"),
    (works_on_the_counts, "inputs stay", "counts was changed in place"),
    (ignores_autocast, "autocast", "not bfloat16"),
]


@pytest.mark.parametrize(
    ("compute", "check", "says"), BROKEN, ids=[f"{b[1]}-{b[0].__name__}" for b in BROKEN]
)
def test_a_broken_backend_is_caught(compute: Compute, check: str, says: str):
    case = BackendCase(backend=Made(compute), device="cpu")
    with pytest.raises(AssertionError, match=re.escape(says)) as caught:
        run("backend", {check: BACKEND_CHECKS[check]}, case)
    assert f"\n  {check}: " in str(caught.value)


def test_every_check_has_been_seen_to_fail():
    # Compiling has its broken backend in test_compile.py.
    assert {check for _, check, _ in BROKEN} == set(BACKEND_CHECKS) - {"compiles"}


def test_a_backend_that_is_not_broken_passes():
    report = check_backend(Made(good))
    assert set(report.skipped) == {"compiles"}


def test_what_a_backend_refuses_is_skipped_with_its_reason():
    def only_float32(rows: Tensor) -> list[str]:
        return [] if rows.dtype == torch.float32 else [f"it was not made for {rows.dtype}"]

    report = check_backend(Made(good, only_float32))
    assert report.skipped["float64"] == "it was not made for torch.float64"
    assert "float32" in report.ran
    assert set(report.skipped) == {"float64", "bfloat16", "compiles"}


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'fuse'; did you mean 'fused'"):
        check_backend("fuse")
