"""`moefold revert`: turn a saved mixture back into a dense model."""

import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import nn

from moefold.cli.models import open_model
from moefold.cli.options import parse
from moefold.surgery import load, revert
from moefold.surgery.hosts import find_host
from moefold.surgery.hosts.checkpoint import open_processor
from moefold.surgery.saved import read_manifest, refuse_unwritable_folder

EXAMPLE = "moefold revert minilm-moe --dense minilm --out minilm-again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Turn a saved mixture back into a dense model: its other weights as trained, the MLPs as were.

    Attributes:
        folder: a folder that moefold upcycle or moefold.save wrote.
        dense: the model it was made from: a folder, minilm for the packaged encoder, or a hub name.
        out: a new or empty folder to write; its own library opens it.
        any_source: take the MLPs though the files of the dense model are not those upcycled.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    dense: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    out: Path
    any_source: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main(arguments: Sequence[str]) -> None:
    """Runs the verb.

    Raises:
        ValueError: the output folder holds something or cannot be written, or whatever opening and
            reverting refuse.
    """
    asked = parse(Arguments, arguments, verb="revert", example=EXAMPLE)
    _refuse_used_folder(asked.out)
    refuse_unwritable_folder(asked.out)
    sites = read_manifest(asked.folder)["sites"]
    opened = open_model(asked.dense)
    model = load(asked.folder)
    revert(model, opened.model, any_source=asked.any_source)
    _write(model, asked.out, open_processor(asked.folder) or opened.processor)
    print(f"{type(model).__name__}: {', '.join(sites)} are dense again, as in {asked.dense}")
    print(f"wrote {asked.out}; its own library opens it, moefold is not needed")


def _refuse_used_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new or an empty folder")


def _write(model: nn.Module, out: Path, processor: Any) -> None:
    """Writes beside the folder and moves it there when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.moefold-", dir=out.resolve().parent))
    try:
        new = staging / "new"  # not `staging` itself, which nobody else may read
        new.mkdir()
        find_host(model).write(model, new)
        if processor is not None and not (new / "modules.json").is_file():  # which has its own
            processor.save_pretrained(new)
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()  # empty, else refused above
        new.replace(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
