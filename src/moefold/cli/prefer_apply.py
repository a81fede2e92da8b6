"""`moefold prefer rank` and `moefold prefer evaluate`: what a saved model makes of decisions."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import tyro
from rich.console import Console
from torch import Tensor

from moefold.cli.options import parse
from moefold.cli.prefer import in_words, moving, write_json
from moefold.preference import Groups, collapsed
from moefold.preference.model import PreferenceModel, softmax
from moefold.preference.page import SHOWN, add_rankings, add_report, add_settings
from moefold.preference.reading import read
from moefold.preference.report import measure
from moefold.preference.saved import MANIFEST, load
from moefold.surgery.encoder import sha256_of

RANK_EXAMPLE = "moefold prefer rank my-expert candidates.jsonl"
EVALUATE_EXAMPLE = "moefold prefer evaluate my-expert choices.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """Put the candidates of every decision in the order in which a saved model would choose them.

    What is written has a line for each decision: {"best": 2, "ranking": [2, 0, 1], "values": [...],
    "chances": [...]}, and a page shows the first of them. A run that was interrupted goes on when
    the same line is run again.

    Attributes:
        model: a folder that moefold prefer fit wrote.
        candidates: decisions, a line each, as {"candidates": [[0.1, 2], [0.3, 1]]} (.jsonl,
            .jsonl.xz, .jsonl.gz or .parquet).
        output: .jsonl to write; the name of the candidates with -ranked if not said.
        device: where to compute: cpu, cuda.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    candidates: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CANDIDATES")]
    output: Annotated[Path | None, tyro.conf.arg(aliases=["--out"])] = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Count how often a saved model chooses as the expert did.

    Decisions of one candidate are left out, and candidates that are the same twice. A run that was
    interrupted goes on when the same line is run again.

    Attributes:
        model: a folder that moefold prefer fit wrote.
        data: decisions with what the expert chose, as for moefold prefer fit.
        output: .json for the numbers, with a page beside it; named by the model and the data if not
            said.
        device: where to compute: cpu, cuda.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    output: Annotated[Path | None, tyro.conf.arg(aliases=["--out"])] = None
    device: str = "cpu"


def main_rank(arguments: Sequence[str]) -> None:
    """Runs `moefold prefer rank`.

    Raises:
        ValueError: whatever opening the model and reading refuse.
    """
    asked = parse(Rank, arguments, verb="prefer rank", example=RANK_EXAMPLE)
    output = asked.output or Path(f"{_stem(asked.candidates)}-ranked.jsonl")
    transformers.utils.logging.disable_progress_bar()
    model = load(asked.model).to(asked.device)
    new = output.with_name(f".{output.name}.new")
    shown: list[Any] = []
    total = 0
    with new.open("w", encoding="utf-8") as stream:
        for groups, values in _valued(model, asked.model, asked.candidates, output, forced="keep"):
            chances = softmax(values / model.temperature, groups) if _has_chances(model) else None
            for ranked in _ranked(groups, values, chances):
                stream.write(json.dumps(ranked) + "\n")
            if total < SHOWN:
                shown += _shown(groups, values, chances, SHOWN - total)
            total += len(groups)
    new.replace(output)
    _partial(output).unlink()
    page = _page(output.stem, "Candidates in the order in which the model would choose them.")
    add_rankings(page, shown, total=total)
    add_settings(page, {"model": asked.model, "candidates": asked.candidates})
    page.write(output.with_suffix(".html"))
    print(f"{total:,} decisions ranked; wrote {output} and {output.with_suffix('.html')}")


def main_evaluate(arguments: Sequence[str]) -> None:
    """Runs `moefold prefer evaluate`.

    Raises:
        ValueError: whatever opening the model and reading refuse, or data that do not say what the
            expert chose.
    """
    asked = parse(Evaluate, arguments, verb="prefer evaluate", example=EVALUATE_EXAMPLE)
    output = asked.output or Path(f"{asked.model.name}-{_stem(asked.data)}.json")
    transformers.utils.logging.disable_progress_bar()
    model = load(asked.model).to(asked.device)
    parts, values = [], []
    for groups, own in _valued(model, asked.model, asked.data, output, forced="drop"):
        if not groups.is_labelled:
            raise ValueError(
                f'{asked.data} says nothing of what the expert chose; add "chosen", "ranking" or '
                f'"utilities" to every line, or use moefold prefer rank'
            )
        parts.append(groups)
        values.append(own)
    if not parts:
        raise ValueError(f"{asked.data} holds no decision of two candidates or more; give others")
    report = measure(model, Groups.concatenate(parts), values=torch.cat(values))
    write_json(output, report.to_dict())
    _partial(output).unlink()
    page = _page(
        f"{asked.model.name} on {asked.data.name}", "How far its choices are the expert's."
    )
    add_report(page, report)
    add_settings(page, {"model": asked.model, "data": asked.data})
    page.write(output.with_suffix(".html"))
    print("\n".join(in_words(report)))
    print(f"wrote {output} and {output.with_suffix('.html')}")


