"""`moefold bench`: how fast a mixture is, beside the dense MLP it replaces and beside its peers."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, final

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moefold.bench.models import ModelSettings
from moefold.bench.page import write_page
from moefold.bench.peers import peers_named
from moefold.bench.results import read_results, results_folder
from moefold.bench.run import Asked, run
from moefold.bench.settings import Settings
from moefold.bench.shapes import SHAPES, Kind, Shape
from moefold.cli.options import parse

EXAMPLE = "moefold bench --tokens 64 --dim 32 --width 64 --rounds 3 --dtypes fp32 --parts layers"

Part = Literal["layers", "decode", "models", "scaling"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnShape:
    """A layer of one's own, in place of the named ones; each setting has a value if one is given.

    Attributes:
        tokens: of a pass, over all sequences (2048).
        sequences: how many they come in (1).
        dim: width of a token (512).
        width: hidden width of an expert (1024).
        experts: how many (8).
        router: who chooses (token-choice).
        k: experts of a token, for token-choice (2).
        capacity_factor: rows for each token on average, for expert-choice (1).
        slots: rows of an expert in each sequence, for soft (as many in all as tokens).
        plain: plain experts instead of gated ones.
    """

    tokens: int | None = None
    sequences: int | None = None
    dim: int | None = None
    width: int | None = None
    experts: int | None = None
    router: Kind | None = None
    k: int | None = None
    capacity_factor: float | None = None
    slots: int | None = None
    plain: bool = False

    def shape(self, device: str) -> Shape | None:
        """The shape, None if nothing was given.

        Raises:
            ValueError: the settings do not go together.
        """
        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in self.__slots__
            if name != "plain" and getattr(self, name) is not None
        }
        if not given and not self.plain:
            return None
        if given.get("router") == "soft" and "slots" not in given:
            default = Shape.__dataclass_fields__
            tokens = given.get("tokens", 2048) // given.get("sequences", 1)
            given["slots"] = max(1, tokens // given.get("experts", default["experts"].default))
        if "experts" in given and "k" not in given:
            given["k"] = min(2, given["experts"])
        kind = torch.device(device).type
        return Shape(
            name="own", gated=not self.plain, device="cuda" if kind == "cuda" else "cpu", **given
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Time layers and whole models beside others that compute the same; write JSON and a page.

    Attributes:
        parts: what to measure.
        scaling: measure how cost grows instead: with tokens, experts, k, width, group length.
        report: make the page of these files of results, and measure nothing.
        shapes: names of layers; those at home on the device if not said.
        dtypes: fp32, bf16, fp16, or amp for fp32 under autocast to bf16.
        backends: of our layer; auto is what a user gets, `moefold list backends` shows all.
        peers: whom to try beside it, by name; all, or none.
        models: minilm for the packaged encoder, bert-12 for a random one, or a folder.
        batch: texts at once, for models.
        length: tokens of a text, for models.
        rounds: how many are counted.
        warmup: rounds before them.
        seed: of weights and inputs.
        threads: of the CPU; as many as torch takes if not said.
        clock: cpu counts the time of this process; with one thread it holds on a shared machine.
        allocator: keep tells glibc not to give freed memory back to the system.
        gemm: size of the square product that rates are set beside; 1024, on a GPU 8192.
        most_seconds: a variant whose pass takes longer is not timed.
        device: cpu or cuda.
        output: folder for the files; benchmarks/results/local in a checkout, else this one.
        own: a layer of your own.
    """

    parts: tuple[Part, ...] = ("layers", "decode", "models")
    scaling: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    report: tuple[Path, ...] = ()
    shapes: tuple[str, ...] = ()
    dtypes: tuple[Literal["fp32", "bf16", "fp16", "amp"], ...] = ("fp32", "bf16")
    backends: tuple[str, ...] = ("auto",)
    peers: tuple[str, ...] = ("all",)
    models: tuple[str, ...] = ModelSettings().models
    batch: int = 32
    length: int = 128
    rounds: int = 15
    warmup: int = 5
    seed: int = 0
    threads: int | None = None
    clock: Literal["wall", "cpu"] = "wall"
    allocator: Literal["keep", "default"] = "keep"
    gemm: int | None = None
    most_seconds: float = 30.0
    device: str = "cpu"
    output: Path | None = None
    own: OwnShape = field(default_factory=OwnShape)


