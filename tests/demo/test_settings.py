"""The demo's settings: what is refused, and what makes a finished run somebody else's."""

from dataclasses import replace

import pytest

import moefold
from moefold.demo import settings as module
from moefold.demo.settings import SIZES, DemoSettings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds is 0; train at least once"),
        ({"seeds": 2, "size": "full"}, "seeds is 2; the full size takes at least 3"),
        ({"examples": 100}, "examples is 100; .* multiple of the batch size 32, such as 96"),
        ({"examples": 0}, "examples is 0; .* such as 32"),
        ({"heldout": 0}, "heldout is 0"),
        ({"max_tokens": 2}, "max_tokens is 2"),
        ({"device": "gpu"}, "device 'gpu' cannot be used .*; 'cpu' always can"),
        ({"precision": "int8"}, "precision is 'int8'; it must be 'auto', 'fp32' or 'bf16'"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DemoSettings(**changes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_sizes_are_valid_and_grow(precision):
    quick, default, full = (SIZES[name](precision) for name in ("quick", "default", "full"))
    assert {one.precision for one in (quick, default, full)} == {precision}
    assert quick.seeds * quick.examples < default.seeds * default.examples
    assert default.seeds * default.examples < full.seeds * full.examples
    assert full.seeds >= 3


def test_a_slower_precision_does_less_by_default():
    slow, fast = SIZES["default"]("fp32"), SIZES["default"]("bf16")
    assert slow.seeds * slow.examples < fast.seeds * fast.examples


def test_auto_is_what_the_processor_has(monkeypatch):
    for has, precision in (({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "fp32"), ({}, "fp32")):
        monkeypatch.setattr(module.torch.cpu, "get_capabilities", lambda has=has: has)
        assert DemoSettings().resolved().precision == precision
    assert DemoSettings(precision="bf16").resolved().precision == "bf16"


def test_a_fingerprint_changes_with_what_decides_the_numbers():
    base = DemoSettings()
    config = moefold.UpcycleConfig(sites="last:1")
    other = [
        replace(base, examples=320),
        replace(base, learning_rate=1e-4),
        replace(base, upcycle=config),
        replace(base, precision="fp32"),
        replace(base, fold=1),
    ]
    prints = {one.fingerprint("data") for one in [base, *other]} | {base.fingerprint("other data")}
    assert len(prints) == len(other) + 2


def test_a_fingerprint_does_not_change_with_more_seeds():
    # So that a run with more seeds takes up the finished ones.
    base = DemoSettings()
    assert base.fingerprint() == replace(base, seeds=7).fingerprint()
