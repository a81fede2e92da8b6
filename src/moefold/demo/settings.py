"""What the demo does, as data, and its three sizes."""

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch

from moefold.surgery import UpcycleConfig
from moefold.surgery.encoder import MINILM

Size = Literal["quick", "default", "full"]
LEAST_SEEDS_OF_FULL = 3
# What decides how far a run has come, or where it ran, but not what a finished part of it holds.
_NOT_IN_FINGERPRINT = ("size", "seeds")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """Everything that decides the demo's numbers, apart from the machine.

    Attributes:
        model: the dense encoder: `"minilm"`, a local folder, or a hub name.
        upcycle: what the mixture is and where.
        seeds: how often everything is trained: order of the data, dropout, and first router.
        examples: pairs the MoE and its dense twin are trained on, a multiple of `batch_size`.
        heldout: held-out pairs that are evaluated, the same ones everywhere; all if None.
        max_tokens: texts are cut after so many tokens.
        batch_size: pairs per step.
        learning_rate: of AdamW, the same for all models.
        warmup_examples: pairs over which the rate grows to its constant value.
        precision: of training and evaluation; `"auto"` is bf16 where the CPU multiplies it.
        device: where everything runs.
        fold: which fifth of the modules is held out. The settings above were chosen on fold 1.
        size: which of the three sizes this began as.
    """

    model: str = MINILM
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    seeds: int = 3
    examples: int = 1280
    heldout: int | None = 600
    max_tokens: int = 96
    batch_size: int = 32
    learning_rate: float = 5e-5
    warmup_examples: int = 160
    precision: str = "auto"
    device: str = "cpu"
    fold: int = 0
    size: Size = "default"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; train at least once, better 3 times or more")
        if self.size == "full" and self.seeds < LEAST_SEEDS_OF_FULL:
            raise ValueError(
                f"seeds is {self.seeds}; the full size takes at least {LEAST_SEEDS_OF_FULL}, "
                "because its interval is over seeds. Leave --full out, or raise --seeds"
            )
        if self.examples < self.batch_size or self.examples % self.batch_size:
            near = max(1, self.examples // self.batch_size) * self.batch_size
            raise ValueError(
                f"examples is {self.examples}; it must be a positive multiple of the batch size "
                f"{self.batch_size}, such as {near}"
            )
        if self.heldout is not None and self.heldout < 1:
            raise ValueError(
                f"heldout is {self.heldout}; evaluate at least 1 pair, or None for all"
            )
        if self.max_tokens < 8:
            raise ValueError(f"max_tokens is {self.max_tokens}; fewer than 8 leave nothing to read")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(
                f"precision is {self.precision!r}; it must be 'auto', 'fp32' or 'bf16'"
            )
        _check_device(self.device)

    def resolved(self) -> "DemoSettings":
        """The same with `"auto"` replaced by what it means on this machine."""
        if self.precision != "auto":
            return self
        return replace(self, precision="bf16" if _multiplies_bf16(self.device) else "fp32")

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["upcycle"] = self.upcycle.to_dict()
        return data

    def fingerprint(self, *parts: str) -> str:
        """A hash of everything that must agree for a finished run to be used again.

        The number of seeds is left out: a run with more of them uses the finished ones.
        """
        data = {k: v for k, v in self.to_dict().items() if k not in _NOT_IN_FINGERPRINT}
        text = json.dumps([data, *parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def quick(precision: str = "auto", device: str = "cpu") -> DemoSettings:
    """A look, in about a minute: one seed, so the interval says nothing about other seeds."""
    small = replace(DemoSettings(), size="quick", seeds=1, examples=256, heldout=300, max_tokens=64)
    return replace(small, precision=precision, device=device).resolved()


def default(precision: str = "auto", device: str = "cpu") -> DemoSettings:
    """What `moefold demo` does, in minutes on two cores; less of it where there is no bf16.

    A step in fp32 takes about three times as long as one in bf16, and the time is what is promised.
    """
    settings = DemoSettings(precision=precision, device=device).resolved()
    if settings.precision == "fp32":
        return replace(settings, seeds=2, examples=640)
    return settings


def full(precision: str = "auto", device: str = "cpu") -> DemoSettings:
    """The numbers worth quoting: more seeds, all held-out pairs, most of the pairs trained on."""
    large = replace(DemoSettings(), size="full", seeds=5, examples=2560, max_tokens=128)
    return replace(large, heldout=None, precision=precision, device=device).resolved()


SIZES = {"quick": quick, "default": default, "full": full}


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # unknown, or not compiled in, or not there
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used ({reason}); 'cpu' always can") from error


def _multiplies_bf16(device: str) -> bool:
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    has = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 does not tell: fp32 then
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_2"))
