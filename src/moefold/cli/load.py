"""`moefold load`: open a saved mixture, check every file of it, and say what it is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import transformers
import tyro

from moefold.cli.options import parse
from moefold.moe import MoEConfig
from moefold.rerouting import load, rerouting_of
from moefold.surgery import Receipt
from moefold.surgery.hosts import find_host
from moefold.surgery.plan import spelled_out

EXAMPLE = "moefold load minilm-moe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Open a saved mixture, check every file of it, and say what it is and where it came from.

    Attributes:
        folder: a folder that moefold.save or moefold upcycle wrote.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]


def main(arguments: Sequence[str]) -> None:
    """Runs the verb.

    Raises:
        ValueError: whatever `moefold.load` refuses.
    """
    asked = parse(Arguments, arguments, verb="load", example=EXAMPLE)
    transformers.utils.logging.disable_progress_bar()
    model = load(asked.folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{asked.folder}: every file is as it was saved")
    print(f"  {'model':<22} {type(model).__name__}, {parameters / 1e6:.2f} M parameters")
    rerouting = rerouting_of(model)
    if rerouting is not None:
        print(replace(rerouting, to_learn=None))  # what was learnt is in the folder
        return
    section = find_host(model).section(model)
    assert section is not None, "load has checked it"
    print(f"  {'made from':<22} {section['source'].get('name') or 'a model of unknown origin'}")
    print(f"  {'birth':<22} {section['upcycle']['birth']['kind']}")
    for line in _mixtures(section["sites"]):
        print(line)
    if section.get("receipt"):
        print("\n".join(str(Receipt.from_dict(section["receipt"])).splitlines()))


def _mixtures(sites: dict[str, Any]) -> list[str]:
    longest = max(map(len, sites))
    lines = []
    for name, settings in sites.items():
        moe = MoEConfig.from_dict(settings)
        what = f"{moe.num_experts} experts of width {moe.expert_width}, {spelled_out(moe.router)}"
        lines.append(f"  + {name:<{longest}}  {what}")
    return lines
