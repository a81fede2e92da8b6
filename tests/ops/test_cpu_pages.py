"""Large memory is asked for in huge pages, and a gradient of experts is such memory.

Shapes: tensors of any `[shape]`.
"""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from moefold.experts import Experts
from moefold.ops.cpu.pages import LARGE, in_huge_pages

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir()
    or os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
    reason="this system has no huge pages to ask for, or torch asks for all of them",
)


def is_advised(tensor: Tensor) -> bool:
    """Whether Linux remembers the wish for what lies in the middle of a tensor."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return " hg" in line
    raise AssertionError("the tensor is nowhere in memory")


def test_a_large_tensor_is_advised_and_unchanged():
    large = 4 * LARGE
    assert not is_advised(torch.empty(large))
    asked = torch.empty(large)
    assert in_huge_pages(asked) is asked
    assert is_advised(asked)
    assert asked.zero_().sum() == 0


def test_what_has_no_memory_here_is_left_alone():
    for tensor in (torch.empty(0), torch.empty(9), torch.empty(LARGE, device="meta")):
        assert in_huge_pages(tensor) is tensor
    with FakeTensorMode():
        fake = torch.empty(LARGE)
        assert in_huge_pages(fake) is fake


def test_experts_and_their_gradients_are_advised():
    experts = Experts(9, 512, 1024)
    rows = torch.randn(20, 512)
    experts(rows, torch.tensor([12, *[1] * 8]), "fused").sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert is_advised(parameter)
        assert is_advised(parameter.grad)
