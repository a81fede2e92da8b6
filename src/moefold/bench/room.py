"""How much memory there is."""

from pathlib import Path

import torch


def available_bytes(device: str) -> int:
    """What can still be allocated on a device; a large number where nobody says."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.is_file() else []
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 2**62


__all__ = ["available_bytes"]
