"""What the verbs of the command line share: how one is added, and how progress is shown.

Shapes: none.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAYERS = (
    "players: a folder that train wrote, pubeval, random, gnubg-nn (also -1 and -2: plies it looks "
    "ahead), gnubg (Debian's program; also gnubg-1, gnubg-2)"
)


@final
class Verbs:
    """The verbs of a parser.

    Args:
        parser: that they are added to.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._verbs = parser.add_subparsers(required=True, metavar="VERB")

    def add(
        self, name: str, does: Callable[[Any], None], says: str, *, examples: str, more: str = ""
    ) -> argparse.ArgumentParser:
        """A verb, to which arguments can be added.

        Args:
            name: what is typed.
            does: is called with the arguments.
            says: what it does, in a line.
            examples: lines that can be typed.
            more: what else is to be known.
        """
        lines = "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
        made = self._verbs.add_parser(
            name,
            help=says,
            description=says,
            epilog=f"examples:\n{lines}" + (f"\n\n{more}" if more else ""),
            formatter_class=_Help,
        )
        made.set_defaults(verb=does)
        return made


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows examples as they are, and of each option what it is if not said."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f"{action.help or ''} (%(default)s)".strip()


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, which is told how many are done and of how many; only on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


__all__ = ["PLAYERS", "Verbs", "bar"]
