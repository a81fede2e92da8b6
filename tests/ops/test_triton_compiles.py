"""Kernels of routers compile for GPUs, with what they are launched with."""

import pytest

from tests.ops.triton_apart import run_compiled

pytest.importorskip("triton")

# Each launches the kernels of one file, in the variants that differ most.
SELECT = """
from moefold.ops.route import route
from moefold.ops.select import top
scores, real = torch.randn(8, 100, 64), torch.ones(8, 100, dtype=torch.bool)
def call():
    top(scores, 8, 2)
    top(scores, torch.full((8,), 3), 1, real.unsqueeze(2).expand_as(scores))
    logits = torch.randn(800, 64, requires_grad=True)
    for normalize in (False, True):
        bias, taken = (torch.zeros(64), real.flatten()) if normalize else (None, None)
        routed = route(logits, 8, bias=bias, real=taken, normalize=normalize)
        (routed.scores.sum() + routed.weights.sum()).backward()
expected = {"_mark_short", "_route", "_route_backward"}
"""
RADIX = """
from moefold.ops.select import top
scores = torch.randn(3, 20000)
def call():
    top(scores, 77, 1)
    top(scores, torch.tensor([1, 2, 3]), 1, scores > 0)
    top(scores[:1], 1, 1)
expected = {"_tally", "_count_equals", "_mark_long"}
"""
ROWS = """
from moefold.ops.triton.rows import list_rows
def call():
    for experts in (3, 64, 300):
        weights = torch.rand(500, experts, requires_grad=True)
        list_rows(weights > 0.5, weights, 5000)[1].sum().backward()
expected = {"_count", "_place", "_gather"}
"""
SOFT = """
from moefold.ops.soft import KernelMaps
from moefold.ops.triton import soft
def call():
    for dtype, precision in DTYPES:
        soft.precision_of = lambda like: precision  # as on a GPU
        real = torch.ones(2, 256, dtype=torch.bool) if dtype == torch.bfloat16 else None
        logits = torch.randn(2, 256, 32, 8, requires_grad=True)
        x = torch.randn(2, 256, 768, dtype=dtype, requires_grad=True)
        rows = KernelMaps().dispatch(logits, x, real)
        KernelMaps().combine(logits, rows, real).sum().backward()
DTYPES = [(torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
expected = {"_mix", "_sum_products", "_grad_values", "_grad_logits"}
"""
SCRIPT = """
import sys, torch
from tests.ops.triton_targets import compile_launches
{calls}
found = compile_launches({capability}, call)
assert set(found) == expected, found
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 90])
@pytest.mark.parametrize(
    "calls", [SELECT, RADIX, ROWS, SOFT], ids=["select", "radix", "rows", "soft"]
)
def test_kernels_compile(calls, capability, tmp_path):
    done = run_compiled(SCRIPT.format(calls=calls, capability=capability), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
