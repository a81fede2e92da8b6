"""Results as a file: what was measured, on what, and with which code."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from moefold.evaluate.files import whole_file
from moefold.evaluate.surroundings import processor
from moefold.ops.cpu.compiled import library

SCHEMA = 1
KIND = "moefold bench"
PARTS = ("layers", "decode", "models", "scaling")
_PACKAGES = ("moefold", "torch", "transformers", "sentence-transformers", "triton", "numpy")


_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_MEMORY = (
    "LD_PRELOAD",
    "MALLOC_CONF",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "THP_MEM_ALLOC_ENABLE",
)


def surroundings(device: str) -> dict[str, Any]:
    """What a number means nothing without.

    Versions, the commit and whether its source was changed, the processor, what torch uses of it,
    how many cores there are and how busy they were, what the environment says of threads that wait
    and of memory, whether products are compiled, and the accelerator.
    """
    compiled = library()
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        **_code(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "waiting": {name: os.environ[name] for name in _WAITING if name in os.environ},
        "memory": {name: os.environ[name] for name in _MEMORY if name in os.environ},
        "compiled experts": "no: " + compiled if isinstance(compiled, str) else "yes",
        "device": device,
        "load_before": load(),
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def load() -> list[float] | None:
    """Processes that wanted to run, on average over 1, 5 and 15 minutes; None if not known."""
    try:
        return [round(one, 2) for one in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def write_results(results: Mapping[str, Any], file: Path) -> None:
    """Write results; the file is there whole or not at all."""
    with whole_file(file) as beside:
        text = json.dumps(results, indent=1, allow_nan=False)
        beside.write_text(text + "\n", encoding="utf-8")


def read_results(file: Path) -> dict[str, Any]:
    """Read what `write_results` wrote.

    Raises:
        ValueError: it is no file of results, or one of another schema.
    """
    if not file.is_file():
        raise ValueError(f"no file at {file}; give what `moefold bench` wrote")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file ({error})") from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise ValueError(f"{file} holds no results of `moefold bench`")
    if found.get("schema") != SCHEMA:
        raise ValueError(
            f"{file} has schema {found.get('schema')}, and this version reads {SCHEMA}; measure "
            f"again, or take the version that wrote it"
        )
    return found


def results_folder() -> Path:
    """Where results go if nobody says: that of the checkout we are in, else here."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "benchmarks" / "layers").is_dir() and (folder / "src" / "moefold").is_dir():
            return folder / "benchmarks" / "results" / "local"
    return Path()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _code() -> dict[str, Any]:
    """The commit of the source that runs; None for an installed package."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--", str(here.parent))
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "uncommitted": None}
    return {"commit": commit, "uncommitted": bool(changed)}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, cwd=folder
    )
    return done.stdout.strip()


__all__ = [
    "KIND",
    "PARTS",
    "SCHEMA",
    "load",
    "read_results",
    "results_folder",
    "surroundings",
    "write_results",
]
