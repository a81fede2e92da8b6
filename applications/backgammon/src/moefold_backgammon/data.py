"""What can be learnt from and judged by, told apart by its name.

    labels/                    every play valued by an engine     Decisions
    contact.bm                 the best plays, rolled out         Benchmark
    matches.jsonl.xz           what people chose                  HumanDecisions

Shapes: none.
"""

import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from moefold.preference import Groups
from moefold_backgammon.bm import Benchmark, read_bm
from moefold_backgammon.decisions import Decisions, read_decisions
from moefold_backgammon.human import HumanDecisions, read_human
from moefold_backgammon.net import groups_of

KINDS = "a folder that label wrote, a .bm file, or a .jsonl file of human decisions"
"""What can be opened; `.bm` and `.jsonl` may be compressed."""

Data = Decisions | Benchmark | HumanDecisions


def open_data(path: Path) -> Data:
    """Reads labels, a benchmark or human decisions.

    Args:
        path: a folder or `.safetensors` file of labels; `.bm`, also with `.bz2` or `.xz` behind it;
            `.jsonl`, also with `.xz`.

    Raises:
        ValueError: there is nothing of this name, it is nothing of these, or what is in it is cut
            off or wrong.
    """
    if not path.exists():
        raise ValueError(
            f"{path} cannot be read as decisions: there is no such file or folder; give {KINDS}"
        )
    try:
        return _reader(path)(path)
    except (EOFError, lzma.LZMAError) as error:
        raise ValueError(
            f"{path} is cut off, or is not compressed as its name says: {error}"
        ) from (error)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}; give {KINDS}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path} is not compressed as its name says: {error}") from error


def groups_of_choices(human: HumanDecisions) -> Groups:
    """People's choices as groups, split by match.

    Equities are left out: the engine gives none to plays that it did not list.
    """
    known = replace(human.decisions, equities=np.zeros_like(human.decisions.equities))
    return replace(groups_of(known), utilities=None)


def _reader(path: Path) -> Callable[[Path], Data]:
    if path.is_dir():
        return read_decisions
    plain = path.with_suffix("") if path.suffix in (".xz", ".bz2") else path
    readers: dict[str, Callable[[Path], Data]] = {
        ".safetensors": read_decisions,
        ".bm": read_bm,
        ".jsonl": read_human,
    }
    if plain.suffix not in readers or (plain.suffix == ".jsonl" and path.suffix == ".bz2"):
        raise ValueError(f"{path} is of no kind that is known by its name; give {KINDS}")
    return readers[plain.suffix]


__all__ = ["KINDS", "Data", "groups_of_choices", "open_data"]
