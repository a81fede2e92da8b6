"""Kernels of experts compile for GPUs, forward and backward, with what they are launched with.

The operators run on tensors without data, and whatever looked at a number of the device would
raise: so this is also where they are seen to wait for nothing.
"""

import pytest

from tests.ops.triton_apart import run_compiled

pytest.importorskip("triton")

SCRIPT = """
import torch
from moefold.experts.backends import triton as ours
from tests.ops.triton_targets import compile_launches

def passes(dtype, gated, bias, mixed, tokens=4096, k=8, experts=64, dim=1536, width=256):
    def no_data(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")
    rows, wide = tokens * k, 2 * width if gated else width
    x = no_data(tokens if mixed else rows, dim)
    weight = no_data(rows, dtype=torch.float32) if mixed else None
    token = no_data(rows, dtype=torch.int64) if mixed else None
    counts = no_data(experts, dtype=torch.int64)
    up, down = no_data(experts, wide, dim), no_data(experts, dim, width)
    biases = (no_data(experts, wide), no_data(experts, dim)) if bias else (None, None)
    given = x, weight, token, counts, up, down
    out, *kept = ours._mix._init_fn(*given, *biases, gated, "silu", True)
    wanted = [True, mixed, True, True, bias, bias]
    ours._mix_backward._init_fn(torch.empty_like(out), *given, biases[1], *kept, "silu", wanted)

CASES = [
    (torch.bfloat16, True, False, True, {{}}),
    (torch.bfloat16, False, True, True, dict(dim=100, width=72)),
    (torch.float16, True, True, False, dict(tokens=64, k=1)),
    (torch.float32, True, True, True, {{}}),
]
torch.set_float32_matmul_precision("{precision}")
found = compile_launches(
    {capability}, lambda: [passes(*case, **sizes) for *case, sizes in CASES]
)
assert set(found) == {{"_first", "_second", "_combine", "_hidden_backward", "_outer", "_sums"}}
assert found["_outer"] == 2 * len(CASES), found
"""


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "precision"), [(86, "highest"), (90, "high")])
def test_kernels_compile(capability, precision, tmp_path):
    done = run_compiled(SCRIPT.format(capability=capability, precision=precision), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
