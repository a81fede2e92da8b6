"""Counted memory: to the byte, on layers whose bytes are known."""

import pytest
import torch
from torch import nn

from moefold.bench import memory
from moefold.bench.memory import keep_freed_memory, parameter_bytes, peak_bytes
from moefold.bench.room import available_bytes


def test_a_product_and_its_gradients():
    layer = nn.Linear(64, 32, bias=False)
    x, back = torch.randn(16, 64, requires_grad=True), torch.randn(16, 32)

    def run():
        y = layer(x)
        y.backward(back)
        return y

    result, of_weight, of_x = 16 * 32, 32 * 64, 16 * 64
    assert peak_bytes(run, "cpu") == 4 * (result + of_weight + of_x)
    assert parameter_bytes(layer) == 4 * of_weight


def test_what_is_freed_before_the_end_counts_at_its_peak():
    x = torch.zeros(100)

    def run():
        large = x.repeat(10)
        small = large[:100].clone()
        del large
        return small

    assert peak_bytes(run, "cpu") == 4 * 1100


def test_another_allocator_is_refused(monkeypatch):
    class Musl:
        def __init__(self, name):
            pass

    monkeypatch.setattr(memory.ctypes, "CDLL", Musl)
    with pytest.raises(ValueError, match="not glibc's and cannot be told to keep memory; use --al"):
        keep_freed_memory()


def test_some_memory_is_available():
    assert 2**20 < available_bytes("cpu") <= 2**62
