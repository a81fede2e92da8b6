"""`moefold doctor`: what this machine has, and which backends can run on it.

Shapes: backends are asked about experts of width 64 on `rows dim` of width 32.
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moefold.cli.options import parse
from moefold.experts import Experts, explain_backends
from moefold.surgery.encoder import minilm_folder

EXAMPLE = "moefold doctor"

PACKAGES = (
    "moefold",
    "torch",
    "transformers",
    "sentence-transformers",
    "safetensors",
    "accelerate",
    "datasets",
    "matplotlib",
    "triton",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Say what this machine has, and for each backend whether it can run, or why not."""


def main(arguments: Sequence[str]) -> None:
    """Runs the verb."""
    parse(Arguments, arguments, verb="doctor", example=EXAMPLE)
    print("\n".join(["versions", *_versions(), "devices", *_devices(), "packaged encoder"]))
    print(f"  {_encoder()}")
    for device in _device_types():
        for dtype in DTYPES:
            print(f"backends on {device}, {str(dtype).removeprefix('torch.')}")
            print("\n".join(_backends(device, dtype)))


def _versions() -> Iterator[str]:
    yield f"  {'python':<22} {platform.python_version()}"
    for name in PACKAGES:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        yield f"  {name:<22} {found}"


def _devices() -> Iterator[str]:
    cores = os.cpu_count()
    yield f"  {'cpu':<22} {platform.machine()}, {cores} cores, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield f"  {f'cuda:{index}':<22} {facts.name}, {facts.total_memory / 2**30:.0f} GiB"


def _device_types() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _encoder() -> str:
    try:
        return str(minilm_folder())
    except ValueError as error:
        return str(error)


def _backends(device: str, dtype: torch.dtype) -> Iterator[str]:
    """One line for each backend: the first that can run is what `auto` takes."""
    experts = Experts(2, 32, 64, device=device, dtype=dtype)
    rows = torch.zeros(4, 32, device=device, dtype=dtype)
    taken = False
    for name, summary, reasons in explain_backends(rows, experts.weights):
        verdict = "can run" if taken else "can run, auto takes it"
        if reasons:
            verdict = f"cannot run: {'; '.join(reasons)}"
        taken = taken or not reasons
        yield f"  {name:<22} {verdict} ({summary})"
