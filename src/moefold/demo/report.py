"""The page of the demo, made from its numbers alone: `results.json` is all it needs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moefold.demo.results import MAIN, TITLES, VERDICTS, signed, verdicts
from moefold.demo.twins import CONTINUED, DENSE, MOE
from moefold.evaluate import METRICS
from moefold.inspect import Choices, Page
from moefold.inspect.plots import dots, lines
from moefold.inspect.who import who_chooses_whom

Results = Mapping[str, Any]
_TIMES, _MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"
_NAMES = {
    "ndcg@10": "nDCG@10",
    "mrr@10": "MRR@10",
    "recall@1": "recall@1",
    "recall@10": "recall@10",
}


def write_report(results: Results, file: Path) -> None:
    """Write the page.

    Args:
        results: what `run` returns and `results.json` holds.
        file: where; its folder exists.
    """
    router = results["settings"]["upcycle"]["moe"]["router"]["name"]
    page = Page(
        "A dense encoder, folded into a mixture of experts",
        f"{results['settings']['model']} was upcycled with the router {router}, then trained "
        "beside its dense twin: same pairs, same order, same schedule. This is what came of it.",
    )
    _summary(page, results)
    _comparison(page, results)
    _curves(page, results)
    _look(page, results)
    _method(page, results)
    page.write(file)


def _summary(page: Page, results: Results) -> None:
    birth, flops = results["birth"], results["flops_per_pair"]
    first, *rest = verdicts(results)
    page.verdict(
        first.replace(" -", f" {_MINUS}"),
        [line.replace(" -", f" {_MINUS}") for line in rest] + [_what_intervals_cover(results)],
    )
    moe = results["models"][MOE]
    settings = results["settings"]
    page.facts(
        [
            (
                f"{birth['relative_error_max']:.1e}",
                "largest change of an output at birth",
                f"relative, over {birth['texts']:.0f} held-out texts; cosine at least "
                f"{birth['cosine_min']:.6f}",
            ),
            (
                f"{flops['moe'] / flops['dense']:.2f}{_TIMES}",
                "training compute of the MoE",
                f"{flops['moe'] / 1e9:.2f} instead of {flops['dense'] / 1e9:.2f} GFLOP per pair",
            ),
            (
                f"{settings['seeds']} {_TIMES} {moe['examples']}",
                f"seeds {_TIMES} training pairs",
                f"of {results['data']['train_pairs']}; {settings['precision']}, at most "
                f"{settings['max_tokens']} tokens a text",
            ),
            (
                f"{results['seconds'] / 60:.1f} min",
                "from start to finish",
                f"{results['machine']['cores']} cores, {results['machine']['processor']}",
            ),
        ]
    )


def _comparison(page: Page, results: Results) -> None:
    data = results["data"]
    page.section(
        "Who retrieves better",
        f"The first paragraph of a docstring is the query, the code it was taken from is the one "
        f"right answer among {data['heldout_pairs']} pieces of code, all from "
        f"{len(data['heldout_modules'])} modules of Python's standard library that training never "
        f"saw.",
    )
    models = results["models"]
    best = max(models, key=lambda name: models[name][MAIN]["mean"])
    page.table(
        ["", "pairs", "training TFLOP", "training time", *(_NAMES[m] for m in METRICS)],
        [
            [
                TITLES[name],
                f"{model['examples']}",
                f"{model['training_flops'] / 1e12:.1f}",
                f"{model['training_seconds']:.0f} s",
                _with_interval(model[MAIN]),
                *(f"{model[metric]['mean']:.4f}" for metric in METRICS[1:]),
            ]
            for name, model in models.items()
        ],
        caption=f"Means over seeds and queries, with the 95% interval of nDCG@10. Intervals of two "
        f"rows may overlap although one is reliably better, because both answer the same queries; "
        f"the differences below are what to read. Highest mean: {TITLES[best]}.",
    )
    rows = [
        (f"{TITLES[c['first']]}\n{_MINUS} {TITLES[c['second']]}", *_span(c[MAIN]))
        for c in results["comparisons"].values()
    ]
    page.figure(
        dots(rows, x_label="difference in nDCG@10 (right of zero: the first is better)", zero=True),
        "Differences, paired by seed and query, with 95% intervals. An interval that touches the "
        "line at zero says that the two cannot be told apart with this many seeds and queries.",
    )
    page.table(
        ["difference", *(_NAMES[m] for m in METRICS)],
        [
            [
                f"MoE {_MINUS} {TITLES[results['comparisons'][name]['second']]}\nat {name}",
                *(_with_interval(results["comparisons"][name][m], sign=True) for m in METRICS),
            ]
            for name in VERDICTS
        ],
        caption="The two comparisons with every measure.",
    )


def _curves(page: Page, results: Results) -> None:
    page.section("How they learned")
    curves: dict[str, list[Any]] = {TITLES[MOE]: [], "dense twin": []}
    for one in results["runs"]:
        if "curve" in one:
            name = TITLES[MOE] if one["kind"] == "moe" else "dense twin"
            curves[name].append((one["curve"]["examples"], one["curve"]["loss"]))
    equal = results["models"][DENSE]["examples"]
    page.figure(
        lines(
            curves,
            x_label="training pairs seen",
            y_label="contrastive loss",
            marks={"equal examples": equal},
        ),
        f"Moving mean of the loss over batches: the mean of all seeds, each seed faint behind it. "
        f"Both models see the same batches in the same order. The dense twin goes on past the "
        f"dashed line, to {results['models'][CONTINUED]['examples']} pairs, until its training has "
        f"cost as many operations as the MoE's.",
    )


def _look(page: Page, results: Results) -> None:
    choices = Choices.from_dict(results["look"]["choices"])
    page.section(
        "Who chooses whom",
        f"What the routers of the trained MoE (seed 0) do with {choices.tokens} tokens of held-out "
        f"docstrings and code, layer by layer.",
    )
    page.raw(who_chooses_whom(choices, results["look"]["titles"]))


def _method(page: Page, results: Results) -> None:
    settings, data = results["settings"], results["data"]
    page.section("How it was made")
    page.details("The plan of the surgery", results["plan"])
    birth = settings["upcycle"]["birth"]
    page.text(
        f"Training is MultipleNegativesRankingLoss over batches of {settings['batch_size']} pairs, "
        f"AdamW at {settings['learning_rate']:g}, linear warm-up over "
        f"{settings['warmup_examples']} pairs, then a constant rate, so that the dense twin's "
        f"continuation is the same run going on. The experts start as copies of the dense MLP, the "
        f"routers at random (standard deviation {birth['router_std']:g}). Compute is counted from "
        f"the matrix products of forward and backward passes without padding."
    )
    page.text(_what_intervals_cover(results))
    page.details("Held-out modules", ", ".join(data["heldout_modules"]))
    page.details("Settings", json.dumps(settings, indent=2))
    page.details(
        "Versions and machine",
        json.dumps({**results["versions"], **results["machine"]}, indent=2),
    )


def _what_intervals_cover(results: Results) -> str:
    seeds = results["settings"]["seeds"]
    queries = results["data"]["heldout_pairs"]
    if seeds == 1:
        return (
            f"Intervals: {queries} queries drawn again 10,000 times. With one seed they say "
            f"nothing about other seeds."
        )
    return (
        f"Intervals: {seeds} seeds and {queries} queries drawn again together, independently, "
        f"10,000 times. The pool of modules and the data stay as they are."
    )


def _with_interval(interval: Mapping[str, float], *, sign: bool = False) -> str:
    mean, low, high = (signed(v) if sign else f"{v:.4f}" for v in _span(interval))
    return f"{mean}\n{low} to {high}".replace("-", _MINUS)


def _span(interval: Mapping[str, float]) -> tuple[float, float, float]:
    return interval["mean"], interval["low"], interval["high"]
