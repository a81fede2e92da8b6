"""The verbs around learning: label, benchmark, train, evaluate.

Shapes: none.
"""

from pathlib import Path
from typing import Any

from moefold.preference import FitConfig, Groups, Report, fit, measure, preference_losses
from moefold_backgammon.bm import Benchmark
from moefold_backgammon.cli_parts import PLAYERS, Verbs, bar
from moefold_backgammon.data import Data, groups_of_choices, open_data
from moefold_backgammon.decisions import Decisions, read_decisions
from moefold_backgammon.human import HumanDecisions
from moefold_backgammon.judging import (
    judge_by_benchmark,
    judge_by_labels,
    judge_by_people,
    write_json,
)
from moefold_backgammon.named_players import opened
from moefold_backgammon.net import HIDDEN, groups_of, load_net, new_model, save_net
from moefold_backgammon.own_benchmark import SEED

HELD_OUT = 0.1
"""Share of the matches of a human file that is kept apart, if nothing else is said."""


def add_verbs(verbs: Verbs) -> None:
    """Adds label, benchmark, train and evaluate."""
    label = verbs.add(
        "label",
        _label,
        "let gnubg's nets play themselves and value every play",
        examples="""
            moefold-backgammon label labels --games 4000
            moefold-backgammon label deep --games 40 --plies 2 --top 8 --processes 2
        """,
        more="A run that stopped goes on. Needs gnubg-nn: pip install gnubg-nn",
    )
    label.add_argument("folder", type=Path, help="where to write")
    label.add_argument("--games", type=int, default=4000, help="how many")
    label.add_argument("--plies", type=int, default=0, choices=(0, 1, 2), help="how deep to look")
    label.add_argument("--top", type=int, help="value only so many plays that deep")
    label.add_argument("--seed", type=int, default=0, help="of dice and random plays")
    label.add_argument("--processes", type=int, default=1, help="that work at a time")

    benchmark = verbs.add(
        "benchmark",
        _benchmark,
        "write a .bm file: decisions with their best plays, valued 2 plies deep by gnubg's nets",
        examples="""
            moefold-backgammon benchmark test.bm --processes 2
            moefold-backgammon evaluate pubeval test.bm
        """,
        more="A run that stopped goes on. Needs gnubg-nn: pip install gnubg-nn",
    )
    benchmark.add_argument("file", type=Path, help="what to write; its name ends in .bm")
    benchmark.add_argument("--decisions", type=int, default=2000, help="one of each game")
    benchmark.add_argument("--plies", type=int, default=2, choices=(1, 2), help="how deep to look")
    benchmark.add_argument("--top", type=int, default=8, help="value and list so many plays")
    benchmark.add_argument(
        "--seed", type=int, default=SEED, help="of the games; not that of labels learnt from"
    )
    benchmark.add_argument("--processes", type=int, default=1, help="that work at a time")

    train = verbs.add(
        "train",
        _train,
        "learn to choose as an expert does; a run that stopped goes on",
        examples="""
            moefold-backgammon train labels --output net
            moefold-backgammon train matches.jsonl.xz --output human-net --held-out 0.1
        """,
        more="Of human decisions only the choices are learnt, no equities.",
    )
    train.add_argument("data", type=Path, help="a folder that label wrote, or human decisions")
    train.add_argument("--output", type=Path, required=True, help="a folder for the net")
    train.add_argument("--hidden", type=int, default=HIDDEN, help="units of the net")
    train.add_argument(
        "--loss", default="pair-logistic", choices=preference_losses.names(), help="what is lowered"
    )
    train.add_argument("--epochs", type=int, default=8, help="passes over the decisions")
    train.add_argument(
        "--learning-rate", type=float, default=FitConfig().learning_rate, help="at its highest"
    )
    train.add_argument("--seed", type=int, default=0, help="of weights and order")
    _add_held_out(train)

    evaluate = verbs.add(
        "evaluate",
        _evaluate,
        "how well a player chooses: on labels, a benchmark (.bm) or human decisions (.jsonl)",
        examples="""
            moefold-backgammon evaluate net other-labels
            moefold-backgammon evaluate pubeval test.bm --results pubeval.json
            moefold-backgammon evaluate human-net matches.jsonl.xz --held-out 0.1
        """,
        more=PLAYERS,
    )
    evaluate.add_argument("player", help="a name or a folder, see below")
    evaluate.add_argument("data", type=Path, help="not what the player has learnt from")
    evaluate.add_argument("--results", type=Path, help="a JSON file to write")
    _add_held_out(evaluate)


def _add_held_out(parser: Any) -> None:
    parser.add_argument(
        "--held-out",
        type=float,
        metavar="SHARE",
        help=f"of human matches, kept apart from training for evaluation ({HELD_OUT}); the same "
        f"for both",
    )


