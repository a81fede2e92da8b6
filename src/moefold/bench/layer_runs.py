"""Layers, side by side: ours, every peer that can run, the dense MLP and a plain product.

    check    every variant against the reference, values and gradients
    memory   of a training pass
    time     all that agree, interleaved (see `timing`)
    empty    what a pass without any token costs

Shapes: `batch tokens dim` in and out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moefold.bench.agreement import TOLERANCE
from moefold.bench.memory import parameter_bytes, peak_bytes
from moefold.bench.peers import AbstractPeer
from moefold.bench.precision import DTYPES, result_dtype
from moefold.bench.settings import Settings
from moefold.bench.shapes import Shape
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
from moefold.bench.variants import DENSE, OURS, Entrance, Variant

GEMM = "product"
PARTS = ("forward", "backward", "both")
_SLOW = 20  # times as long as the dense MLP: such a variant runs in a few rounds only


def run_layer(
    shape: Shape,
    dtype_name: str,
    settings: Settings,
    peers: Sequence[AbstractPeer],
    *,
    said: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure one shape in one dtype.

    Args:
        shape: the layer.
        dtype_name: one of `precision.DTYPES`.
        settings: rounds, device and the rest.
        peers: which to try.
        said: told what is going on.
        progress: told of each timed round.

    Returns:
        As JSON knows it: `shape`, `dtype`, and a record for each variant.
    """
    device = settings.device
    entrance = Entrance.of_run(shape, dtype_name, settings)
    inputs, back = entrance.inputs, entrance.back
    assert back is not None
    said(f"{shape.name}, {dtype_name}: checking")
    timed, records = entrance.all(settings.backends, peers)
    del entrance  # it holds the gradients that were compared

    clock = clock_of(device, settings.clock)
    passes: dict[str, Pass[Tensor]] = {}
    for name, variant in timed.items():
        passes[name] = _training_pass(variant.layer, back)
        # What a library compiles at the first pass is not what a pass takes.
        variant.first = passes[name](inputs[0], clock).both
    slow = _too_slow(timed, settings.most_seconds)
    for name in slow:
        del passes[name], timed[name]
    passes[GEMM], gemm_flops = _product(settings.gemm, result_dtype(dtype_name), device)
    limit = _SLOW * timed[DENSE].first
    few = [name for name, variant in timed.items() if variant.first > limit]
    said(f"{shape.name}, {dtype_name}: timing {len(passes)} variants")
    seconds = interleave(passes, inputs, clock, warmup=settings.warmup, few=few, progress=progress)
    gemm = {turn: gemm_flops / took.both for turn, took in seconds[GEMM].items()}
    for name, variant in timed.items():
        variant.record.update(_summary(name, variant, seconds, gemm))
        variant.record["memory"] = _memory(variant.layer, inputs[0], back, device)
        if variant.record["kind"] == "ours":
            variant.record["empty_us"] = _empty(variant.layer, shape, dtype_name, settings)
    _memory_against_dense(records)
    return {
        "shape": shape.to_dict(),
        "dtype": dtype_name,
        "tolerance": TOLERANCE[dtype_name],
        "product": {
            "size": settings.gemm,
            "gflops": [rate / 1e9 for rate in quartiles(list(gemm.values()))],
        },
        "records": records,
    }


def _training_pass(layer: nn.Module, back: Tensor) -> Pass[Tensor]:
    def run(x: Tensor, clock: Callable[[], float]) -> Seconds:
        # Gradients are freed between passes, as zero_grad() does.
        layer.zero_grad(set_to_none=True)
        x.grad = None
        start = clock()
        y = layer(x)
        middle = clock()
        y.backward(back)
        return Seconds(middle - start, clock() - start)

    return run


def _product(size: int, dtype: torch.dtype, device: str) -> tuple[Pass[Tensor], int]:
    """A square product of other numbers each time, and its operations."""
    a = torch.randn(size, size).to(device, dtype)
    b = torch.randn(size, size).to(device, dtype)
    out = torch.empty_like(a)

    def run(x: Tensor, clock: Callable[[], float]) -> Seconds:
        start = clock()
        torch.mm(a, b, out=out)
        took = clock() - start
        return Seconds(took, took)

    return run, 2 * size**3


