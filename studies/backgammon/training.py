"""Training one net: the same net, data and passes for every way to learn, its rate tuned before."""

import time
from pathlib import Path
from typing import Any

from moefold_backgammon.data import groups_of_choices
from moefold_backgammon.net import groups_of, load_net, new_model, save_net

from moefold.preference import FitConfig, Groups, PreferenceModel, fit, measure
from moefold.preference.trainer import steps_of
from studies.backgammon import absolute
from studies.backgammon.data import decisions_of, games_of, held_out, people
from studies.backgammon.settings import ARMS, METHODS, Arm, Run, Settings
from studies.files import read_json, write_json

assert absolute.REGISTERED  # imported for the losses it registers

WEIGHTS, RUN, RATE = "net", "run.json", "rate.json"


def model_of(arm: Arm, hidden: int, seed: int) -> PreferenceModel:
    """An untrained model of an arm."""
    return new_model(
        hidden,
        loss=arm.loss,
        loss_settings=arm.loss_settings,
        seed=seed,
        sees_before=arm.sees_before,
        **arm.net,
    )


def place(output: Path, run: Run) -> Path:
    """The folder of a run."""
    return output / "nets" / run.name


def rate_file(output: Path, arm: str) -> Path:
    """The file that holds an arm's learning rate."""
    return output / "rates" / arm / RATE


def tune(settings: Settings, output: Path, arm: str) -> None:
    """Finds the learning rate with the best agreement on games that nothing else uses."""
    games, passes, _ = settings.tuning
    told = ARMS[arm]
    # The last games, which only the largest nets learn from too.
    train = games_of(output / "labels", settings.most_games - games, games)
    groups = groups_of(train, by_equity=told.by_equity, with_before=told.sees_before)
    apart = groups_of(held_out(output, "tuning"), by_equity=True, with_before=told.sees_before)
    found = {}
    for rate in settings.rates:
        model = model_of(told, settings.hidden, seed=0)
        fit(model, groups, FitConfig(epochs=passes, learning_rate=rate))
        found[f"{rate:g}"] = measure(model, apart).agreement
    best = max(settings.rates, key=lambda rate: found[f"{rate:g}"])
    write_json(rate_file(output, arm), {"rate": best, "agreement": found})


def train(settings: Settings, output: Path, run: Run, people_file: Path) -> None:
    """Trains one net and keeps it; a run that stopped goes on."""
    arm, folder = ARMS[run.arm], place(output, run)
    folder.mkdir(parents=True, exist_ok=True)
    groups = _groups(settings, output, run, people_file)
    rate = _rate(settings, output, run)
    model = model_of(arm, run.hidden, run.seed)
    if run.after is not None:
        model.load_state_dict(load_net(place(output, run.after) / WEIGHTS).state_dict())
    config = FitConfig(epochs=run.passes, learning_rate=rate, seed=run.seed)
    began, cpu = time.perf_counter(), time.process_time()
    steps: list[int] = []
    history = fit(
        model, groups, config, folder=folder / "checkpoints", resume=True, advance=steps.append
    )
    save_net(model, folder / WEIGHTS)
    # Of a run that went on somewhere, the time of the steps before is that of those after.
    of_all = steps_of(len(groups), config) / max(1, len(steps))
    told: dict[str, Any] = {
        "arm": run.arm,
        "games": run.games,
        "passes": run.passes,
        "hidden": run.hidden,
        "seed": run.seed,
        "rate": rate,
        "decisions": len(groups),
        "plays": len(groups.candidates),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": of_all * (time.perf_counter() - began),
        "cpu_seconds": of_all * (time.process_time() - cpu),
        "loss": history.loss[-1],
    }
    if run.after is not None:
        told["after"] = read_json(place(output, run.after) / RUN)
    write_json(folder / RUN, told)


def _rate(settings: Settings, output: Path, run: Run) -> float:
    """The learning rate of a run."""
    (strongest,) = settings.runs()["strongest"]
    if run == strongest:
        return settings.strongest_then[2]
    if run == strongest.after:
        return settings.strongest_rate
    # Ways to learn that are not tuned by themselves are the list's, with another net.
    return read_json(rate_file(output, run.arm if run.arm in METHODS else "list"))["rate"]


def _groups(settings: Settings, output: Path, run: Run, people_file: Path) -> Groups:
    arm = ARMS[run.arm]
    if run.games:
        decisions = decisions_of(run, settings, output)
        return groups_of(decisions, by_equity=arm.by_equity, with_before=arm.sees_before)
    human, apart = people(people_file, settings)
    return groups_of_choices(human.part(~apart))
