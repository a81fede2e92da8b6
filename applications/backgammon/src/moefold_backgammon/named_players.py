"""Players by name: a folder with a net, or one of the fixed opponents.

    with opened("gnubg-1") as player: ...

A context, because Debian's gnubg is a process that must be ended.

Shapes: none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moefold_backgammon.gnubg_socket import Gnubg, GnubgPlayer
from moefold_backgammon.net import load_net, player_of
from moefold_backgammon.players import GnubgNNPlayer, Player, PubEvalPlayer, RandomPlayer

IN_PROCESS: dict[str, Callable[[], Player]] = {
    "pubeval": PubEvalPlayer,
    "gnubg-nn": GnubgNNPlayer,
    "gnubg-nn-0": GnubgNNPlayer,
    "gnubg-nn-1": lambda: GnubgNNPlayer(plies=1),
    "gnubg-nn-2": lambda: GnubgNNPlayer(plies=2),
    "random": RandomPlayer,
}
"""Players that need nothing but this process; gnubg-nn is a package to be installed."""

DEBIAN = {"gnubg": 0, "gnubg-0": 0, "gnubg-1": 1, "gnubg-2": 2}
"""Debian's gnubg, by how many plies it looks ahead."""

NAMES = (*IN_PROCESS, *DEBIAN)
"""All that can be opened besides folders."""

SLOW = {"gnubg-nn-1", "gnubg-nn-2", *DEBIAN}
"""Those that answer one question after the other."""


@contextmanager
def opened(name: str) -> Iterator[Player]:
    """A player, for as long as the context lasts.

    Args:
        name: one of `NAMES`, or a folder that `train` wrote.

    Raises:
        ValueError: neither, or the folder holds something else.
        RuntimeError: gnubg-nn or gnubg is not installed; says how to.
    """
    if Path(name).is_dir():
        yield player_of(load_net(Path(name)), name=Path(name).resolve().name)
    elif name in DEBIAN:
        with Gnubg(plies=DEBIAN[name]) as gnubg:
            yield GnubgPlayer(gnubg)
    elif name in IN_PROCESS:
        yield IN_PROCESS[name]()
    else:
        raise ValueError(
            f"no player {name!r}: give a folder that train wrote, or one of {', '.join(NAMES)}"
        )


__all__ = ["DEBIAN", "IN_PROCESS", "NAMES", "SLOW", "opened"]
