"""Programs in a process of their own, in which kernels are not defined for the interpreter."""

import os
import subprocess
import sys
from pathlib import Path


def run_compiled(program: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a program; what Triton compiles in it goes to `cache`, not to the user's."""
    surroundings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    surroundings["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
