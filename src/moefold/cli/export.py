"""`moefold export`: write a saved mixture in a form that needs no moefold."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import transformers
import tyro

from moefold.cli.options import parse
from moefold.routers.base import check_one_of
from moefold.surgery import export, load
from moefold.surgery.export import FORMATS, refuse_full_folder
from moefold.surgery.hosts.checkpoint import open_processor
from moefold.surgery.saved import refuse_unwritable_folder

EXAMPLE = "moefold export llama-moe --format mixtral --out llama-mixtral"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Write a saved mixture in a form that needs no moefold.

    Attributes:
        folder: an upcycled model, as moefold upcycle or moefold.save wrote it.
        format: native, for the class of transformers that can hold a decoder, or one of them by
            name (mixtral, qwen2-moe, qwen3-moe, olmoe, flex-olmo); torch-export or onnx for the
            graph of an encoder.
        out: folder to write; new or empty.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    format: str = "native"
    out: Path


def main(arguments: Sequence[str]) -> None:
    """Runs the verb.

    Raises:
        ValueError: the format is unknown or cannot hold the model, or a folder cannot be opened or
            written.
    """
    asked = parse(Arguments, arguments, verb="export", example=EXAMPLE)
    check_one_of("format", asked.format, tuple(FORMATS))
    refuse_full_folder(asked.out)
    refuse_unwritable_folder(asked.out)
    transformers.utils.logging.disable_progress_bar()
    model = load(asked.folder)
    processor = open_processor(asked.folder)
    chosen = export(model, asked.out, format=asked.format, tokenizer=processor)
    print(f"wrote {asked.out}, {chosen}: {FORMATS[chosen]}")
