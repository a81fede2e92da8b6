"""`moefold demo`: the main job, from a dense encoder to a page that compares it with a mixture."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moefold.cli.options import Surgery, parse, with_settings
from moefold.surgery.encoder import MINILM, source_folder

EXAMPLE = "moefold demo --quick"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Upcycle a real encoder, train it beside its dense twin, and show who is better.

    Attributes:
        quick: a look in about a minute, with one seed.
        full: at least three seeds, every held-out pair, longer training.
        model: the dense encoder: minilm for the packaged one, a local folder, or a hub name.
        out: folder for report.html, results.json and the trained MoE.
        fresh: run everything again, even what an earlier call finished.
        seeds: how often everything is trained.
        examples: pairs to train on, a multiple of 32.
        max_tokens: texts are cut after so many tokens.
        learning_rate: of all models.
        precision: of training; auto is bf16 where the processor multiplies it.
        device: where to run: cpu, cuda.
        set: a setting of the router, name=value; may be repeated.
        surgery: what to do to the encoder.
    """

    quick: bool = False
    full: bool = False
    model: str = MINILM
    out: Path = Path("demo")
    fresh: bool = False
    seeds: int | None = None
    examples: int | None = None
    max_tokens: int | None = None
    learning_rate: float | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "cpu"
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    surgery: Surgery = field(default_factory=Surgery)


def main(arguments: Sequence[str]) -> None:
    """Runs the verb.

    Raises:
        ValueError: whatever the settings, the model, surgery and training refuse.
    """
    asked = parse(Arguments, arguments, verb="demo", example=EXAMPLE)
    if asked.quick and asked.full:
        raise ValueError("--quick and --full exclude each other; leave one out")
    upcycle = with_settings(asked.surgery.config(), asked.set)
    _stay_offline(asked.model)
    # Only now: what the environment says is read when these libraries are imported.
    from moefold.demo import run
    from moefold.demo.settings import SIZES

    size = "quick" if asked.quick else "full" if asked.full else "default"
    chosen = SIZES[size](asked.precision, asked.device)
    names = ("seeds", "examples", "max_tokens", "learning_rate")
    given = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    settings = replace(chosen, model=asked.model, upcycle=upcycle, **given)
    run(settings, asked.out, fresh=asked.fresh)


def _stay_offline(model: str) -> None:
    """Ask no server for anything when the model is already here."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if source_folder(model) is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
