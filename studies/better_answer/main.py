"""The steps of the study, in order, and the command line.

vectors -> scores of what was not learnt from -> results.json -> tables and plot
"""

import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moefold.surgery.encoder import pretrained_encoder
from studies.better_answer.data import read_alpaca, read_llmbar
from studies.better_answer.report import publish, tables, write_plot
from studies.better_answer.results import summarise
from studies.better_answer.scores import encoder_name, jobs, opened, texts_of
from studies.better_answer.settings import QUICK, Settings
from studies.better_answer.vectors import vectors
from studies.files import claim, read_json, write_json
from studies.jobs import Job, one_thread, work
from studies.options import options_of
from studies.tables import write_tables

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
EXAMPLE = """example:
  python -m studies.better_answer.run --data ../shared/data --output runs/better-answer --quick"""


def study(settings: Settings, source: Path, output: Path, processes: int) -> dict[str, Any]:
    """Does what is not done yet of a study, and writes what came of it.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: data or the encoder are missing, or the folder holds another study.
    """
    alpaca, llmbar = read_alpaca(source, settings.prompts), read_llmbar(source, settings.pairs)
    claim(output, settings)
    texts = texts_of(alpaca, llmbar)
    with _progress() as progress:
        bar = progress.add_task("texts encoded", total=len(texts))
        threads = torch.get_num_threads()
        torch.set_num_threads(processes)
        vectors(
            texts,
            output / "vectors",
            encoder_name(),
            pretrained_encoder,
            lambda done: progress.advance(bar, done),
        )
        torch.set_num_threads(threads)
        todo = jobs(settings, source, output)
        with _watched(progress, todo):
            work(todo, processes)
    results = summarise(settings, source, output, opened(source, output, settings))
    write_json(output / "results.json", results)
    return results


def _progress() -> Progress:
    words = TextColumn("{task.description}")
    return Progress(words, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


@contextmanager
def _watched(progress: Progress, todo: Sequence[Job]) -> Iterator[None]:
    """Shows how many jobs have left their files, while other processes do them."""
    bar = progress.add_task("ways to learn tried", total=len(todo))
    ended = threading.Event()

    def count() -> None:
        while not ended.wait(1.0):
            progress.update(bar, completed=sum(job.leaves.exists() for job in todo))

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        progress.update(bar, completed=sum(job.leaves.exists() for job in todo))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print and write."""
    parser = options_of(
        "Learn to pick the better answer, from vectors of a real sentence encoder.",
        data="folder of the two data files",
        epilog=EXAMPLE,
    )
    options = parser.parse_args(arguments)
    if options.report:
        publish(read_json(RESULTS), HERE)
        return
    if options.data is None or options.output is None:
        parser.error("--data and --output are needed")
    if options.publish and options.quick:
        parser.error("--publish with --quick would publish numbers that mean nothing")
    one_thread()
    settings = QUICK if options.quick else Settings()
    try:
        results = study(settings, options.data, options.output, options.processes)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    print(write_tables(tables(results), options.output / "tables.md"))
    write_plot(results, options.output / "results.png")
    if options.publish:
        shutil.copy(options.output / "results.json", RESULTS)
        publish(results, HERE)
