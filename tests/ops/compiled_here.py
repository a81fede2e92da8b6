"""Tests of compiled code are skipped where there can be none, and fail where compiling it fails."""

import pytest

from moefold.ops.cpu.compiled import library

found = library()
needs_compiled_code = pytest.mark.skipif(
    isinstance(found, str) and not found.startswith("compiling"), reason=str(found)
)
