"""`moefold save`: make a trainer's checkpoint of a mixture a saved folder, with hashes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import transformers
import tyro
from torch import nn

from moefold.cli.options import parse
from moefold.surgery import save
from moefold.surgery.encoder import refuse_pickles
from moefold.surgery.hosts import HOSTS
from moefold.surgery.hosts.auto import PREFIX
from moefold.surgery.hosts.checkpoint import open_processor
from moefold.surgery.saved import MANIFEST, refuse_foreign_folder, refuse_unwritable_folder

EXAMPLE = "moefold save runs/checkpoint-500 --out encoder-moe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Make a checkpoint of a mixture, as a trainer writes it, a saved folder with hashes.

    Attributes:
        checkpoint: a folder that save_pretrained wrote for an upcycled model.
        out: folder to write; moefold.load opens it.
        force: replace the folder if it holds an upcycled model.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    out: Path
    force: bool = False


def main(arguments: Sequence[str]) -> None:
    """Runs the verb.

    Raises:
        ValueError: no checkpoint of a mixture, or the folder cannot be written.
    """
    asked = parse(Arguments, arguments, verb="save", example=EXAMPLE)
    refuse_foreign_folder(asked.out)
    refuse_unwritable_folder(asked.out)
    if (asked.out / MANIFEST).is_file() and not asked.force:
        raise ValueError(f"{asked.out} holds an upcycled model; add --force to replace it")
    transformers.utils.logging.disable_progress_bar()
    model, processor = _open(asked.checkpoint)
    save(model, asked.out, tokenizer=processor)
    print(f"wrote {asked.out}; moefold.load opens it")


def _open(checkpoint: Path) -> tuple[nn.Module, Any]:
    if not checkpoint.is_dir():
        raise ValueError(f"no folder at {checkpoint}; give a checkpoint of a trainer")
    refuse_pickles(checkpoint)
    if (checkpoint / "modules.json").is_file():
        return HOSTS.get("sentence-transformer")().read(checkpoint), None
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        kind = str(config["model_type"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{checkpoint} holds no model of transformers ({error!r})") from error
    if not kind.startswith(PREFIX):
        raise ValueError(
            f"{checkpoint} holds a dense model of type {kind!r}; call moefold upcycle on it"
        )
    # The model first: with it its type becomes known, which the tokenizer's class asks for.
    model = HOSTS.get("transformers")().read(checkpoint)
    return model, open_processor(checkpoint)
