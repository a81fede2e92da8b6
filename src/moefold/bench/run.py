"""Everything that was asked for, one part after the other, each written as soon as it is there."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moefold.bench.decode import run_decode
from moefold.bench.layer_runs import run_layer
from moefold.bench.memory import keep_freed_memory
from moefold.bench.models import ModelSettings, run_model
from moefold.bench.peers import AbstractPeer
from moefold.bench.results import KIND, PARTS, SCHEMA, load, surroundings, write_results
from moefold.bench.scaling import Scaling, run_scaling, scaling_to_dict
from moefold.bench.settings import Settings
from moefold.bench.shapes import SHAPES, Shape
from moefold.bench.timing import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to measure.

    Attributes:
        parts: of `results.PARTS`.
        settings: how.
        shapes: layers; those of another kind of device are written down as not measured.
        peers: whom to try beside them.
        models: which, and on what.
        scaling: how far curves go.
    """

    parts: tuple[str, ...] = ("layers", "decode", "models")
    settings: Settings = field(default_factory=Settings)
    shapes: tuple[Shape, ...] = tuple(SHAPES.values())
    peers: Sequence[AbstractPeer] = ()
    models: ModelSettings = field(default_factory=ModelSettings)
    scaling: Scaling = field(default_factory=Scaling)

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"unknown part {part!r}; there are {', '.join(PARTS)}")


def run(
    asked: Asked,
    file: Path,
    *,
    said: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure, and write what there is after every step.

    Args:
        asked: what.
        file: where results go.
        said: told what is going on.
        progress: told of each timed round.

    Returns:
        The results as they stand in the file.

    Raises:
        ValueError: the allocator cannot be told to keep memory.
    """
    settings = asked.settings
    if settings.allocator == "keep":
        keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return _run(asked, file, said, progress)
    finally:
        torch.set_num_threads(before)


def _run(
    asked: Asked, file: Path, said: Callable[[str], None], progress: Progress | None
) -> dict[str, Any]:
    settings = asked.settings
    results: dict[str, Any] = {
        "kind": KIND,
        "schema": SCHEMA,
        "surroundings": surroundings(settings.device),
        "settings": settings.to_dict(),
        "finished": False,
    }

    def keep(part: str, found: Any) -> None:
        results.setdefault(part, []).append(found)
        write_results(results, file)

    steps = {"said": said, "progress": progress}
    kind = torch.device(settings.device).type
    here = [shape for shape in asked.shapes if shape.device == kind]
    for dtype in settings.dtypes:
        for shape in here if "layers" in asked.parts else ():
            keep("layers", run_layer(shape, dtype, settings, asked.peers, **steps))
        for shape in here if "decode" in asked.parts else ():
            if shape.router == "token-choice":
                keep("decode", run_decode(shape, dtype, settings, asked.peers, **steps))
        for name in asked.models.models if "models" in asked.parts else ():
            keep("models", run_model(name, dtype, asked.models, settings, **steps))
        if "scaling" in asked.parts:
            for curve in run_scaling(asked.scaling, dtype, settings, **steps):
                keep("scaling", curve)
    if "models" in asked.parts:
        results["model_settings"] = asdict(asked.models)
    if "scaling" in asked.parts:
        results["scaling_settings"] = scaling_to_dict(asked.scaling)
    results["not_measured"] = [
        {"shape": shape.to_dict(), "why": f"it is for {shape.device}, and this run was on {kind}"}
        for shape in asked.shapes
        if shape.device != kind and "layers" in asked.parts
    ]
    results["surroundings"]["load_after"] = load()
    results["finished"] = True
    write_results(results, file)
    return results


__all__ = ["Asked", "run"]
