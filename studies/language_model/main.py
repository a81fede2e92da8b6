"""The steps of the study, in order, and the command line.

data -> trained -> judged, rerouted, embedded -> results.json -> tables and plot
"""

import shutil
import time
from pathlib import Path
from typing import Any

import moefold
from studies.files import claim, read_json, write_json
from studies.jobs import Job, one_thread, work
from studies.language_model.data import Data, prepare
from studies.language_model.embedded import embedding_jobs, tokenizer
from studies.language_model.files import place, verdict
from studies.language_model.judging import judge
from studies.language_model.model import open_trained
from studies.language_model.report import publish, tables, write_plot
from studies.language_model.results import summarise
from studies.language_model.rules import Rule, open_under, rules, without_training
from studies.language_model.settings import QUICK, Settings
from studies.language_model.training import RUN, WEIGHTS, train
from studies.options import options_of
from studies.tables import write_tables

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"


def study(settings: Settings, source: Path, output: Path, processes: int) -> dict[str, Any]:
    """Does what is not done yet of a study, and writes what came of it.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: the texts are missing, or the folder holds another study.
    """
    began = time.perf_counter()
    claim(output, settings)
    prepare(source, output / "data", settings)
    work(training_jobs(settings, source, output), processes)
    work(judging_jobs(settings, source, output), processes)
    work(embedding_jobs(settings, source, output), processes)
    results = summarise(settings, output)
    results["seconds_of_this_call"] = time.perf_counter() - began
    write_json(output / "results.json", results)
    return results


def training_jobs(settings: Settings, source: Path, output: Path) -> list[Job]:
    """A model for each arm and seed."""
    return [
        Job(
            name=f"trained {arm}, seed {seed}",
            leaves=place(output, arm, seed) / RUN,
            call=train_one,
            given=(settings, source, output, arm, seed),
        )
        for arm in settings.arms
        for seed in settings.seeds
    ]


def train_one(settings: Settings, source: Path, output: Path, arm: str, seed: int) -> None:
    """Trains one model."""
    train(settings, _data(settings, source, output), arm, seed, place(output, arm, seed))


def judging_jobs(settings: Settings, source: Path, output: Path) -> list[Job]:
    """Every trained model under its rules, and those of token choice rerouted."""
    cases = [
        (arm, seed, "judged", rules(settings, arm))
        for seed in settings.seeds
        for arm in settings.arms
    ]
    cases += [
        ("token-choice", seed, "rerouted", without_training(settings)) for seed in settings.seeds
    ]
    return [
        Job(
            name=f"{kind} {arm}, seed {seed}, {name}",
            leaves=verdict(output, kind, arm, seed, name),
            call=judge_one,
            given=(settings, source, output, arm, seed, kind, name, rule),
        )
        for arm, seed, kind, named in cases
        for name, rule in named.items()
    ]


def judge_one(
    settings: Settings,
    source: Path,
    output: Path,
    arm: str,
    seed: int,
    kind: str,
    name: str,
    rule: Rule,
) -> None:
    """Judges one model under one rule."""
    data = _data(settings, source, output)
    model = open_under(settings, data, place(output, arm, seed) / WEIGHTS, rule)
    found = judge(model, data)
    router = "the model's own" if rule.router is None else str(rule.router)
    write_json(
        verdict(output, kind, arm, seed, name),
        {"arm": arm, "seed": seed, "rule": name, "router": router, **found},
    )


def export(settings: Settings, data: Data, output: Path, folder: Path) -> None:
    """Writes the first seed's model of token choice as transformers and its tools open it.

    Raises:
        ValueError: it has not been trained.
    """
    weights = place(output, "token-choice", settings.seeds[0]) / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"no trained model at {weights}; run the study to there first")
    trained = open_trained(settings, weights, None)
    moefold.revert(trained)
    trained.save_pretrained(folder)
    tokenizer(data).save_pretrained(folder)


def _data(settings: Settings, source: Path, output: Path) -> Data:
    return prepare(source, output / "data", settings)


def main() -> None:
    """Run, print and write."""
    parser = options_of((__doc__ or "").splitlines()[0], data="folder of the texts")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FOLDER",
        help="only write a trained model of token choice there, for moefold reroute",
    )
    options = parser.parse_args()
    if options.report:
        publish(read_json(RESULTS), HERE)
        return
    if options.data is None or options.output is None:
        parser.error("--data and --output are needed")
    one_thread()
    settings = QUICK if options.quick else Settings()
    if options.export is not None:
        data = _data(settings, options.data, options.output)
        export(settings, data, options.output, options.export)
        return
    results = study(settings, options.data, options.output, options.processes)
    print(write_tables(tables(results), options.output / "tables.md"))
    write_plot(results, options.output / "plot.png")
    if options.publish:
        shutil.copy(options.output / "results.json", RESULTS)
        publish(results, HERE)
