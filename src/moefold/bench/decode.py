"""One layer on a few tokens, inference: what a decoder does at every step.

Such a pass is mostly reading weights, so it should touch the chosen experts only.

Shapes: `batch tokens dim` in and out, with a batch of 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moefold.bench.peers import AbstractPeer
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
from moefold.bench.variants import DENSE, OURS, Entrance

_CALLS = 5  # in a row for each timing: one takes as long as a clock's trouble


def run_decode(
    shape: Shape,
    dtype_name: str,
    settings: Settings,
    peers: Sequence[AbstractPeer],
    *,
    said: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a shape with few tokens in one dtype.

    Args:
        shape: the layer; its tokens and sequences do not matter.
        dtype_name: one of `precision.DTYPES`.
        settings: rounds, device and the rest.
        peers: which to try.
        said: told what is going on.
        progress: told of each timed round.

    Returns:
        As JSON knows it: `shape`, `dtype`, and for each number of tokens a record of each variant.
    """
    clock = clock_of(settings.device, settings.clock)
    points = []
    for number in settings.decode_tokens:
        said(f"{shape.name}, {dtype_name}, {number} tokens: checking and timing")
        small = replace(shape, tokens=number, sequences=1)
        # Of a few tokens, gradients of a router may all but cancel: what is left is rounding.
        entrance = Entrance.of_run(small, dtype_name, settings, training=False)
        timed, records = entrance.all(settings.backends, peers)
        timed = {name: v for name, v in timed.items() if "not_compared" not in v.record}
        passes = {name: _inference_pass(variant.layer) for name, variant in timed.items()}
        seconds = interleave(
            passes,
            [x.detach() for x in entrance.inputs],
            clock,
            warmup=settings.warmup,
            progress=progress,
        )
        for name, variant in timed.items():
            own = part(seconds[name], "forward")
            variant.record["us"] = [1e6 * took for took in quartiles(list(own.values()))]
            variant.record["of_dense"] = ratios(part(seconds[DENSE], "forward"), own)
            if OURS in seconds:
                variant.record["ours_faster"] = ratios(own, part(seconds[OURS], "forward"))
        points.append({"tokens": number, "records": records})
    return {"shape": shape.to_dict(), "dtype": dtype_name, "points": points}


def _inference_pass(layer: nn.Module) -> Pass[Tensor]:
    layer.eval()

    def run(x: Tensor, clock: Callable[[], float]) -> Seconds:
        with torch.inference_mode():
            start = clock()
            for _ in range(_CALLS):
                layer(x)
            took = (clock() - start) / _CALLS
        return Seconds(took, took)

    return run


__all__ = ["run_decode"]
