"""`moefold plan`: what surgery would do to a model; nothing is touched."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import tyro

from moefold.cli.models import open_model
from moefold.cli.options import Surgery, parse, with_settings
from moefold.surgery import plan

EXAMPLE = "moefold plan minilm --router expert-choice --sites last:2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Say what surgery would do to a model, what it would cost, and what it would keep.

    Attributes:
        model: a local folder, minilm for the packaged encoder, or a hub name owner/name.
        set: a setting of the router, name=value; may be repeated.
        dtype: what memory is counted in, as torch names it; that of the model if not said.
        surgery: what to do to it.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    surgery: Surgery = field(default_factory=Surgery)


def main(arguments: Sequence[str]) -> None:
    """Runs the verb."""
    asked = parse(Arguments, arguments, verb="plan", example=EXAMPLE)
    config = with_settings(asked.surgery.config(), asked.set)
    dtype = None if asked.dtype is None else getattr(torch, asked.dtype)
    torch.manual_seed(0)  # as upcycle does: what is measured on random tokens is then the same
    print(plan(open_model(asked.model).model, config, dtype=dtype))
