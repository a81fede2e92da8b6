"""Runs tasks of mteb, one JSON file each, so that what is finished is not run again.

    output/STSBenchmark.json    {"score", "model", "versions", "machine", "date", "mteb": {...}}

`mteb` in a file is mteb's own result, as its `to_dict` gives it. Every encoder goes through mteb's
own wrapper for a SentenceTransformer.
"""

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from mteb.abstasks import AbsTask
from mteb.models import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer
from sklearn.exceptions import ConvergenceWarning, UndefinedMetricWarning

from moefold.evaluate.files import whole_file
from moefold.evaluate.surroundings import surroundings, weights_sha256

PACKAGES = (
    *("moefold", "mteb", "torch", "transformers", "sentence-transformers"),
    *("scikit-learn", "scipy", "numpy", "datasets"),
)

_WORDS = {"model", "what"}
"""How a model is called, which does not make it another one."""

INSTRUCTION = "<|user|>\n{instruction}\n<|embed|>\n"
"""How MoEE and USMoE, after GritLM, put a task's instruction before a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a task gave.

    Attributes:
        task: its name.
        metric: name of its main metric.
        main_score: between 0 and 1 for most metrics.
        seconds: how long it took.
        again: whether it was read from a file of an earlier run.
    """

    task: str
    metric: str
    main_score: float
    seconds: float
    again: bool = False


def run_tasks(
    encoder: SentenceTransformer,
    tasks: Iterable[AbsTask],
    output: str | Path,
    *,
    model: Mapping[str, Any],
    batch_size: int = 32,
    instruction: str | None = None,
    force: bool = False,
    bars: bool = False,
    said: Callable[[str], None] = lambda _: None,
) -> list[Score]:
    """Runs every task that has no result yet, and writes each as soon as it is finished.

    Args:
        encoder: the model.
        tasks: of mteb, from `offline` or `mteb.get_task`.
        output: a folder, made if it is not there.
        model: says in plain data what the model is, its name under "model" or "what"; a result in
            the folder counts as one of this model only if all but the name is the same, and its
            weights are.
        batch_size: texts per batch.
        instruction: how a task's instruction is put before its texts, such as `INSTRUCTION`; None
            for no instructions.
        force: run what is finished too.
        bars: show a bar for each encoding.
        said: called with the name of each task that begins.

    Raises:
        ValueError: the folder holds the result of another model, or on other data.
    """
    output = Path(output)
    about = {
        **model,
        "weights_sha256": weights_sha256(encoder),
        "batch_size": batch_size,
        "instruction": instruction,
    }
    scores = []
    for task in tasks:
        name = task.metadata.name
        file = output / f"{name}.json"
        if not task.data_loaded:
            task.load_data()
        data = data_sha256(task)
        before = None if force else _read(file)
        if before is not None:
            _check_same(file, before["model"], {**about, "data_sha256": data})
            scores.append(Score(**{**before["score"], "again": True}))
            continue
        said(name)
        started = time.perf_counter()
        found = _run(encoder, task, batch_size, instruction, bars)
        score = Score(
            task=name,
            metric=str(task.metadata.main_score),
            main_score=float(found.get_score()),
            seconds=time.perf_counter() - started,
        )
        result = json.loads(json.dumps(found.to_dict(), default=str))
        _write(
            file,
            {
                "score": asdict(score),
                "model": {**about, "data_sha256": data},
                **surroundings(PACKAGES),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "mteb": result,
            },
        )
        scores.append(score)
    return scores


def _run(
    encoder: SentenceTransformer,
    task: AbsTask,
    batch_size: int,
    instruction: str | None,
    bars: bool,
) -> Any:
    with _only_errors():
        prompts = None if instruction is None else _prompts(task, instruction)
        before = encoder.prompts
        try:
            wrapped: Any = SentenceTransformerEncoderWrapper(encoder, model_prompts=prompts)
            (result,) = mteb.evaluate(
                wrapped,
                task,
                cache=None,  # ours are the files that are written
                co2_tracker=False,
                show_progress_bar=False,
                encode_kwargs={"batch_size": batch_size, "show_progress_bar": bars},
            ).task_results
        finally:
            encoder.prompts = before
    return result


@contextmanager
def _only_errors() -> Iterator[None]:
    """Without advice of others on what is as published, and without bars between ours."""
    logger, bars = logging.getLogger("mteb"), not are_progress_bars_disabled()
    before = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The task .* is superseded by")
            warnings.filterwarnings("ignore", message="Model prompts specified")
            # What mteb still calls, and its classifiers on a model that tells nothing apart.
            for category in (
                *(DeprecationWarning, FutureWarning),
                *(ConvergenceWarning, UndefinedMetricWarning),
            ):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logger.setLevel(before)
        if bars:
            enable_progress_bars()


def _prompts(task: AbsTask, instruction: str) -> dict[str, str]:
    """The task's instruction under the names by which mteb looks for it."""
    name, given = task.metadata.name, task.metadata.prompt or task.abstask_prompt
    none = {"query": "", "document": ""}
    if isinstance(given, str):
        return {**none, name: instruction.format(instruction=given)}
    return {**none, **{f"{name}-{k}": instruction.format(instruction=v) for k, v in given.items()}}


def data_sha256(task: AbsTask) -> str:
    """A hash of the texts, labels and scores of a task whose data are loaded."""
    digest = hashlib.sha256()
    _add(digest, task.dataset)
    return digest.hexdigest()


def _add(digest: Any, data: Any) -> None:
    if isinstance(data, Dataset):
        data = {name: list(data[name]) for name in data.column_names}
    if isinstance(data, Mapping):
        for name in sorted(data):
            digest.update(f"{name}:".encode())
            _add(digest, data[name])
    else:
        digest.update(json.dumps(data, default=str).encode())


def _check_same(file: Path, before: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(about))
    differ = sorted(k for k in {*before, *now} - _WORDS if before.get(k) != now.get(k))
    if differ:
        raise ValueError(
            f"{file} is the result of another model, setting or data ({', '.join(differ)} differ); "
            f"give another output folder, or force to run it again"
        )


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        Score(**found["score"])
        return {"score": found["score"], "model": dict(found["model"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no result of moefold ({error!r}); move it, or give another output folder"
        ) from error


def _write(file: Path, data: Mapping[str, Any]) -> None:
    with whole_file(file) as new:
        new.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
