"""Tasks of mteb whose data come from a folder: the same classes and metrics, and no network.

    task = offline("STSBenchmark", folder)      mteb.get_task("STSBenchmark"), its data filled in
    mteb.evaluate(encoder, task, cache=None)

Only `task.dataset` is set, in the form that the task's own loading leaves; splits, seeds,
classifiers and metrics are mteb's. A file has one JSON array a line, compressed with xz; `TASKS`
says which files and columns a task takes.
"""

import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTask

Row = list[Any]
"""What a line holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the data of a task are.

    Attributes:
        files: by split, their names without `.jsonl.xz`; "corpus" is a split of retrieval.
        make: turns the rows of every split into the task's dataset.
        year: which rows count, by their fourth entry; None for all.
    """

    files: Mapping[str, str]
    make: Callable[[Mapping[str, Sequence[Row]]], Any]
    year: int | None = None


def _pairs(splits: Mapping[str, Sequence[Row]]) -> DatasetDict:
    """Rows are [sentence, sentence, score, ...]."""
    names = ("sentence1", "sentence2", "score")
    return DatasetDict(
        {
            split: Dataset.from_dict({n: [row[i] for row in rows] for i, n in enumerate(names)})
            for split, rows in splits.items()
        }
    )


def _labels(splits: Mapping[str, Sequence[Row]]) -> DatasetDict:
    """Rows are [text, label]; labels become numbers, words in alphabetical order."""
    found = sorted({row[1] for rows in splits.values() for row in rows})
    number = {label: place for place, label in enumerate(found)}
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"text": [row[0] for row in rows], "label": [number[row[1]] for row in rows]}
            )
            for split, rows in splits.items()
        }
    )


def _claims(splits: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Any]]:
    """Corpus rows are [id, title, text], the others [id, question, ids of relevant documents]."""
    columns = zip(*splits["corpus"], strict=True)
    corpus = Dataset.from_dict(dict(zip(("id", "title", "text"), columns, strict=True)))
    made = {}
    for split, rows in splits.items():
        if split != "corpus":
            made[split] = {
                "corpus": corpus,
                "queries": Dataset.from_dict(
                    {"id": [row[0] for row in rows], "text": [row[1] for row in rows]}
                ),
                "relevant_docs": {row[0]: dict.fromkeys(row[2], 1) for row in rows},
                "top_ranked": None,
            }
    return {"default": made}


def _labelled(name: str) -> Source:
    return Source(files={"train": f"{name}_train", "test": f"{name}_test"}, make=_labels)


def _year(year: int) -> Source:
    """One year of the file that holds STS12 to STS16; one is not in one piece there."""
    return Source(files={"test": "sts12_16"}, make=_pairs, year=year)


TASKS: Mapping[str, Source] = {
    "Banking77Classification": _labelled("banking77"),
    "EmotionClassification": _labelled("emotion"),
    "ImdbClassification": _labelled("imdb"),
    "STSBenchmark": Source(files={"test": "stsb_test"}, make=_pairs),
    "SICK-R": Source(files={"test": "sick"}, make=_pairs),
    "STS12": _year(2012),
    "STS13": _year(2013),
    "STS14": _year(2014),
    "STS15": _year(2015),
    "STS16": _year(2016),
    "SciFact": Source(
        files={"corpus": "scifact_corpus", "test": "scifact_claims_validation"}, make=_claims
    ),
}
"""Tasks whose data a folder may hold, and where."""


def files_of(name: str, folder: Path) -> tuple[Path, ...]:
    """The files a task takes its data from.

    Raises:
        ValueError: the task is not one of `TASKS`.
    """
    if name not in TASKS:
        raise ValueError(
            f"the data of task {name!r} cannot be taken from a folder; there are: "
            f"{', '.join(TASKS)}. With a network, mteb fetches those of any task"
        )
    return tuple(folder / f"{file}.jsonl.xz" for file in TASKS[name].files.values())


def offline(name: str, folder: str | Path) -> AbsTask:
    """A task of mteb with its data from a folder.

    Args:
        name: what mteb calls it.
        folder: where the files of `TASKS` are.

    Raises:
        ValueError: no such task, or a file is missing or no such file.
    """
    paths = files_of(name, Path(folder))
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}, which {name} takes its data from; give another "
            f"folder"
        )
    source = TASKS[name]
    task = mteb.get_task(name)
    rows = {split: _read(path) for split, path in zip(source.files, paths, strict=True)}
    try:
        if source.year is not None:
            rows = {s: [row for row in some if row[3] == source.year] for s, some in rows.items()}
        task.dataset = source.make(rows)
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{', '.join(path.name for path in paths)} in {folder} do not hold the rows of {name} "
            f"({error})"
        ) from error
    task.data_loaded = True
    return task


def _read(path: Path) -> list[Row]:
    try:
        text = lzma.decompress(path.read_bytes()).decode("utf-8")
        # On "\n" only: some texts contain other line separators.
        return [json.loads(line) for line in text.split("\n") if line]
    except (lzma.LZMAError, ValueError) as error:
        raise ValueError(f"{path} is no xz file of JSON lines ({error})") from error
