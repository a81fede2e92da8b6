"""`moefold upcycle`: turn a dense model into a mixture of experts and save it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import transformers
import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from moefold.cli.models import SENTENCES, Opened, open_model, sample_inputs
from moefold.cli.options import Surgery, parse, with_settings
from moefold.surgery import Plan, UpcycleConfig, load, save, upcycle, upcycle_folder
from moefold.surgery.encoder import source_folder
from moefold.surgery.saved import (
    MANIFEST,
    check_shard_size,
    refuse_foreign_folder,
    refuse_unwritable_folder,
)

EXAMPLE = "moefold upcycle minilm --out minilm-moe --num-experts 4 --sites last:2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Turn a dense model into a mixture of experts and save it.

    Attributes:
        model: a local folder, minilm for the packaged encoder, or a hub name owner/name.
        out: folder to write; moefold.load opens it.
        force: replace the folder if it holds an upcycled model.
        seed: of the router's first weights.
        stream: read and write one shard after the other, for a folder larger than memory; the
            model is then not run.
        max_shard_size: bytes of a file of weights, or text such as 5GB; 50GB, streaming 5GB, if not
            said.
        set: a setting of the router, name=value; may be repeated.
        surgery: what to do to the model.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    out: Path
    force: bool = False
    seed: int = 0
    stream: bool = False
    max_shard_size: str | None = None
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    surgery: Surgery = field(default_factory=Surgery)


def main(arguments: Sequence[str]) -> None:
    """Runs the verb.

    Raises:
        ValueError: the folder exists or cannot be written, or whatever opening, surgery and saving
            refuse.
    """
    asked = parse(Arguments, arguments, verb="upcycle", example=EXAMPLE)
    config = with_settings(asked.surgery.config(), asked.set)
    refuse_foreign_folder(asked.out)
    refuse_unwritable_folder(asked.out)
    if (asked.out / MANIFEST).is_file() and not asked.force:
        raise ValueError(f"{asked.out} holds an upcycled model; add --force to replace it")
    size = asked.max_shard_size
    size = int(size) if size is not None and size.isdecimal() else size
    check_shard_size(size)
    torch.manual_seed(asked.seed)
    console = Console(stderr=True)  # progress is not what the verb has to say
    if asked.stream:
        _stream(asked, config, size, console)
        return
    with _progress(console) as progress:
        step = progress.add_task(f"opening {asked.model}", total=None)
        opened = open_model(asked.model)
        progress.update(step, description="upcycling, and running it before and after")
        done = _upcycle(opened, config)
        progress.update(step, description=f"writing {asked.out}")
        save(opened.model, asked.out, tokenizer=opened.processor, max_shard_size=size)
        progress.update(step, description="reading it back")
        _check_weights(opened.model, load(asked.out), asked.out)
    print(done)
    print(f"wrote {asked.out}; read back, every weight is the same: moefold.load opens it")


def _stream(
    asked: Arguments, config: UpcycleConfig, size: int | str | None, console: Console
) -> None:
    transformers.utils.logging.disable_progress_bar()
    folder = source_folder(asked.model)
    if folder is None:
        raise ValueError(
            f"--stream reads a local folder, and {asked.model} is a name on the hub; fetch it "
            f"first: hf download {asked.model} --local-dir FOLDER"
        )
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        step = progress.add_task(f"writing {asked.out}", total=None)
        sized = {} if size is None else {"max_shard_size": size}
        done = upcycle_folder(
            folder,
            asked.out,
            config,
            **sized,
            progress=lambda done, total: progress.update(step, completed=done, total=total),
        )
    print(done)
    print(f"wrote {asked.out}: moefold.load opens it")


def _upcycle(opened: Opened, config: UpcycleConfig) -> Plan:
    """Surgery with a receipt: on sample sentences if the model takes them, else on what it does."""
    sentences = sample_inputs(opened)
    if sentences is not None:
        try:
            what = f"{len(SENTENCES)} sample sentences"
            return upcycle(opened.model, config, inputs=sentences, inputs_are=what)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError):
            pass  # the model is untouched; what is wrong with it or the config is said below
    return upcycle(opened.model, config)


def _check_weights(saved: nn.Module, loaded: nn.Module, folder: Path) -> None:
    before, after = saved.state_dict(), loaded.state_dict()
    different = {
        name for name in before.keys() & after.keys() if not _same_bits(before[name], after[name])
    }
    if wrong := different | (before.keys() ^ after.keys()):
        raise ValueError(f"read back from {folder}, these weights differ: {sorted(wrong)}")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are the same, NaN too, which is not equal to itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))


def _progress(console: Console) -> Progress:
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
