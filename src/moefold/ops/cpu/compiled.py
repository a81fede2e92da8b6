"""Compile the C files of this folder once on a machine, keep the library, and load it.

Nothing has to be installed and nothing is built with the package: where there is a C compiler, the
library is made when it is first asked for, which takes some seconds; where there is none, or where
this fails, `library` says why and whoever asks goes on with torch's operations.

Libraries lie in `$XDG_CACHE_HOME/moefold` (by default `~/.cache/moefold`), under a name made of the
source and of the command, so that neither is ever used with the other's.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
SWITCH = "MOEFOLD_COMPILE_EXPERTS"
"""Set to 0, this environment variable forbids to compile and to load anything."""

FLAGS = ("-std=c11", "-O3", "-mavx2", "-mfma", "-mf16c", "-fPIC", "-shared", "-fvisibility=hidden")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
PAIRS = ("-mavx512bf16",)
"""For products of pairs of bfloat16 numbers."""

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
    every = instructions()
    without = tuple(flag for flag in every if flag not in PAIRS)
    why_not = ""
    for flags in dict.fromkeys((every, without)):  # compilers from before 2020 know of no pairs
        try:
            return _loaded([*shlex.split(compiler), *FLAGS, *flags])
        except subprocess.CalledProcessError as error:
            why_not = f"compiling failed: {(error.stderr or str(error)).strip()}"
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            return f"making a library failed: {error}"
    return why_not


def _reason_against() -> str:
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 forbids it"
    if sys.platform == "win32":
        return "it was never compiled on Windows"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"it is written for x86-64, and this is {platform.machine()}"
    level = torch.backends.cpu.get_cpu_capability()
    if level not in ("AVX2", "AVX512"):
        return f"it is for processors with AVX2 or AVX-512; torch finds {level} here"
    return ""


def instructions() -> tuple[str, ...]:
    """Flags for what is used of the processor beside AVX2, as torch sees it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return ()
    # Units for matrices (AMX), which a library uses, are faster than pairs.
    pairs = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return (*AVX512, *PAIRS) if pairs else AVX512


def _loaded(command: list[str]) -> ctypes.CDLL:
    """The library, made anew if it is not there or cannot be loaded."""
    source = b"\0".join(path.read_bytes() for path in SOURCES)
    name = hashlib.sha256(source + "\0".join(command).encode()).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "moefold"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"others may write to {folder}; make it yours alone")
    made = folder / f"experts-{name}.so"
    if made.is_file():
        try:
            return ctypes.CDLL(str(made))
        except OSError:
            pass  # cut short, or made for another system: it is replaced below
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        part = Path(unfinished) / made.name
        subprocess.run(
            [*command, "-o", str(part), *(str(path) for path in SOURCES if path.suffix == ".c")],
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
        )
        library = ctypes.CDLL(str(part))
        part.replace(made)  # several processes may do this at once: each replaces like by like
    return library
