"""`moefold doctor`: what this machine has, which backends can run on it, and what a model leaks.

Shapes: backends are asked about experts of width 64 on `rows dim` of width 32; leakage is measured
on `batch tokens` of 2 x 32.
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moefold.cli.models import open_model
from moefold.cli.options import parse
from moefold.experts import Experts, explain_backends
from moefold.inspect.leakage import Leakage, leakage
from moefold.ops.cpu.compiled import library
from moefold.rerouting.saved import load
from moefold.surgery.encoder import minilm_folder
from moefold.surgery.saved import MANIFEST, REROUTED

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
    """Say what this machine has, and for each backend whether it can run, or why not.

    Attributes:
        leakage: instead, open the model in this folder (upcycled, rerouted or neither) and measure
            whether a later token, another sequence or padding changes a token, and whether tokens
            one by one are routed as all at once. Ends with status 1 if something leaks.
    """

    leakage: Path | None = None


def main(arguments: Sequence[str]) -> int:
    """Runs the verb; 1 if something leaks."""
    asked = parse(Arguments, arguments, verb="doctor", example=EXAMPLE)
    if asked.leakage is not None:
        found = measured(asked.leakage)
        print(found)
        return 0 if found.clean else 1
    print("\n".join(["versions", *_versions(), "devices", *_devices(), "packaged encoder"]))
    print(f"  {_encoder()}")
    for device in _device_types():
        for dtype in DTYPES:
            print(f"backends on {device}, {str(dtype).removeprefix('torch.')}")
            print("\n".join(_backends(device, dtype)))
    return 0


def measured(folder: Path) -> Leakage:
    """What leaks in a saved model, on texts made up of its own tokens.

    Raises:
        ValueError: the folder holds no model that takes token ids.
    """
    if (folder / MANIFEST).is_file() or (folder / REROUTED).is_file():
        model = load(folder)
    else:
        model = open_model(str(folder)).model
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(
            f"{folder} holds a {type(model).__name__}, which takes no token ids of its own; give "
            f"the folder of its transformer"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, size - 1), size, (2, 32), generator=generator)
    mask = torch.arange(32) < torch.tensor([[32], [20]])
    return leakage(model, {"input_ids": ids, "attention_mask": mask.long()})


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
    found = library()
    verdict = f"cannot be used: {found}" if isinstance(found, str) else "can be used"
    yield f"  {'compiled experts':<22} {verdict}"
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
