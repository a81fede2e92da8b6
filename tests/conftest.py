"""What every test starts from: its own seed, one thread, no network, and poisoned empty memory."""

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import tests.typechecker  # noqa: F401 - the typing hook looks it up by name

# Read by libraries when they are imported, hence here and not in a fixture. A value that the caller
# set stays: HF_HUB_OFFLINE=0 pytest -m network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined

OPS = Path(__file__).parent / "ops"
EMPTY = (
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.Tensor.new_empty,
    torch.Tensor.new_empty_strided,
)


class PoisonEmpty(TorchFunctionMode):
    """Memory that nobody wrote is NaN, or the largest integer, or True: reading it must show."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call `func`, then fill what it left unwritten."""
        result = func(*args, **(kwargs or {}))
        if func not in EMPTY or result.is_meta:
            return result
        if result.is_floating_point() or result.is_complex():
            return result.fill_(float("nan"))
        return result.fill_(True if result.dtype == torch.bool else torch.iinfo(result.dtype).max)


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed every generator from the test's own name, so that order and worker do not matter."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - for libraries that draw from the global generator
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one summation order, and no fighting between workers
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fill `torch.empty` and its relatives with NaN during one test."""
    with PoisonEmpty():
        yield


@pytest.fixture(autouse=True)
def _poison_in_ops(request: pytest.FixtureRequest) -> None:
    """Poison empty memory for all of tests/ops, except where the compiler would trace it."""
    if request.path.is_relative_to(OPS) and request.node.get_closest_marker("compile") is None:
        request.getfixturevalue("poisoned_empty")
