"""Tests of compiled code are skipped where there can be none, and fail where compiling it fails."""

import pytest

from moefold.ops.cpu import compiled, experts, products, routing
from moefold.ops.cpu.compiled import AVX512, PAIRS, instructions, library

found = library()
needs_compiled_code = pytest.mark.skipif(
    isinstance(found, str) and not found.startswith("compiling"), reason=str(found)
)

IN_PAIRS = "pairs of bfloat16"
WITH = {"AVX2": (), "AVX-512": AVX512, IN_PAIRS: (*AVX512, *PAIRS)}
HERE = [name for name, flags in WITH.items() if set(flags) <= set(instructions())]
CACHED = (library, experts._functions, products._functions, routing._functions)


@pytest.fixture(params=HERE)
def instruction_set(request, monkeypatch):
    """The library as processors with fewer instructions would have it, too."""
    if request.param not in HERE:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(compiled, "instructions", lambda: WITH[request.param])
    _forget()
    yield request.param
    _forget()


with_pairs = pytest.mark.parametrize("instruction_set", [IN_PAIRS], indirect=True)


def _forget() -> None:
    for function in CACHED:
        function.cache_clear()