def _label(asked: Any) -> None:
    from moefold_backgammon.gnubg_nn_expert import LabelConfig, label_games

    _check_processes(asked.processes)
    config = LabelConfig(games=asked.games, plies=asked.plies, top=asked.top, seed=asked.seed)
    with bar("files of games") as watch:
        label_games(
            asked.folder,
            config,
            processes=asked.processes,
            watch=lambda done, of, _: watch(done, of),
        )
    found = read_decisions(asked.folder)
    print(f"{len(found):,} decisions with {len(found.finals):,} plays in {asked.folder}")


def _benchmark(asked: Any) -> None:
    from moefold_backgammon.own_benchmark import BenchmarkConfig, make_benchmark

    _check_processes(asked.processes)
    config = BenchmarkConfig(
        decisions=asked.decisions, plies=asked.plies, top=asked.top, seed=asked.seed
    )
    with bar("decisions") as watch:
        made = make_benchmark(asked.file, config, processes=asked.processes, watch=watch)
    print(f"{len(made):,} decisions with {len(made.finals):,} plays in {asked.file}")


def _train(asked: Any) -> None:
    model = new_model(asked.hidden, loss=asked.loss, seed=asked.seed)
    config = FitConfig(epochs=asked.epochs, learning_rate=asked.learning_rate, seed=asked.seed)
    groups, apart = _lessons(_opened(asked.data), asked)
    steps = -(-len(groups) * asked.epochs // config.batch_size)
    with bar("steps") as watch:
        fit(
            model,
            groups,
            config,
            folder=asked.output.with_name(f"{asked.output.name}-run"),
            resume=True,
            advance=lambda step: watch(step, steps),
        )
    save_net(model, asked.output)
    print(f"learnt from {len(groups):,} decisions{apart}; wrote {asked.output}")


def _lessons(data: Data, asked: Any) -> tuple[Groups, str]:
    """What is learnt from, and words about what is kept apart."""
    match data:
        case Decisions():
            _refuse_held_out(asked)
            return groups_of(data), ""
        case HumanDecisions():
            share = HELD_OUT if asked.held_out is None else asked.held_out
            apart = data.held_out(share)
            if apart.all():
                raise ValueError(
                    f"with --held-out {share} nothing is left of {len(data.matches)} matches to "
                    f"learn from; keep fewer apart"
                )
            groups = groups_of_choices(data.part(~apart))
            return groups, f" of people ({int(apart.sum()):,} kept apart)"
        case _:
            raise ValueError(
                f"{asked.data} is a benchmark, which is for evaluate: it lists the best few plays "
                f"only; learn from a folder that label wrote, or from human decisions"
            )


def _evaluate(asked: Any) -> None:
    data = _opened(asked.data)
    if not isinstance(data, HumanDecisions):
        _refuse_held_out(asked)
    if isinstance(data, Decisions) and Path(asked.player).is_dir():
        # A net's values say more than its choices. Of two plays of one equity, which in races
        # there often are, either is right.
        report = measure(load_net(Path(asked.player)), groups_of(data, by_equity=True))
    else:
        with opened(asked.player) as player, bar("decisions") as watch:
            match data:
                case Decisions():
                    report = judge_by_labels(player, data, watch=watch)
                case Benchmark():
                    report = judge_by_benchmark(player, data, watch=watch)
                case HumanDecisions():
                    share = HELD_OUT if asked.held_out is None else asked.held_out
                    report = judge_by_people(player, data, held_out=share, watch=watch)
    print(_said(report) if isinstance(report, Report) else report)
    if asked.results is not None:
        write_json(asked.results, report)


def _opened(path: Path) -> Data:
    with bar("reading"):
        return open_data(path)


def _refuse_held_out(asked: Any) -> None:
    if asked.held_out is not None:
        raise ValueError(
            f"--held-out {asked.held_out} is of human matches; {asked.data} has none, so leave it "
            f"out and keep other labels for evaluation"
        )


def _check_processes(processes: int) -> None:
    if processes < 1:
        raise ValueError(f"--processes {processes}: at least one must work")


def _said(report: Report) -> str:
    """What was measured, as lines to read."""
    lines = [
        f"agreement {report.agreement:.3f} (standard error {report.standard_error:.3f}; by chance "
        f"{report.chance:.3f}) in {report.groups:,} decisions, regret {report.regret:.4f} points"
    ]
    for name, found in (report.categories or {}).items():
        lines.append(f"  {name:<9} {found['mean']:.3f} in {found['groups']:,}")
    return "\n".join(lines)


__all__ = ["HELD_OUT", "add_verbs"]
