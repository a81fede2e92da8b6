"""`moefold reroute`: another router in a pretrained mixture, at a budget that text has judged."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import transformers
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moefold.cli.models import Opened, open_model
from moefold.cli.options import parse, router_of
from moefold.cli.texts import read_pairs, read_texts
from moefold.evaluate.budget_plot import plot_sweep
from moefold.evaluate.budgets import (
    BUDGETS,
    at_budget,
    default_budgets,
    halves,
    reroute_at,
    sweep_budgets,
)
from moefold.evaluate.intervals import Interval
from moefold.evaluate.sweep import Sweep, SweepConfig, big, shown
from moefold.rerouting import find_blocks, reroute, save
from moefold.routers import RouterConfig, known_settings
from moefold.surgery.encoder import source_folder
from moefold.surgery.saved import (
    MANIFEST,
    is_saved,
    refuse_foreign_folder,
    refuse_unwritable_folder,
)

EXAMPLE = "moefold reroute olmoe --budget 1.5 --calibrate text.txt --output olmoe-rerouted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Put another router into a pretrained mixture, without training, and measure what that does.

    With text it is calibrated, measured at several budgets against the untouched model, and the
    numbers are kept as JSON and as a plot beside the output.

    Attributes:
        model: a folder of a mixture of transformers (OLMoE, Mixtral, Qwen3-MoE, ...) with its
            tokenizer.
        router: name of the router.
        budget: experts per token on average; what the model has if not said.
        alpha: share of the expert's view in the unified score.
        inference: the rule by which the router chooses outside of training; with text threshold,
            if the router has such rules, else group.
        set: another setting of the router, name=value; may be repeated.
        faithful: as the released code of USMoE does it, where padding competes.
        calibrate: text to calibrate on (its first half) and to measure on (its second half), plain
            or .jsonl, or .xz of either.
        budgets: budgets to measure, as in 1,1.25,1.5,2; some up to the model's own if not said.
        pairs: a .jsonl file of [text, text, score] to judge embeddings by, or .xz of it.
        output: folder to write the rerouted model to; moefold.load opens it.
        results: JSON file for what is measured; output-budgets.json if not said.
        length: tokens of a piece of text.
        tokens: most tokens to calibrate on, and as many to measure on.
        batch_size: pieces in a batch.
        device: where to run: cpu, cuda.
        force: replace the output if it holds a model of moefold.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    router: str = "unified"
    budget: float | None = None
    alpha: float | None = None
    inference: Literal["group", "threshold", "prefix", "predictor", "token-choice"] | None = None
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    faithful: bool = False
    calibrate: Path | None = None
    budgets: str | None = None
    pairs: Path | None = None
    output: Annotated[Path | None, tyro.conf.arg(aliases=["--out"])] = None
    results: Path | None = None
    length: int = 256
    tokens: int = 16384
    batch_size: int = 8
    device: str = "cpu"
    force: bool = False


def main(arguments: Sequence[str]) -> None:
    """Runs the verb.

    Raises:
        ValueError: settings that do not go together, text that is empty, or whatever opening,
            rerouting, measuring and saving refuse.
    """
    asked = parse(Arguments, arguments, verb="reroute", example=EXAMPLE)
    budgets = _budgets(asked)
    router = _router(asked)
    _check(asked)
    texts = None if asked.calibrate is None else read_texts(asked.calibrate)
    pairs = [] if asked.pairs is None else read_pairs(asked.pairs)
    opened = _open(asked, needs_tokenizer=texts is not None)
    if texts is None:
        _once(asked, router, opened)
    else:
        _sweep(asked, router, budgets, opened, texts, pairs)


def _once(asked: Arguments, router: RouterConfig, opened: Opened) -> None:
    """Reroutes without text."""
    known = known_settings(router.name) or ()
    budget = asked.budget
    if budget is None and not {*BUDGETS, "capacity"} & router.settings.keys():
        budget = _own_k(opened.model) if {*BUDGETS} & {*known} else None
    chosen = router if budget is None else at_budget(opened.model, router, budget)
    done = reroute(opened.model, chosen, faithful=asked.faithful)
    if done.to_learn is not None:
        raise ValueError(
            f"{done.router} has {done.to_learn} to learn from text; add --calibrate TEXT_FILE"
        )
    print(done)
    _save(asked, opened)


def _sweep(
    asked: Arguments,
    router: RouterConfig,
    budgets: tuple[float, ...] | None,
    opened: Opened,
    texts: list[str],
    pairs: list[tuple[str, str, float]],
) -> None:
    """Measures, shows, and saves the model at the budget that was asked for."""
    import matplotlib  # noqa: F401 - if it is missing, now and not when all is measured

    from moefold.demo.bars import Bars  # its package trains models, for which libraries are read

    if budgets is None:
        budgets = default_budgets(router, _own_k(opened.model))
    config = SweepConfig(
        router=router,
        budgets=budgets if asked.budget is None else (*budgets, asked.budget),
        faithful=asked.faithful,
        length=asked.length,
        tokens=asked.tokens,
        batch_size=asked.batch_size,
    )
    file = asked.results or Path(f"{asked.output or 'rerouted'}-budgets.json")
    with Bars(Console(stderr=True), "all budgets") as bars:  # it is not what the verb has to say
        found = sweep_budgets(
            opened.model, opened.processor, config, texts, pairs=pairs, results=file, watch=bars
        )
    plot = file.with_suffix(".png")
    plot_sweep(found, plot)
    Console().print(table_of(found))
    print("\n".join(legend_of(found)))
    print(f"wrote {file} and {plot}")
    if asked.budget is None:
        return
    print(found.in_words(asked.budget))
    if asked.output is not None:
        calibration, _ = halves(texts, opened.processor, config)
        done = reroute_at(opened.model, config, asked.budget, calibration)
        print(replace(done, to_learn=None))  # it has just learnt it
        _save(asked, opened)


def table_of(sweep: Sweep) -> Table:
    """A sweep as a table: the untouched model, then every budget."""
    old = sweep.original
    table = Table(title=sweep.router, box=SIMPLE, show_edge=False, title_justify="left")
    table.padding = (0, 0)
    for name in ("budget", "experts", "FLOPs", "perplexity", "pairs", "agreement"):
        if name != "pairs" or old.quality is not None:
            table.add_column(name, justify="right")
    for one in (old, *sweep.budgets):
        cells = [
            "untouched" if one.budget is None else f"{one.budget:g}",
            f"{one.experts_per_token:.2f}",
            f"{100 * one.flops_per_token / old.flops_per_token:.1f} %",
            _cell(one.perplexity),
            *([] if old.quality is None else [_cell(one.quality)]),
            _cell(one.agreement),
        ]
        table.add_row(*cells)
    return table


def _cell(interval: Interval | None) -> str:
    return "-" if interval is None else shown(interval, digits=3)


def legend_of(sweep: Sweep) -> list[str]:
    """What the columns of the table are."""
    flops = big(sweep.original.flops_per_token)
    lines = [
        "experts: that a token has, on average over tokens and mixtures",
        f"FLOPs: for each token, 100 % are {flops}",
    ]
    if sweep.original.quality is not None:
        lines.append("pairs: Spearman x100 of similarities with people's scores")
    lines.append("agreement: Spearman x100 of similarities with the untouched model's")
    lines.append("in brackets: intervals of 95 %, over documents, pairs and texts")
    if sweep.no_perplexity is not None:
        lines.append(f"no perplexity: {sweep.no_perplexity}")
    return lines


def _router(asked: Arguments) -> RouterConfig:
    """The router without its budget.

    Raises:
        ValueError: it is unknown, or has no such setting.
    """
    known = known_settings(asked.router) or ()
    settings: dict[str, Any] = {}
    if asked.alpha is not None:
        settings["alpha"] = asked.alpha
    if asked.inference is not None:
        settings["inference"] = asked.inference
    elif asked.calibrate is not None and "inference" in known:
        settings["inference"] = "threshold"
    return router_of(asked.router, asked.set, settings)


def _budgets(asked: Arguments) -> tuple[float, ...] | None:
    if asked.budgets is None:
        return None
    try:
        return tuple(float(part) for part in asked.budgets.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            f"--budgets {asked.budgets!r}: write numbers with commas, as in --budgets 1,1.5,2"
        ) from None


def _check(asked: Arguments) -> None:
    """Refuses what does not go together, before anything is opened.

    Raises:
        ValueError: says which, and what to do.
    """
    if asked.calibrate is None:
        for flag in ("budgets", "pairs", "results"):
            if getattr(asked, flag) is not None:
                raise ValueError(f"--{flag} is for measuring; add --calibrate TEXT_FILE")
    if asked.output is None:
        return
    if asked.calibrate is not None and asked.budget is None:
        raise ValueError(
            "--output is for the model at one budget; say which, as in --budget 1.5, or leave "
            "--output out"
        )
    refuse_foreign_folder(asked.output)
    refuse_unwritable_folder(asked.output)
    if is_saved(asked.output) and not asked.force:
        raise ValueError(f"{asked.output} holds a model of moefold; add --force to replace it")


def _open(asked: Arguments, *, needs_tokenizer: bool) -> Opened:
    """The mixture and its tokenizer.

    Raises:
        ValueError: there is no such model, it has no mixture, or no tokenizer.
    """
    transformers.utils.logging.disable_progress_bar()
    folder = source_folder(asked.model)
    if folder is not None and (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} holds an upcycled model; its router is chosen at upcycling: moefold upcycle "
            f"--router {asked.router}"
        )
    opened = open_model(asked.model)
    if not find_blocks(opened.model):
        raise ValueError(
            f"{asked.model} is dense: it has no mixture of experts to reroute; make one of it "
            f"with moefold upcycle {asked.model}"
        )
    text = isinstance(opened.processor, transformers.PreTrainedTokenizerBase)
    if needs_tokenizer and not text:
        raise ValueError(
            f"{asked.model} has no tokenizer, without which text cannot be read; copy its "
            f"tokenizer_config.json and tokenizer.json into the folder"
        )
    opened.model.to(asked.device)
    return opened


def _own_k(model: Any) -> int:
    return find_blocks(model)[0].k


def _save(asked: Arguments, opened: Opened) -> None:
    if asked.output is None:
        return
    save(opened.model, asked.output, tokenizer=opened.processor)
    print(f"wrote {asked.output}; moefold.load opens it, and transformers as the untouched model")