def _too_slow(timed: dict[str, Variant], most_seconds: float) -> list[str]:
    slow = [name for name, v in timed.items() if v.first > most_seconds and name != DENSE]
    for name in slow:
        timed[name].record["refused"] = (
            f"one pass took {timed[name].first:.0f} s, more than the {most_seconds:g} s that a "
            f"pass may take"
        )
    return slow


def _summary(
    name: str,
    variant: Variant,
    seconds: dict[str, dict[int, Seconds]],
    gemm: dict[int, float],
) -> dict[str, Any]:
    """Medians with quartiles: ms, the dense MLP's time over its own, and rates.

    A rate is operations that had to be done (three times those of the forward pass, for both) over
    time; of a variant that is not compared, operations that it did.
    """
    own = seconds[name]
    result: dict[str, Any] = {"rounds": len(own)}
    work = {"forward": 1, "backward": 2, "both": 3}
    for what in PARTS:
        times = part(own, what)
        rate = {turn: work[what] * variant.flops / took for turn, took in times.items()}
        result[f"{what}_ms"] = [took * 1e3 for took in quartiles(list(times.values()))]
        result[f"{what}_gflops"] = [r / 1e9 for r in quartiles(list(rate.values()))]
        result[f"{what}_of_product"] = ratios(rate, gemm)
        if "not_compared" not in variant.record:
            result[f"{what}_of_dense"] = ratios(part(seconds[DENSE], what), times)
            if OURS in seconds:
                result[f"{what}_ours_faster"] = ratios(times, part(seconds[OURS], what))
    return result


def _memory(layer: nn.Module, x: Tensor, back: Tensor, device: str) -> dict[str, int]:
    layer.zero_grad(set_to_none=True)
    x.grad = None

    def run() -> Tensor:
        y = layer(x)
        y.backward(back)
        return y

    peak = peak_bytes(run, device)
    layer.zero_grad(set_to_none=True)
    x.grad = None
    weights = parameter_bytes(layer)
    return {"weights": weights, "peak": weights + peak}


def _memory_against_dense(records: list[dict[str, Any]]) -> None:
    """Set beside the dense MLP: `of_dense` is what is allowed to be 1.15.

    The peak of a training pass, less the weights and gradients that it has beyond those of the
    dense MLP, over the peak of the dense MLP.
    """
    found = {record["variant"]: record["memory"] for record in records if "memory" in record}
    for memory in found.values():
        more = 2 * (memory["weights"] - found[DENSE]["weights"])
        memory["of_dense"] = (memory["peak"] - more) / found[DENSE]["peak"]


def _empty(
    layer: nn.Module, shape: Shape, dtype_name: str, settings: Settings
) -> dict[str, list[float]]:
    """Microseconds of a pass of no token, for training and under `inference_mode`."""
    device, dtype, calls = settings.device, DTYPES[dtype_name], settings.empty_calls
    clock = clock_of(device, settings.clock)
    x = torch.empty(1, 0, shape.dim, dtype=dtype, device=device, requires_grad=True)
    back = torch.empty(1, 0, shape.dim, dtype=result_dtype(dtype_name), device=device)
    run = _training_pass(layer, back)
    took = [run(x, clock) for _ in range(calls)][calls // 10 :]
    result = {
        "forward": [s * 1e6 for s in quartiles([t.forward for t in took])],
        "both": [s * 1e6 for s in quartiles([t.both for t in took])],
    }
    times = []
    with torch.inference_mode():
        nothing = torch.empty(1, 0, shape.dim, dtype=dtype, device=device)
        # So short that all would fit in one busy spell of a machine that others use too.
        for _ in range(10 * calls):
            start = clock()
            layer(nothing)
            times.append(clock() - start)
    result["inference"] = [s * 1e6 for s in quartiles(times[calls:])]
    return result


__all__ = ["GEMM", "PARTS", "run_layer"]
