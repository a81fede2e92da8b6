"""From the files of a study to what is said of it: means over seeds and books, with intervals.

Losses form a table, seeds by books, and both are drawn again. Differences are paired: the same seed
and the same book under another rule. Shapes: `seeds books`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from moefold.evaluate.intervals import crossed_bootstrap
from studies.files import read_json
from studies.language_model.embedded import embedding_results
from studies.language_model.files import place, verdict
from studies.language_model.model import parameters
from studies.language_model.rules import OWN, rules, without_training
from studies.language_model.settings import Settings
from studies.language_model.training import RUN
from studies.surroundings import surroundings

SCHEMA = 1
LEAKS = ("later", "others", "padding", "decoding")
"""From where something may leak; `decoding` is a difference between a full pass and generation."""

_LIBRARIES = ("moefold", "torch", "transformers", "tokenizers", "mteb", "sentence-transformers")


def summarise(settings: Settings, output: Path) -> dict[str, Any]:
    """What `results.json` holds, from the files of a study that is done."""
    own = [
        read_json(verdict(output, "judged", "token-choice", seed, OWN)) for seed in settings.seeds
    ]

    def judged(kind: str, arm: str, rule: str) -> dict[str, Any]:
        runs = [read_json(verdict(output, kind, arm, seed, rule)) for seed in settings.seeds]
        return of_rule(runs, own)

    return {
        "schema": SCHEMA,
        "settings": settings.to_dict(),
        "versions": {name: version(name) for name in _LIBRARIES},
        **surroundings(),
        "data": read_json(output / "data" / "data.json"),
        "parameters": parameters(settings),
        "trained": {
            arm: of_training([read_json(place(output, arm, seed) / RUN) for seed in settings.seeds])
            for arm in settings.arms
        },
        "judged": {
            arm: {rule: judged("judged", arm, rule) for rule in rules(settings, arm)}
            for arm in settings.arms
        },
        "rerouted": {
            rule: judged("rerouted", "token-choice", rule) for rule in without_training(settings)
        },
        "embedded": embedding_results(settings, output),
    }


def of_training(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Training of one arm: means over seeds."""
    curves = [[point["loss"] for point in run["curve"]] for run in runs]
    return {
        "router": runs[0]["router"],
        "tokens": runs[0]["tokens"],
        "steps": runs[0]["steps"],
        "seconds": [run["seconds"] for run in runs],
        "tokens_per_second": [run["tokens_per_second"] for run in runs],
        "experts_per_token": float(np.mean([run["experts_per_token"] for run in runs])),
        "curve_steps": [point["step"] for point in runs[0]["curve"]],
        "curve": np.mean(curves, axis=0).round(4).tolist(),
    }


def of_rule(runs: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One rule: the mean loss, its difference to token choice, and what it computes and sees.

    Args:
        runs: of the rule, a verdict for each seed.
        own: those of the models of token choice under their own choice, seeds in the same order.
    """
    table, base = loss_table(runs), loss_table(own)
    leak = {
        kind: {
            "rerouted": sum(run["leakage"][kind]["rerouted"] for run in runs),
            "tokens": sum(run["leakage"][kind]["tokens"] for run in runs),
            "output": max(run["leakage"][kind]["output"] for run in runs),
        }
        for kind in LEAKS
    }
    return {
        "router": runs[0]["router"],
        "loss": asdict(crossed_bootstrap(table)),
        "difference": asdict(crossed_bootstrap(table - base)),
        "experts_per_token": float(np.mean([run["experts_per_token"] for run in runs])),
        "flops_per_token": float(np.mean([run["flops_per_token"] for run in runs])),
        "leakage": {
            **leak,
            "tolerance": runs[0]["leakage"]["tolerance"],
            "clean": all(run["leakage"]["clean"] for run in runs),
        },
        "losses": [run["losses"] for run in runs],
    }


def loss_table(runs: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "seeds books"]:
    """Losses by seed and book, books in one order."""
    books = sorted(runs[0]["losses"])
    return np.array([[run["losses"][book] for book in books] for run in runs])
