"""The steps of the study, in order, and the command line.

games -> rates -> trained -> judged -> results.json -> tables and plots
"""

import shutil
from pathlib import Path
from typing import Any

from studies.backgammon.data import prepare
from studies.backgammon.judging import STRENGTH, VERDICT, judge, judge_strength
from studies.backgammon.report import publish, tables, write_plot
from studies.backgammon.results import summarise
from studies.backgammon.settings import METHODS, QUICK, Run, Settings
from studies.backgammon.training import RUN, place, rate_file, train, tune
from studies.files import claim, read_json, write_json
from studies.jobs import Job, one_thread, work
from studies.options import options_of
from studies.tables import write_tables

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PEOPLE = "backgammon_human_train.jsonl.xz"


def study(settings: Settings, source: Path, output: Path, processes: int) -> dict[str, Any]:
    """Does what is not done yet of a study, and writes what came of it.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: people's decisions are missing, or the folder holds another study.
        RuntimeError: gnubg-nn is not installed.
    """
    people_file = source / PEOPLE
    if not people_file.is_file():
        raise ValueError(f"no {people_file}; --data is the folder that holds {PEOPLE}")
    claim(output, settings)
    prepare(settings, output, processes)
    work(tuning_jobs(settings, output), processes)
    runs = unique(settings)
    for later in (False, True):  # some begin with what others learnt
        now = [run for run in runs if (run.after is not None) is later]
        work([_training(settings, output, run, people_file) for run in now], processes)
    work([_judging(settings, output, run, people_file) for run in runs], processes)
    (strongest,) = settings.runs()["strongest"]
    last = Job(
        name=f"matches of {strongest.name}",
        leaves=place(output, strongest) / STRENGTH,
        call=judge_strength,
        given=(settings, output, strongest),
    )
    work([last], processes)
    results = summarise(settings, output)
    write_json(output / "results.json", results)
    return results


def unique(settings: Settings) -> list[Run]:
    """Every net once, those that take longest first."""
    runs = {run.name: run for part in settings.runs().values() for run in part}
    runs |= {run.after.name: run.after for run in runs.values() if run.after is not None}
    return sorted(runs.values(), key=lambda run: -run.games * run.passes * run.hidden)


def tuning_jobs(settings: Settings, output: Path) -> list[Job]:
    """A learning rate for each way to learn."""
    return [
        Job(
            name=f"learning rate of {arm}",
            leaves=rate_file(output, arm),
            call=tune,
            given=(settings, output, arm),
        )
        for arm in METHODS
    ]


def _training(settings: Settings, output: Path, run: Run, people_file: Path) -> Job:
    return Job(
        name=f"trained {run.name}",
        leaves=place(output, run) / RUN,
        call=train,
        given=(settings, output, run, people_file),
    )


def _judging(settings: Settings, output: Path, run: Run, people_file: Path) -> Job:
    return Job(
        name=f"judged {run.name}",
        leaves=place(output, run) / VERDICT,
        call=judge,
        given=(settings, output, run, people_file),
    )


def main() -> None:
    """Run, print and write."""
    parser = options_of(
        "Comparison training against absolute training, at backgammon.",
        data=f"folder of {PEOPLE}",
        epilog="example: python studies/backgammon/run.py --data ../shared/data --output "
        "runs/backgammon --quick",
    )
    options = parser.parse_args()
    if options.report:
        publish(read_json(RESULTS), HERE)
        return
    if options.data is None or options.output is None:
        parser.error("--data and --output are needed")
    one_thread()
    settings = QUICK if options.quick else Settings()
    try:
        results = study(settings, options.data, options.output, options.processes)
    except (ValueError, RuntimeError) as error:
        parser.exit(2, f"{error}\n")
    print(write_tables(tables(results), options.output / "tables.md"))
    write_plot(results, options.output / "results.png")
    if options.publish:
        shutil.copy(options.output / "results.json", RESULTS)
        publish(results, HERE)
