"""What changes a measurement and is no property of a layer."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from moefold.bench.precision import DTYPES
from moefold.bench.timing import Clock
from moefold.experts.backends import AUTO, backends


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: how many are counted.
        warmup: rounds before them.
        seed: of weights and inputs.
        device: such as `cpu` or `cuda`.
        threads: on the CPU.
        clock: `cpu` is the time of this process; with one thread it holds on a shared machine.
        allocator: `keep` tells glibc to keep what is freed, see `memory.keep_freed_memory`.
        dtypes: which of `precision.DTYPES`.
        backends: of ours; `auto` is what a user gets.
        gemm: size of the square product whose rate others are compared with.
        most_seconds: a variant whose pass takes longer is not timed.
        empty_calls: training passes of no token; of inference there are ten times as many.
        decode_tokens: numbers of tokens, for what a decoder does.
    """

    rounds: int = 15
    warmup: int = 5
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    clock: Clock = "wall"
    allocator: Literal["keep", "default"] = "keep"
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    backends: tuple[str, ...] = ("auto",)
    gemm: int = 1024
    most_seconds: float = 30.0
    empty_calls: int = 200
    decode_tokens: tuple[int, ...] = (1, 2, 4, 8, 16)

    def __post_init__(self) -> None:
        for name in ("rounds", "threads", "gemm", "empty_calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: it must be at least 0")
        for name in self.dtypes:
            if name not in DTYPES:
                raise ValueError(f"unknown dtype {name!r}; there are {', '.join(DTYPES)}")
        for name in self.backends:
            if name != AUTO:
                backends.get(name)
        if not self.backends or not self.dtypes:
            raise ValueError("give at least one of dtypes and backends")
        try:
            kind = torch.device(self.device).type
        except RuntimeError as error:
            raise ValueError(f"unknown device {self.device!r}; give cpu or cuda") from error
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"no clock for device {self.device!r}; give cpu or cuda")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r} is not there; give --device cpu")

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


__all__ = ["Settings"]
