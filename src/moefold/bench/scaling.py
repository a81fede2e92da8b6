"""How cost grows: with tokens, experts, k, width and the length of a group; and memory with k.

    tokens, experts, k, width   a training pass of the layer, everything else as in `Scaling`
    group length                the same tokens in longer and fewer sequences, for several routers
    soft experts                inference of Soft MoE from 1 to 128 experts, as many slots in all
    memory                      of a training pass against k: experts of one width, and experts
                                that get finer so that k * width and all weights stay the same

Points of a curve are interleaved as variants are (see `timing`), and each has a fitted exponent.

Shapes: `batch tokens dim` in and out.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moefold import routers
from moefold.bench.fit import fit_power
from moefold.bench.layers import dense, ours
from moefold.bench.memory import parameter_bytes, peak_bytes
from moefold.bench.precision import DTYPES, as_run, result_dtype
from moefold.bench.settings import Settings
from moefold.bench.shapes import SHAPES, Shape
from moefold.bench.timing import Progress, Seconds, clock_of, interleave, part, quartiles
from moefold.moe import MoEConfig

# ViT-S: 128 of ViT-B's experts in every point of a curve would not fit everywhere.
_SOFT = replace(SHAPES["soft"], dim=384, width=1536, experts=128, slots=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """The layer in the middle of all curves, and how far each goes.

    Attributes:
        base: gated experts that tokens choose.
        tokens: of a pass.
        experts: how many.
        ks: experts of a token, out of `k_experts`.
        k_experts: how many experts there are while k grows, and while memory is measured.
        k_width: how wide each of them is.
        widths: hidden width of an expert.
        group_tokens: all tokens, however long their groups.
        group_lengths: tokens that compete or mix.
        routers: whose groups grow, by name, with settings; a soft one gets as many slots as tokens.
        soft: Soft MoE; its slots are shared by however many experts there are.
        soft_experts: how many.
        fine_ks: k while experts get finer, `k * width` and all weights staying the same.
    """

    base: Shape = field(default_factory=lambda: SHAPES["8x2"])
    tokens: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    experts: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    ks: tuple[int, ...] = (1, 2, 4, 8)
    k_experts: int = 16
    k_width: int = 512
    widths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    group_tokens: int = 4096
    group_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    routers: tuple[str, ...] = ("token-choice", "expert-choice", "unified", "soft")
    soft: Shape = field(default_factory=lambda: _SOFT)
    soft_experts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    fine_ks: tuple[int, ...] = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Point:
    """One place on a curve: a layer, and what its tokens look like."""

    x: int
    layer: nn.Module
    sequences: int
    tokens: int
    dim: int


def run_scaling(
    which: Scaling,
    dtype_name: str,
    settings: Settings,
    *,
    said: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure every curve in one dtype.

    Returns:
        As JSON knows it: for each curve its name, what x is and what is measured, and for each of
        its lines the points and the fit.
    """
    backend = settings.backends[0]
    curves = []
    for name, x_label, training, lines in _curves(which, backend):
        said(f"scaling, {dtype_name}: {name}")
        found = {}
        for line, shapes in lines.items():
            torch.manual_seed(settings.seed)
            # Built line by line: all layers of all lines at once might not fit.
            points = [make().to_point(x, dtype_name, settings.device) for x, make in shapes]
            found[line] = _times(points, dtype_name, settings, training, progress)
            del points
        curves.append(
            {
                "name": name,
                "dtype": dtype_name,
                "x": x_label,
                "y": "ms of a training pass" if training else "ms of an inference pass",
                "lines": found,
            }
        )
    said(f"scaling, {dtype_name}: memory")
    curves += _memory(which, dtype_name, settings)
    return curves


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Made:
    """A layer before it is moved to where it runs."""

    layer: nn.Module
    sequences: int
    tokens: int
    dim: int

    def to_point(self, x: int, dtype_name: str, device: str) -> _Point:
        """As a point."""
        return _Point(
            x=x,
            layer=as_run(self.layer.to(device, DTYPES[dtype_name]), dtype_name, device),
            sequences=self.sequences,
            tokens=self.tokens,
            dim=self.dim,
        )


Line = Sequence[tuple[int, Callable[[], _Made]]]


