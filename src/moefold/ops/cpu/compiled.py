"""Compile the C file of this folder once on a machine, keep the library, and load it.

Nothing has to be installed and nothing is built with the package: where there is a C compiler, the
library is made when it is first asked for, which takes two seconds; where there is none, or where
this fails, `library` says why and whoever asks goes on with torch's operations.

Libraries lie in `$XDG_CACHE_HOME/moefold` (by default `~/.cache/moefold`), under a name made of the
source and of the command, so that neither is ever used with the other's.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("products.c")
SWITCH = "MOEFOLD_COMPILE_PRODUCTS"
"""Set to 0, this environment variable forbids to compile and to load anything."""

FLAGS = ("-std=c11", "-O3", "-mavx2", "-mfma", "-fPIC", "-shared")
PATIENCE = 120.0
"""Seconds after which a compiler is given up."""


@cache
def library() -> ctypes.CDLL | str:
    """The compiled library, or why there is none."""
    why_not = _reason_against()
    if why_not:
        return why_not
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        return "no C compiler was found: neither $CC, cc nor gcc"
    try:
        return ctypes.CDLL(str(_compiled([*compiler.split(), *FLAGS])))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"compiling {SOURCE.name} failed: {said.strip()}"


def _reason_against() -> str:
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 forbids it"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"it is written for x86-64, and this is {platform.machine()}"
    level = torch.backends.cpu.get_cpu_capability()
    if level != "AVX2":
        return f"it is for processors whose widest instructions are AVX2; torch finds {level} here"
    return ""


def _compiled(command: list[str]) -> Path:
    """Where the library lies, made if it is not there."""
    source = SOURCE.read_bytes()
    name = hashlib.sha256(source + "\0".join(command).encode()).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "moefold"
    made = folder / f"products-{name}.so"
    if made.is_file():
        return made
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        part = Path(unfinished) / made.name
        subprocess.run(
            [*command, "-o", str(part), str(SOURCE)],
            check=True,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        part.replace(made)  # several processes may do this at once: each replaces like by like
    return made
