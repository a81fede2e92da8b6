"""transformers' expert functions as backends: the same values and gradients, or reasons against."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from moefold.experts import Experts
from moefold.experts.activations import names
from moefold.experts.backends import from_transformers as module
from moefold.experts.backends.from_transformers import TransformersBackend
from moefold.experts.backends.reference import ReferenceBackend
from moefold.testing import check_backend
from moefold.testing.problems import equals_reference, problem, solve

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm"])
def test_the_contract_holds(name):
    report = str(check_backend(TransformersBackend(name)))
    held = {line.split(None, 1)[1] for line in report.splitlines() if "holds  " in line}
    assert {"float32", "bfloat16", "spare rows", "any strides", "autocast"} <= held
    if name == "batched_mm":
        assert {"float64", "every activation", "no rows"} <= held


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("counts", [(9, 0, 14), (0, 0, 0), (0, 23, 0)], ids=str)
def test_grouped_where_the_suite_has_other_widths(gated, counts):
    # torch's grouped product wants rows of whole 16 bytes, which the suite's problems mostly lack.
    given = problem(counts, 16, 8, gated=gated, bias=True)
    equals_reference(TransformersBackend("grouped_mm"), given, torch.float32, str(counts))


@pytest.mark.parametrize("activation", names())
def test_grouped_with_every_activation(activation):
    given = problem((9, 0, 14), 16, 8, activation=activation)
    equals_reference(TransformersBackend("grouped_mm"), given, torch.float32, activation)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm"])
def test_it_compiles(name):
    report = str(check_backend(TransformersBackend(name), compile=True))
    assert "holds    compiles" in report


def reasons(name: str, dtype=torch.float32, **kind) -> str:
    weights = Experts(2, 16, 8, dtype=dtype, **kind).weights
    given = TransformersBackend(name).reasons_against(torch.zeros(3, 16, dtype=dtype), weights)
    return "; ".join(given)


def test_what_the_grouped_product_does_not_take():
    assert reasons("grouped_mm") == ""
    assert reasons("grouped_mm", torch.float64) == "torch's grouped product has no float64"
    narrow = Experts(2, 15, 8).weights
    assert TransformersBackend("grouped_mm").reasons_against(torch.zeros(3, 15), narrow) == [
        "torch's grouped product takes rows of whole 16 bytes, and dim=15 of float32 is 60"
    ]
    # Under autocast it is bfloat16 that counts: 12 numbers are 24 bytes.
    half = Experts(2, 12, 8).weights
    backend = TransformersBackend("grouped_mm")
    assert backend.reasons_against(torch.zeros(3, 12), half) == []
    with torch.autocast("cpu", torch.bfloat16):
        (reason,) = backend.reasons_against(torch.zeros(3, 12), half)
    assert reason.endswith("dim=12 of bfloat16 is 24")


def test_another_device_is_refused():
    weights = Experts(2, 16, 8).weights
    (reason,) = TransformersBackend("batched_mm").reasons_against(
        torch.zeros(3, 16, device="meta"), weights
    )
    assert reason == "it was never run on meta, only on cpu and cuda"


def test_sonicmoe_says_all_that_is_missing():
    found = reasons("sonicmoe", torch.float32, gated=False, activation="tanh")
    assert "it needs a GPU of compute capability 9.0 (Hopper) or newer, not cpu" in found
    assert "it computes gated experts only" in found
    assert "it knows gelu, relu, silu, not tanh" in found
    assert "it computes in bfloat16 and float16, not in float32" in found
    assert "not a function of your own" in reasons("sonicmoe", activation=torch.sin)
    if importlib.util.find_spec("kernels") is None:
        assert "pip install kernels" in found


def test_deepgemm_has_no_backward_pass():
    assert "it has no backward pass; call it under torch.no_grad()" in reasons("deepgemm")
    assert "it computes in bfloat16, not in float32" in reasons("deepgemm")
    with torch.no_grad():
        assert "backward" not in reasons("deepgemm", torch.bfloat16)


def test_one_bias_of_two_is_refused():
    given = problem((3, 2), 16, 8, bias=True)
    weights = replace(given.weights, down_bias=None)
    (reason,) = TransformersBackend("batched_mm").reasons_against(given.rows, weights)
    assert reason == "transformers' experts have both biases or none"


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "transformers" in reasons("grouped_mm")
    assert "pip install" in reasons("grouped_mm")


def test_a_function_that_this_version_lacks(monkeypatch):
    monkeypatch.setattr(module, "_functions", dict)
    assert reasons("grouped_mm").endswith(
        "has no expert function 'grouped_mm'; pip install -U 'transformers>=5.10'"
    )


def test_spare_rows_are_looked_for_where_that_costs_nothing(monkeypatch):
    given = problem((3, 2), 16, 8).to(torch.float32)
    assert not module._may_have_spare(given.rows, given.counts)
    assert module._may_have_spare(torch.zeros(6, 16), given.counts)
    # Where it is not known, the result is the same.
    want = solve(ReferenceBackend(), given)
    monkeypatch.setattr(module, "_may_have_spare", lambda *given: True)
    got = solve(TransformersBackend("grouped_mm"), problem_like(given))
    assert torch.allclose(got["result"], want["result"], atol=1e-6)  # some roundings of order 1


def problem_like(given):
    return given.to(torch.float32)
