"""Where a study ran: the machine and the state of the code, to stand beside its numbers."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def surroundings() -> dict[str, Any]:
    """The machine, the commit, and whether `src` differs from it."""
    return {
        "machine": _machine(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--", ":/src", ":/applications")),
    }


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str:
    found = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return found.stdout.strip()
