"""The verbs that play: match, play, serve.

Shapes: none.
"""

import argparse
import errno
from pathlib import Path
from typing import Any

from moefold_backgammon.cli_parts import PLAYERS, Verbs, bar
from moefold_backgammon.gnubg_socket import GnubgDied
from moefold_backgammon.match import MatchConfig, play_match
from moefold_backgammon.named_players import SLOW, opened
from moefold_backgammon.players import NetPlayer

AT_ONCE, AT_ONCE_SLOW = 1024, 8
"""Pairs of games side by side, and for a player that answers one question after the other: then an
interruption loses less."""


def add_verbs(verbs: Verbs) -> None:
    """Adds match, play and serve."""
    match = verbs.add(
        "match",
        _match,
        "two players, each dice sequence twice with sides swapped",
        examples="""
            moefold-backgammon match net pubeval --pairs 1500
            moefold-backgammon match net gnubg-1 --pairs 200 --results match.jsonl
        """,
        more=f"With --results a match that stopped goes on, and can be made longer.\n{PLAYERS}",
    )
    match.add_argument("first", help="whose points are counted")
    match.add_argument("second", help="its opponent")
    match.add_argument("--pairs", type=int, default=1500, help="of games with the same dice")
    match.add_argument(
        "--at-once",
        type=int,
        help=f"pairs side by side ({AT_ONCE}; {AT_ONCE_SLOW} with a slow player)",
    )
    match.add_argument("--seed", type=int, default=0, help="of the dice")
    match.add_argument("--results", type=Path, help="a .jsonl file of the finished pairs")

    play = verbs.add(
        "play",
        _play,
        "a person plays in the terminal",
        examples="moefold-backgammon play net",
        more=f"Type help for what can be typed; a net also gives hints.\n{PLAYERS}",
    )
    play.add_argument("opponent", help="a name or a folder, see below")
    play.add_argument("--seed", type=int, default=0, help="of the dice")

    serve = verbs.add(
        "serve",
        _serve,
        "play in gnubg, as an external player",
        examples="moefold-backgammon serve net --port 4000",
        more=f"Then, in gnubg: set player 0 external localhost:4000\n{PLAYERS}",
    )
    serve.add_argument("player", help="a name or a folder, see below")
    serve.add_argument(
        "--port", type=_port, default=4000, help="of this machine; any free one if 0"
    )


def _match(asked: Any) -> None:
    at_once = asked.at_once
    if at_once is None:
        at_once = AT_ONCE_SLOW if SLOW & {asked.first, asked.second} else AT_ONCE
    config = MatchConfig(pairs=asked.pairs, pairs_at_once=at_once, seed=asked.seed)
    with opened(asked.first) as first, opened(asked.second) as second, bar("pairs") as watch:
        try:
            found = play_match(first, second, config, results=asked.results, watch=watch)
        except GnubgDied as error:
            then = "with --results FILE a match goes on where it stopped"
            if asked.results is not None:
                then = f"the finished pairs are in {asked.results}; the same command goes on"
            raise RuntimeError(f"{error}; {then}") from error
    print(found)


def _play(asked: Any) -> None:
    from moefold_backgammon.play import play_game

    with opened(asked.opponent) as opponent:
        hints = opponent if isinstance(opponent, NetPlayer) else None
        game = 0
        while play_game(opponent, hints=hints, seed=asked.seed, game=game) is not None:
            game += 1


def _serve(asked: Any) -> None:
    from moefold_backgammon.external_player import ExternalPlayer

    with opened(asked.player) as player:
        try:
            server = ExternalPlayer(player, port=asked.port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise ValueError(
                f"port {asked.port} of this machine is in use; name another by --port, or 0 for "
                f"any that is free"
            ) from error
        print(f"in gnubg: set player 0 external {server.address}", flush=True)
        server.serve()


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; a number from 0 to 65535")
    return int(text)


__all__ = ["add_verbs"]