def main(arguments: Sequence[str]) -> None:
    """Runs the verb.

    Raises:
        ValueError: no such shape, peer, model or file, or settings that do not go together.
    """
    asked = parse(Arguments, arguments, verb="bench", example=EXAMPLE)
    folder = asked.output or results_folder()
    if asked.report:
        file = folder / "bench.html"
        write_page([read_results(one) for one in asked.report], file)
        print(f"wrote {file}")
        return
    todo = _todo(asked)
    console = Console(stderr=True)  # progress is not what the verb has to say
    file = folder / f"bench-{_now()}.json"
    with _Bars(console) as bars:
        results = run(todo, file, said=bars.said, progress=bars.progress)
    for line in _summary(results):
        print(line)
    page = file.with_suffix(".html")
    write_page([results], page)
    print(f"wrote {file} and {page.name}")


def _todo(asked: Arguments) -> Asked:
    own = asked.own.shape(asked.device)
    if own is not None and asked.shapes:
        raise ValueError("--shapes names layers, and the other settings describe one; give either")
    kind = torch.device(asked.device).type if asked.device in ("cpu", "cuda") else asked.device
    settings = Settings(
        rounds=asked.rounds,
        warmup=asked.warmup,
        seed=asked.seed,
        device=asked.device,
        threads=asked.threads or torch.get_num_threads(),
        clock=asked.clock,
        allocator=asked.allocator,
        dtypes=asked.dtypes,
        backends=asked.backends,
        gemm=asked.gemm or (8192 if kind.startswith("cuda") else 1024),
        most_seconds=asked.most_seconds,
    )
    return Asked(
        parts=("scaling",) if asked.scaling else asked.parts,
        settings=settings,
        shapes=_shapes(asked.shapes) if own is None else (own,),
        peers=peers_named(asked.peers),
        models=ModelSettings(models=asked.models, batch=asked.batch, length=asked.length),
    )


def _shapes(names: Sequence[str]) -> tuple[Shape, ...]:
    for name in names:
        if name not in SHAPES:
            near = difflib.get_close_matches(name, SHAPES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown shape {name!r}; {hint}There are: {', '.join(SHAPES)}")
    return tuple(SHAPES[name] for name in names or SHAPES)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S")


@final
class _Bars:
    """What is going on: a bar in a terminal, a line for each step elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task("", total=None)

    def __enter__(self) -> "_Bars":
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def said(self, text: str) -> None:
        """What comes next."""
        if self.console.is_terminal:
            self.bar.update(self.task, description=text, completed=0, total=None)
        else:
            self.console.print(text, highlight=False, soft_wrap=True)

    def progress(self, done: int, total: int) -> None:
        """Rounds."""
        self.bar.update(self.task, completed=done, total=total)


def _summary(results: dict[str, Any]) -> list[str]:
    """What the terminal shows: a line for each variant; the rest is in the files."""
    lines = []
    for entry in results.get("layers", ()):
        lines.append(f"{entry['shape']['name']}, {entry['dtype']}: share of the dense MLP's speed")
        lines += [_variant(record) for record in entry["records"] if _worth_a_line(record)]
    for entry in results.get("decode", ()):
        for point in entry["points"]:
            of = {r["variant"]: r["us"][1] for r in point["records"] if "us" in r}
            shown = ", ".join(f"{name} {us:.0f} µs" for name, us in of.items())
            lines.append(f"{entry['shape']['name']}, {entry['dtype']}, {point['tokens']}: {shown}")
    for entry in results.get("models", ()):
        title = f"{entry['model']}, {entry['dtype']}"
        if "refused" in entry:
            lines.append(f"{title}: not measured: {entry['refused']}")
        for record in entry.get("records", ()):
            if "ms" in record:
                lines.append(
                    f"{title}: {record['variant']} {record['ms'][1]:.0f} ms, "
                    f"{record['times_dense'][1]:.2f} times dense"
                )
    for curve in results.get("scaling", ()):
        for name, line in curve["lines"].items():
            fit = line.get("fit")
            grows = f"to the power of {fit['exponent']:.2f}" if fit else "one point only"
            lines.append(f"{curve['name']}, {curve['dtype']}: {name} grows {grows}")
    if left := results.get("not_measured"):
        names = ", ".join(one["shape"]["name"] for one in left)
        lines.append(f"not measured: {names}: {left[0]['why']}")
    return lines


def _worth_a_line(record: dict[str, Any]) -> bool:
    """Whether it was timed, or is ours, or is wrong; who merely cannot run is in the files."""
    return "both_ms" in record or record["kind"] == "ours" or bool(record.get("differs"))


def _variant(record: dict[str, Any]) -> str:
    name = f"  {record['variant']:<28}"
    if "refused" in record:
        return f"{name} not timed: {record['refused']}"
    ms = f"{record['both_ms'][1]:8.1f} ms"
    if "both_of_dense" not in record:
        return f"{name} {ms}  {record['both_gflops'][1]:.0f} GFLOP/s, not compared"
    low, middle, high = record["both_of_dense"]
    return f"{name} {ms}  {middle:.2f} [{low:.2f}, {high:.2f}]"
