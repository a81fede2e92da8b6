"""Sentence vectors of the trained models, without further training, on tasks of MTEB.

Here the group's own choice is in its place: a text is known whole, nothing is predicted. The model
of token choice is compared with itself, rerouted, and with the one trained by unified competition.
Without a prompt the tokens of a text are averaged; with PromptEOL the last one speaks for all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from moefold.routers.inference import GROUP
from studies.files import read_json, write_json
from studies.jobs import Job
from studies.language_model.data import END, Data, prepare
from studies.language_model.files import place
from studies.language_model.model import new_model
from studies.language_model.rules import Rule, open_under
from studies.language_model.settings import Settings, competing
from studies.language_model.training import WEIGHTS

KINDS = ("hidden", "routing", "concat", "sum")
PROMPTS = {"none": None, "PromptEOL": "prompteol"}
BATCH = 32
FITTED = 512
"""Sequences of training text from which means and deviations of features are learnt."""


def cases(settings: Settings) -> dict[str, tuple[str | None, Rule]]:
    """What is embedded with: the way of training, None for none, and the rule; by name."""
    unified = Rule(router=competing(settings, "unified", GROUP))
    return {
        "untrained": (None, Rule(router=None)),
        "token choice": ("token-choice", Rule(router=None)),
        "token choice, rerouted to unified": ("token-choice", unified),
        "trained with unified": ("unified", unified),
    }


def embedding_jobs(settings: Settings, source: Path, output: Path) -> list[Job]:
    """A job for each model, kind of vector and prompt."""
    return [
        Job(
            name=f"embedded with {case}, seed {seed}, {kind}, prompt {prompt}",
            leaves=scores_file(output, case, seed, kind, prompt),
            call=embed_one,
            given=(settings, source, output, case, seed, kind, prompt),
        )
        for seed in settings.seeds
        for case in cases(settings)
        for prompt in PROMPTS
        for kind in KINDS
    ]


def scores_file(output: Path, case: str, seed: int, kind: str, prompt: str) -> Path:
    """Where the scores of a model, a kind of vector and a prompt are."""
    name = case.replace(", ", "_").replace(" ", "-")
    return output / "embedded" / f"{name}-{seed}" / f"{kind}-{prompt}" / "scores.json"


def embed_one(
    settings: Settings, source: Path, output: Path, case: str, seed: int, kind: str, prompt: str
) -> None:
    """Runs the tasks with one model, kind of vector and prompt."""
    from moefold.embedding import embedder, fit
    from moefold.evaluate.mteb_runs import run_tasks
    from moefold.evaluate.mteb_tasks import offline

    data = prepare(source, output / "data", settings)
    arm, rule = cases(settings)[case]
    if arm is None:
        model = new_model(settings, seed).eval()
    else:
        model = open_under(settings, data, place(output, arm, seed) / WEIGHTS, rule)
    config = embedding(kind, prompt)
    encoder = embedder(model, tokenizer(data), config)
    if config.standardize == "fitted":
        fit(encoder, training_texts(data))
    target = scores_file(output, case, seed, kind, prompt)
    found = run_tasks(
        encoder,
        [offline(name, source) for name in tasks(settings, kind, prompt)],
        target.parent,
        model={"model": case, "seed": seed, "embedding": config.to_dict()},
        batch_size=BATCH,
    )
    write_json(target, {score.task: score.main_score for score in found})


def tasks(settings: Settings, kind: str, prompt: str) -> tuple[str, ...]:
    """What a kind of vector is tried on: logistic regressions take a minute each, so few are."""
    slow = settings.slow_tasks if (kind, prompt) == ("hidden", "none") else ()
    return settings.tasks + slow


def embedding(kind: str, prompt: str) -> Any:
    """How a text becomes a vector.

    As published for these kinds of vector, features are standardised; but by training text, so that
    the vector of a text does not depend on which others are in its batch.
    """
    from moefold.embedding import EmbeddingConfig

    pooling = "mean" if prompt == "none" else "last"
    return EmbeddingConfig(
        kind=kind,  # pyright: ignore[reportArgumentType]
        pooling=pooling,
        routing_pooling=pooling,
        prompt=PROMPTS[prompt],
        standardize="none" if kind == "hidden" else "fitted",
    )


def tokenizer(data: Data) -> PreTrainedTokenizerFast:
    """The study's tokenizer as transformers has it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(data.tokenizer)), eos_token=END, pad_token=END
    )


def training_texts(data: Data) -> list[str]:
    """Short pieces of training text, of about the length of a sentence."""
    places = np.linspace(0, len(data.train) - 1, min(FITTED, len(data.train))).astype(int)
    ids = [row[:24].tolist() for row in data.train[places]]
    return Tokenizer.from_file(str(data.tokenizer)).decode_batch(ids)


def embedding_results(settings: Settings, output: Path) -> dict[str, Any]:
    """Scores by case, prompt and kind: for each task a list over seeds."""

    def scores(case: str, prompt: str, kind: str) -> dict[str, list[float]]:
        read = [read_json(scores_file(output, case, seed, kind, prompt)) for seed in settings.seeds]
        return {task: [one[task] for one in read] for task in tasks(settings, kind, prompt)}

    return {
        case: {prompt: {kind: scores(case, prompt, kind) for kind in KINDS} for prompt in PROMPTS}
        for case in cases(settings)
    }


def embedding_table(results: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows: means over seeds, times 100; of the average the range over seeds as well.

    The average is over the tasks that every kind of vector is tried on.
    """
    fast, slow = (tuple(results["settings"][name]) for name in ("tasks", "slow_tasks"))
    rows = []
    for case, by_prompt in results["embedded"].items():
        for prompt, by_kind in by_prompt.items():
            for kind, scores in by_kind.items():
                of_seed = 100 * np.array([scores[task] for task in fast]).mean(0)
                rows.append(
                    (
                        *(case, prompt, kind),
                        *(_mean(scores, task) for task in fast),
                        f"{of_seed.mean():.1f} ({of_seed.min():.1f} to {of_seed.max():.1f})",
                        *(_mean(scores, task) for task in slow),
                    )
                )
    return ("model", "prompt", "vector", *fast, "average of these", *slow), rows


def _mean(scores: Mapping[str, list[float]], task: str) -> str:
    return f"{100 * np.mean(scores[task]):.1f}" if task in scores else ""