def _curves(which: Scaling, backend: str) -> list[tuple[str, str, bool, dict[str, Line]]]:
    """Name, what x is, whether training or inference, and lines, of every curve of times."""
    base = which.base

    def both(shapes: dict[int, Shape]) -> dict[str, Line]:
        def mixture(shape: Shape) -> Callable[[], _Made]:
            return lambda: _of(shape, ours(shape, backend))

        def yardstick(shape: Shape) -> Callable[[], _Made]:
            return lambda: _of(shape, dense(shape))

        return {
            "moefold": [(x, mixture(shape)) for x, shape in shapes.items()],
            "dense": [(x, yardstick(shape)) for x, shape in shapes.items()],
        }

    k_base = replace(base, experts=which.k_experts, width=which.k_width, k=1)
    slots = which.soft.experts * which.soft.slots
    soft = {e: replace(which.soft, experts=e, slots=slots // e) for e in which.soft_experts}
    widths = {w: replace(base, width=w) for w in which.widths}
    return [
        ("tokens", "tokens", True, both({n: replace(base, tokens=n) for n in which.tokens})),
        ("experts", "experts", True, both({n: replace(base, experts=n) for n in which.experts})),
        ("k", "experts of a token", True, both({k: replace(k_base, k=k) for k in which.ks})),
        (
            "width",
            "width of an expert",
            True,
            both(widths),
        ),
        ("group length", "tokens of a group", True, _groups(which, backend)),
        ("soft experts", "experts, with as many slots in all", False, both(soft)),
    ]


def _of(shape: Shape, layer: nn.Module) -> _Made:
    tokens = shape.tokens // shape.sequences
    return _Made(layer=layer, sequences=shape.sequences, tokens=tokens, dim=shape.dim)


def _groups(which: Scaling, backend: str) -> dict[str, Line]:
    base = which.base

    def make(name: str, length: int) -> Callable[[], _Made]:
        def made() -> _Made:
            given: dict[str, dict[str, Any]] = {
                "token-choice": {"k": base.k, "renormalize": True},
                "expert-choice": {"capacity_factor": float(base.k)},
                "unified": {"budget": float(base.k)},
                "soft": {"slots": max(1, length // base.experts)},
            }
            config = MoEConfig(
                num_experts=base.experts,
                expert_width=base.width,
                router=routers.config(name, **given.get(name, {})),
                gated=base.gated,
                activation="silu",
                backend=backend,
                losses={},
            )
            return _Made(
                layer=config.build(base.dim),
                sequences=max(1, which.group_tokens // length),
                tokens=length,
                dim=base.dim,
            )

        return made

    return {name: [(n, make(name, n)) for n in which.group_lengths] for name in which.routers}


def _times(
    points: Sequence[_Point],
    dtype_name: str,
    settings: Settings,
    training: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    """Times of all points of a line, interleaved, and how they grow."""
    clock = clock_of(settings.device, settings.clock)
    seconds = interleave(
        {str(point.x): _pass(point, dtype_name, settings.device, training) for point in points},
        list(range(settings.warmup + settings.rounds)),
        clock,
        warmup=settings.warmup,
        progress=progress,
    )
    times = [part(seconds[str(point.x)], "both") for point in points]
    ms = [[1e3 * took for took in quartiles(list(one.values()))] for one in times]
    x = [point.x for point in points]
    result: dict[str, Any] = {"x": x, "ms": ms}
    if len(x) > 1:
        result["fit"] = fit_power(x, [middle for _, middle, _ in ms]).to_dict()
    return result


def _pass(
    point: _Point, dtype_name: str, device: str, training: bool
) -> Callable[[int, Callable[[], float]], Seconds]:
    """A pass over tokens of its own; they are drawn before the clock starts."""
    point.layer.train(training)

    def run(turn: int, clock: Callable[[], float]) -> Seconds:
        x = torch.randn(point.sequences, point.tokens, point.dim).to(device, DTYPES[dtype_name])
        if not training:
            with torch.inference_mode():
                start = clock()
                point.layer(x)
                took = clock() - start
            return Seconds(took, took)
        back = torch.randn_like(x, dtype=result_dtype(dtype_name))
        x.requires_grad_()
        start = clock()
        y = point.layer(x)
        middle = clock()
        y.backward(back)
        took = Seconds(middle - start, clock() - start)
        point.layer.zero_grad(set_to_none=True)  # or all points' gradients stay
        return took

    return run


def _memory(which: Scaling, dtype_name: str, settings: Settings) -> list[dict[str, Any]]:
    """Bytes of a training pass beside weights and their gradients, against k."""
    base = which.base
    same_width = {
        k: replace(base, experts=which.k_experts, width=which.k_width, k=k) for k in which.ks
    }
    active, total = base.k * base.width, base.experts * base.width
    finer = {
        k: replace(base, k=k, width=active // k, experts=max(k, total * k // active))
        for k in which.fine_ks
    }
    curves = []
    for name, shapes in (
        ("memory, experts of one width", same_width),
        ("memory, finer experts", finer),
    ):
        lines = {}
        for line, make in (("moefold", lambda s: ours(s, settings.backends[0])), ("dense", dense)):
            mib = []
            for shape in shapes.values():
                torch.manual_seed(settings.seed)
                mib.append(_beside_weights(make(shape), shape, dtype_name, settings.device) / 2**20)
            lines[line] = {"x": list(shapes), "mib": mib}
            if len(mib) > 1:
                lines[line]["fit"] = fit_power(list(shapes), mib).to_dict()
        curves.append(
            {
                "name": name,
                "dtype": dtype_name,
                "x": "experts of a token",
                "y": "MiB beside weights and their gradients",
                "lines": lines,
            }
        )
    return curves


def _beside_weights(layer: nn.Module, shape: Shape, dtype_name: str, device: str) -> int:
    dtype, tokens = DTYPES[dtype_name], shape.tokens // shape.sequences
    layer = as_run(layer.to(device, dtype), dtype_name, device)
    x = torch.randn(shape.sequences, tokens, shape.dim).to(device, dtype).requires_grad_()
    back = torch.randn(x.shape).to(device, result_dtype(dtype_name))

    def run() -> Tensor:
        y = layer(x)
        y.backward(back)
        return y

    return peak_bytes(run, device) - parameter_bytes(layer)


def scaling_to_dict(which: Scaling) -> dict[str, Any]:
    """As JSON knows it."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(which).items()
    }


__all__ = ["Scaling", "run_scaling", "scaling_to_dict"]
