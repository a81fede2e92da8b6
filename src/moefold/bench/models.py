"""A sentence encoder, dense and upcycled: the time of a batch in inference.

Every other MLP becomes a mixture of 8 copies, top-1 or top-2. Copies with renormalised weights
compute what the dense encoder computes, which is checked before anything is timed.

Shapes: `batch tokens` of ids in, `batch tokens dim` out.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefold import routers
from moefold.bench.agreement import TOLERANCE
from moefold.bench.precision import DTYPES, as_run
from moefold.bench.settings import Settings
from moefold.bench.timing import (
    Pass,
    Progress,
    Seconds,
    clock_of,
    interleave,
    part,
    quartiles,
    ratios,
)
from moefold.moe import MoE, MoEConfig
from moefold.ops.flops import flop_counter
from moefold.surgery import UpcycleConfig, upcycle
from moefold.surgery.encoder import MINILM, pretrained_encoder

RANDOM = "bert-12"
"""Twelve layers of width 384, as MiniLM-L12, with random weights."""

DENSE = "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Which models, and on what.

    Attributes:
        models: `bert-12`, `minilm` for the packaged encoder, or a folder.
        batch: texts at once.
        length: tokens of a text.
        experts: of every mixture.
        ks: experts of a token; a mixture for each.
        sites: which MLPs, as `UpcycleConfig` takes it.
    """

    models: tuple[str, ...] = (MINILM, RANDOM)
    batch: int = 32
    length: int = 128
    experts: int = 8
    ks: tuple[int, ...] = (1, 2)
    sites: str = "every-other"

    def __post_init__(self) -> None:
        for name in ("batch", "length", "experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        for k in self.ks:
            if not 1 <= k <= self.experts:
                raise ValueError(f"k={k} of {self.experts} experts; it must be 1 to that many")


def run_model(
    name: str,
    dtype_name: str,
    which: ModelSettings,
    settings: Settings,
    *,
    said: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure one model in one dtype.

    Args:
        name: one of `which.models`.
        dtype_name: one of `precision.DTYPES`.
        which: batch, length and mixtures.
        settings: rounds, device and the rest.
        said: told what is going on.
        progress: told of each timed round.

    Returns:
        As JSON knows it; `refused` if the model cannot be opened.
    """
    result: dict[str, Any] = {
        "model": name,
        "dtype": dtype_name,
        "batch": which.batch,
        "length": which.length,
    }
    said(f"{name}, {dtype_name}: opening and upcycling")
    torch.manual_seed(settings.seed)
    try:
        dense = _opened(name).to(settings.device, DTYPES[dtype_name]).eval()
    except (ImportError, ValueError) as error:
        result["refused"] = str(error)
        return result
    vocabulary = int(dense.config.vocab_size)
    shape = (which.batch, which.length)
    inputs = [
        # The first hundred or so are special tokens, where there are that many.
        torch.randint(min(200, vocabulary // 2), vocabulary, shape).to(settings.device)
        for _ in range(settings.rounds + settings.warmup)
    ]
    models: dict[str, nn.Module] = {DENSE: as_run(dense, dtype_name, settings.device)}
    wanted = _hidden(models[DENSE], inputs[0])
    flops = _flops(dense, inputs[0])
    layers = int(getattr(dense.config, "num_hidden_layers", 1))
    # Every layer adds an error of its own, and independent ones add as the square root.
    tolerance = TOLERANCE[dtype_name] * math.sqrt(layers)
    records: list[dict[str, Any]] = [{"variant": DENSE, "flops_of_dense": 1.0}]
    for backend in settings.backends:
        for k in which.ks:
            variant = f"top-{k} of {which.experts}" + ("" if backend == "auto" else f", {backend}")
            record: dict[str, Any] = {"variant": variant, "k": k}
            records.append(record)
            mixture = _upcycled(dense, k, which, backend)
            running = as_run(mixture, dtype_name, settings.device)
            record["error"] = _relative(_hidden(running, inputs[0]), wanted)
            record["flops_of_dense"] = _flops(mixture, inputs[0]) / flops
            if not record["error"] <= tolerance:
                record["refused"] = (
                    f"it differs from the dense model by {record['error']:.1e}, which is more than "
                    f"{tolerance:.0e}"
                )
                continue
            models[variant] = running
    said(f"{name}, {dtype_name}: timing {len(models)} models")
    clock = clock_of(settings.device, settings.clock)
    seconds = interleave(
        {name: _pass(model) for name, model in models.items()},
        inputs,
        clock,
        warmup=settings.warmup,
        progress=progress,
    )
    for record in records:
        if record["variant"] in models:
            own = part(seconds[record["variant"]], "forward")
            record["ms"] = [1e3 * took for took in quartiles(list(own.values()))]
            # As the issue counts it here: how many times the dense model's time.
            record["times_dense"] = ratios(own, part(seconds[DENSE], "forward"))
    return {**result, "layers": layers, "tolerance": tolerance, "records": records}


def _opened(name: str) -> Any:
    if name == RANDOM:
        from transformers import BertConfig, BertModel

        return BertModel(
            BertConfig(
                hidden_size=384,
                intermediate_size=1536,
                num_hidden_layers=12,
                num_attention_heads=12,
            ),
            add_pooling_layer=False,
        )
    if name != MINILM and not Path(name).is_dir():
        raise ValueError(f"no folder at {name!r}; give one, or {MINILM}, or {RANDOM}")
    return pretrained_encoder(name)[0].auto_model


def _upcycled(dense: nn.Module, k: int, which: ModelSettings, backend: str) -> nn.Module:
    model = copy.deepcopy(dense)
    mixture = MoEConfig(
        num_experts=which.experts,
        router=routers.config("token-choice", k=k, renormalize=True),
        backend=backend,
    )
    upcycle(model, UpcycleConfig(moe=mixture, sites=which.sites), inputs=False)
    return model.eval()


@torch.inference_mode()
def _hidden(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).last_hidden_state.clone()


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _flops(model: Any, ids: Tensor) -> int:
    """Of a pass; by the reference backend, whose products torch can count."""
    mixtures = [module for module in model.modules() if isinstance(module, MoE)]
    backends = [mixture.backend for mixture in mixtures]
    for mixture in mixtures:
        mixture.backend = "reference"
    with flop_counter() as counter, torch.no_grad():
        model(input_ids=ids)
    for mixture, backend in zip(mixtures, backends, strict=True):
        mixture.backend = backend
    return counter.get_total_flops()


def _pass(model: Any) -> Pass[Tensor]:
    def run(ids: Tensor, clock: Callable[[], float]) -> Seconds:
        with torch.inference_mode():
            start = clock()
            model(input_ids=ids)
            took = clock() - start
        return Seconds(took, took)

    return run


__all__ = ["RANDOM", "ModelSettings", "run_model"]
