"""The library is compiled once, and whoever has no compiler is told why there is none."""

import ctypes
import os
import stat
import subprocess
from pathlib import Path

import pytest
import torch

from moefold.ops.cpu import compiled
from moefold.ops.cpu.compiled import SWITCH, library
from tests.ops.compiled_here import needs_compiled_code


@pytest.fixture(autouse=True)
def _as_if_for_the_first_time(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(compiled.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    library.cache_clear()
    yield
    library.cache_clear()


def reason() -> str:
    said = library()
    assert isinstance(said, str)
    return said


def script(folder: Path, text: str) -> str:
    """A compiler that does what the text says."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_switch_forbids_it(monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    assert reason() == "MOEFOLD_COMPILE_EXPERTS=0 forbids it"


def test_other_processors_are_named(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert reason() == "it is for processors with AVX2 or AVX-512; torch finds DEFAULT here"
    library.cache_clear()
    monkeypatch.setattr(compiled.platform, "machine", lambda: "aarch64")
    assert reason() == "it is written for x86-64, and this is aarch64"


def test_what_a_processor_has_is_used(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert compiled.instructions() == ()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert compiled.instructions() == (*compiled.AVX512, *compiled.PAIRS)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert compiled.instructions() == compiled.AVX512
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert compiled.instructions() == compiled.AVX512


@needs_compiled_code
def test_a_compiler_that_does_not_know_of_pairs(monkeypatch, tmp_path):
    says_no = f'case "$*" in *{compiled.PAIRS[0]}*) exit 1;; esac; exec cc "$@"'
    monkeypatch.setenv("CC", script(tmp_path, says_no))
    # Not those of AVX-512, which this processor may not have.
    monkeypatch.setattr(compiled, "instructions", lambda: compiled.PAIRS)
    found = library()
    assert isinstance(found, ctypes.CDLL)
    assert not found.moefold_has_pairs()


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert reason() == "no C compiler was found: neither $CC, cc nor gcc"


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch, tmp_path):
    asked = tmp_path / "asked"
    monkeypatch.setenv("CC", script(tmp_path, f"echo >>{asked}; echo 'no such option' >&2; exit 1"))
    assert reason() == "compiling failed: no such option"
    assert asked.read_text() == "\n"  # there is nothing less to ask for
    assert list((tmp_path / "moefold").iterdir()) == []


def test_a_compiler_that_makes_nonsense_is_reported(monkeypatch, tmp_path):
    output = 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"'
    monkeypatch.setenv("CC", script(tmp_path, output))
    assert reason().startswith("making a library failed: ")
    assert list((tmp_path / "moefold").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_reported(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("CC", script(tmp_path, "exit 0"))
    assert reason().startswith("making a library failed: ")


def test_a_cache_that_others_may_write_to_is_not_trusted(tmp_path):
    (tmp_path / "moefold").mkdir()
    (tmp_path / "moefold").chmod(0o777)
    assert "others may write to" in reason()


def test_without_a_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(compiled.Path, "home", no_home)
    assert reason().endswith("failed: Could not determine home directory.")


@needs_compiled_code
def test_a_broken_library_is_made_anew(tmp_path):
    assert isinstance(library(), ctypes.CDLL)
    (made,) = (tmp_path / "moefold").iterdir()
    made.unlink()  # it is loaded: writing into it would change the code that runs
    made.write_text("cut short")
    library.cache_clear()
    assert isinstance(library(), ctypes.CDLL)
    assert made.stat().st_size > 1000


@needs_compiled_code
def test_it_is_compiled_once(monkeypatch, tmp_path):
    asked = []
    really = subprocess.run

    def run(command, **settings):
        asked.append(command)
        return really(command, **settings)

    monkeypatch.setattr(compiled.subprocess, "run", run)
    assert isinstance(library(), ctypes.CDLL)
    (made,) = (tmp_path / "moefold").iterdir()
    assert os.access(made, os.R_OK)
    assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    library.cache_clear()
    assert isinstance(library(), ctypes.CDLL)
    assert len(asked) == 1
    # Another command makes another library.
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-DOTHER"))
    library.cache_clear()
    assert isinstance(library(), ctypes.CDLL)
    assert len(asked) == len(list((tmp_path / "moefold").iterdir())) == 2
