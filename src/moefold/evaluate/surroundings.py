"""What belongs to a number: which weights, which versions, which machine."""

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn


def weights_sha256(model: nn.Module) -> str:
    """A hash of every weight by its name, for telling models apart."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def surroundings(packages: Sequence[str]) -> dict[str, Any]:
    """Versions and the machine."""
    return {
        "versions": {"python": platform.python_version(), **{n: version(n) for n in packages}},
        "machine": {"cpu": processor(), "threads": torch.get_num_threads()},
    }


def processor() -> str:
    """What the processor is called."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


__all__ = ["processor", "surroundings", "weights_sha256"]
