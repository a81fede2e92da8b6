"""The command line: label, train, evaluate, match, play, serve.

Shapes: none.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from moefold.preference import FitConfig, fit, measure, preference_losses
from moefold_backgammon.decisions import read_decisions
from moefold_backgammon.match import MatchConfig, play_match
from moefold_backgammon.net import (
    HIDDEN,
    groups_of,
    load_net,
    new_model,
    player_of,
    save_net,
)
from moefold_backgammon.players import GnubgNNPlayer, Player, PubEvalPlayer, RandomPlayer

EXAMPLES = """examples:
  moefold-backgammon label labels --games 4000                 gnubg's nets against themselves
  moefold-backgammon train labels --output net                 learn to choose as they do
  moefold-backgammon evaluate net other-labels                 how often the choice is theirs
  moefold-backgammon match net pubeval --pairs 1500            points per game, with an interval
  moefold-backgammon play net                                  you against it, in the terminal
  moefold-backgammon serve net --port 4000                     in gnubg: set player 0 external
                                                               localhost:4000
players: a folder of a net, pubeval, gnubg-nn, gnubg-nn-1, gnubg-nn-2, random
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Returns:
        Exit status: 0, 2 for bad input or a missing program, 130 if interrupted.
    """
    asked = _parser().parse_args(arguments)
    try:
        asked.verb(asked)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"moefold-backgammon: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moefold-backgammon",
        description="Learn to choose backgammon plays as an expert does, and measure it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, does: Callable[[Any], None], says: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=says, description=says)
        made.set_defaults(verb=does)
        return made

    label = verb("label", _label, "let gnubg's nets play themselves and value every play")
    label.add_argument("folder", type=Path)
    label.add_argument("--games", type=int, default=4000)
    label.add_argument("--plies", type=int, default=0, choices=(0, 1, 2))
    label.add_argument("--top", type=int, help="value only so many plays that deep")
    label.add_argument("--seed", type=int, default=0)

    train = verb("train", _train, "learn to choose as the labels say; a run that stopped goes on")
    train.add_argument("labels", type=Path, help="a folder that label wrote")
    train.add_argument("--output", type=Path, required=True)
    train.add_argument("--hidden", type=int, default=HIDDEN)
    train.add_argument("--loss", default="pair-logistic", choices=preference_losses.names())
    train.add_argument("--epochs", type=int, default=8)
    train.add_argument("--learning-rate", type=float, default=FitConfig().learning_rate)
    train.add_argument("--seed", type=int, default=0)

    evaluate = verb("evaluate", _evaluate, "how often a net's choice is the expert's")
    evaluate.add_argument("net", type=Path)
    evaluate.add_argument("labels", type=Path, help="of other games than those of training")
    evaluate.add_argument("--results", type=Path, help="a JSON file to write")

    match = verb("match", _match, "two players, each dice sequence twice with sides swapped")
    match.add_argument("first")
    match.add_argument("second")
    match.add_argument("--pairs", type=int, default=1500, help="of games with the same dice")
    match.add_argument("--at-once", type=int, default=1024, help="pairs side by side")
    match.add_argument("--seed", type=int, default=0)
    match.add_argument("--results", type=Path, help="a .jsonl file; a match that stopped goes on")

    play = verb("play", _play, "a person plays in the terminal")
    play.add_argument("opponent")
    play.add_argument("--seed", type=int, default=0)

    serve = verb("serve", _serve, "play in gnubg, as an external player")
    serve.add_argument("player")
    serve.add_argument("--port", type=int, default=4000)
    return parser


def _label(asked: Any) -> None:
    from moefold_backgammon.gnubg_nn_expert import LabelConfig, label_games

    config = LabelConfig(games=asked.games, plies=asked.plies, top=asked.top, seed=asked.seed)
    with _bar("files of games") as watch:
        label_games(asked.folder, config, watch=lambda done, of, _: watch(done, of))
    found = read_decisions(asked.folder)
    print(f"{len(found):,} decisions with {len(found.finals):,} plays in {asked.folder}")


def _train(asked: Any) -> None:
    groups = groups_of(read_decisions(asked.labels))
    model = new_model(asked.hidden, loss=asked.loss, seed=asked.seed)
    config = FitConfig(epochs=asked.epochs, learning_rate=asked.learning_rate, seed=asked.seed)
    steps = -(-len(groups) * asked.epochs // config.batch_size)
    with _bar("steps") as watch:
        fit(
            model,
            groups,
            config,
            folder=asked.output.with_name(f"{asked.output.name}-run"),
            resume=True,
            advance=lambda step: watch(step, steps),
        )
    save_net(model, asked.output)
    print(f"learnt from {len(groups):,} decisions; wrote {asked.output}")


def _evaluate(asked: Any) -> None:
    decisions = read_decisions(asked.labels)
    # Of two plays of one equity, which in races there often are, either is right.
    report = measure(load_net(asked.net), groups_of(decisions, by_equity=True))
    print(_said(report))
    if asked.results is not None:
        asked.results.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")


def _said(report: Any) -> str:
    """What was measured, as lines to read."""
    lines = [
        f"agreement {report.agreement:.3f} (standard error {report.standard_error:.3f}; by chance "
        f"{report.chance:.3f}) in {report.groups:,} decisions, regret {report.regret:.4f} points"
    ]
    for name, found in (report.categories or {}).items():
        lines.append(f"  {name:<9} {found['mean']:.3f} in {found['groups']:,}")
    return "\n".join(lines)


def _match(asked: Any) -> None:
    config = MatchConfig(pairs=asked.pairs, pairs_at_once=asked.at_once, seed=asked.seed)
    first, second = player(asked.first), player(asked.second)
    with _bar("pairs") as watch:
        found = play_match(first, second, config, results=asked.results, watch=watch)
    print(found)


def _play(asked: Any) -> None:
    from moefold_backgammon.play import play_game

    opponent = player(asked.opponent)
    hints = player_of(load_net(Path(asked.opponent))) if Path(asked.opponent).is_dir() else None
    game = 0
    while True:
        points = play_game(opponent, hints=hints, seed=asked.seed, game=game)
        if points is None:
            return
        game += 1


def _serve(asked: Any) -> None:
    from moefold_backgammon.external_player import ExternalPlayer

    server = ExternalPlayer(player(asked.player), port=asked.port)
    print(f"in gnubg: set player 0 external {server.address}")
    server.serve()


def player(name: str) -> Player:
    """A player by its name, or the net in a folder.

    Raises:
        ValueError: neither.
        RuntimeError: gnubg-nn is not installed.
    """
    if Path(name).is_dir():
        return player_of(load_net(Path(name)), name=Path(name).resolve().name)
    known: dict[str, Callable[[], Player]] = {
        "pubeval": PubEvalPlayer,
        "gnubg-nn": GnubgNNPlayer,
        "gnubg-nn-1": lambda: GnubgNNPlayer(plies=1),
        "gnubg-nn-2": lambda: GnubgNNPlayer(plies=2),
        "random": RandomPlayer,
    }
    if name not in known:
        raise ValueError(
            f"no player {name!r}: give a folder that train wrote, or one of {', '.join(known)}"
        )
    return known[name]()


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the terminal, which is told how many are done and of how many."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


__all__ = ["main", "player"]
