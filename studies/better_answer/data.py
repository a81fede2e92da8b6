"""Prompts with answers and what was said of them: AlpacaEval by a judge, LLMBar by people.

Read where it lies; nothing is copied.

Shapes: `groups`, a prompt each; `candidates`, the answers of all prompts one after the other.
"""

import hashlib
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from moefold.preference import Groups
from studies.better_answer.settings import ATTACK, STRONG

ALPACA, LLMBAR = "alpacaeval_best_of_n_16.json.xz", "llmbar.jsonl.xz"
SETS = ("Natural", "Neighbor", "GPTInst", "GPTOut", "Manual")
"""Of LLMBar: real pairs, and four in which the worse answer was made to look better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Prompts with their answers.

    Attributes:
        groups: texts, the prompt as context and as split id, what an answer is worth as utility.
        writers: of each candidate; in LLMBar nobody is named.
    """

    groups: Groups
    writers: list[str]

    @property
    def texts(self) -> list[str]:
        """Every text once, answers first."""
        candidates, prompts = self.groups.candidates, self.groups.context
        assert isinstance(candidates, list)
        assert isinstance(prompts, list)
        return list(dict.fromkeys([*candidates, *prompts]))

    def by(self, pool: str) -> Bool[Tensor, " candidates"]:
        """Which answers are from a pool of writers.

        Args:
            pool: one of `POOLS`.
        """
        left_out = {"16 writers": (), "15 writers": (ATTACK,), "13 writers": (ATTACK, *STRONG)}
        return torch.tensor([writer not in left_out[pool] for writer in self.writers])


def read_alpaca(folder: Path, prompts: int | None = None) -> Answers:
    """The prompts of AlpacaEval, 16 answers each with the judge's score, from 0 to 1.

    Args:
        folder: where the file lies.
        prompts: only so many, spread over the file; all if None.

    Raises:
        ValueError: the file is not there.
    """
    rows = spread(json.loads(_read(folder, ALPACA)), prompts)
    return Answers(
        groups=_groups(
            [row["instruction"] for row in rows],
            [[text for _, _, text in row["cands"]] for row in rows],
            [[score for _, score, _ in row["cands"]] for row in rows],
        ),
        writers=[writer for row in rows for writer, _, _ in row["cands"]],
    )


def read_llmbar(folder: Path, pairs: int | None = None) -> Answers:
    """The pairs of LLMBar, 1 for the better answer and 0 for the other; the set as category.

    Args:
        folder: where the file lies.
        pairs: only so many, spread over the file; all if None.

    Raises:
        ValueError: the file is not there.
    """
    lines = _read(folder, LLMBAR).split("\n")  # some texts hold other separators of lines
    rows = spread([json.loads(line) for line in lines if line], pairs)
    groups = _groups(
        [row["input"] for row in rows],
        [[row["output_1"], row["output_2"]] for row in rows],
        [[float(row["label"] == 1), float(row["label"] == 2)] for row in rows],
        category=[row["set"].rpartition("/")[2] for row in rows],
    )
    return Answers(groups=groups, writers=[""] * len(groups.candidates))


def spread(rows: Sequence[Any], count: int | None) -> list[Any]:
    """So many rows, evenly from the first to the last; all if None or if there are no more."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[n * len(rows) // count] for n in range(count)]


def sha256(folder: Path) -> dict[str, str]:
    """The hash of each file that is read."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


FILES = (ALPACA, LLMBAR)


def _groups(
    prompts: list[str], answers: list[list[str]], worth: list[list[float]], **parts: Any
) -> Groups:
    return Groups.of(answers, utilities=worth, context=prompts, split=prompts, **parts)


def _read(folder: Path, name: str) -> str:
    missing = [one for one in FILES if not (folder / one).is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no {' and no '.join(missing)}; give --data with the folder of both"
        )
    return lzma.decompress((folder / name).read_bytes()).decode("utf-8")