def _valued(
    model: PreferenceModel, folder: Path, data: Path, output: Path, *, forced: str
) -> Iterator[tuple[Groups, Tensor]]:
    """The decisions of a file, a piece at a time, with what the model makes of their candidates.

    Values are kept in a file beside the output, from which they are taken if there are some.
    """
    from moefold.demo.bars import Bars  # its package trains models, for which libraries are read

    partial = _partial(output)
    run = {"model": sha256_of(folder / MANIFEST), "data": sha256_of(data), "forced": forced}
    known = _kept(partial, run)
    new = partial.with_name(f".{partial.name}.new")
    new.write_text("".join(json.dumps(line) + "\n" for line in [run, *known]), encoding="utf-8")
    new.replace(partial)
    with Bars(Console(stderr=True), str(data)) as bars, partial.open("a", encoding="utf-8") as kept:
        if known:
            bars.say(f"{sum(map(len, known)):,} candidates were valued before")
        pieces = read(data, at_once=_AT_ONCE, forced=forced, advance=moving(bars))
        for number, groups in enumerate(pieces):
            if forced == "drop":  # for judging, where what is the same twice is one alternative
                groups, _ = collapsed(groups)
            if number < len(known):
                values = torch.tensor(known[number], dtype=torch.float64)
            else:
                values = model.values(groups).double()
                kept.write(json.dumps(values.tolist()) + "\n")
                kept.flush()
            yield groups, values


_AT_ONCE = 1024
"""Decisions of a piece; files of values that were kept before depend on it."""


def _kept(partial: Path, run: dict[str, str]) -> list[list[float]]:
    """Values of whole pieces that a run of the same model and data left."""
    if not partial.is_file():
        return []
    lines = partial.read_text(encoding="utf-8").split("\n")[:-1]  # what follows is not whole
    if not lines or json.loads(lines[0]) != run:
        return []
    return [json.loads(line) for line in lines[1:]]


def _partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _ranked(groups: Groups, values: Tensor, chances: Tensor | None) -> Iterator[dict[str, Any]]:
    """What is written of each decision."""
    lengths = groups.lengths.tolist()
    likely = [None] * len(lengths) if chances is None else chances.split(lengths)
    for own, chance in zip(values.split(lengths), likely, strict=True):
        order = own.argsort(descending=True, stable=True).tolist()
        found: dict[str, Any] = {"best": order[0], "ranking": order, "values": own.tolist()}
        if chance is not None:
            found["chances"] = [round(p, 6) for p in chance.tolist()]
        yield found


def _shown(
    groups: Groups, values: Tensor, chances: Tensor | None, most: int
) -> list[list[tuple[str, float | None]]]:
    """The first decisions as a page shows them."""
    found = []
    for number in range(min(most, len(groups))):
        start, length = int(groups.starts[number]), int(groups.lengths[number])
        order = values[start : start + length].argsort(descending=True, stable=True).tolist()
        found.append(
            [
                (
                    _name(groups.candidates, start, place),
                    None if chances is None else float(chances[start + place]),
                )
                for place in order
            ]
        )
    return found


def _name(candidates: Tensor | list[str], start: int, place: int) -> str:
    return candidates[start + place] if isinstance(candidates, list) else f"candidate {place}"


def _has_chances(model: PreferenceModel) -> bool:
    return model.comparator.consistent


def _page(title: str, lead: str) -> Any:
    from moefold.inspect import Page

    return Page(title, lead)


def _stem(file: Path) -> str:
    return file.name.removesuffix(".xz").removesuffix(".gz").rpartition(".")[0] or file.name
