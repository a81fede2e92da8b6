"""The command line: label, benchmark, train, evaluate, match, play, serve.

Shapes: none.
"""

import argparse
import sys
from collections.abc import Sequence

from moefold_backgammon import cli_games, cli_learning
from moefold_backgammon.cli_parts import PLAYERS, Verbs

EXAMPLES = f"""examples:
  moefold-backgammon label labels --games 4000                 gnubg's nets against themselves
  moefold-backgammon train labels --output net                 learn to choose as they do
  moefold-backgammon benchmark test.bm                         decisions valued 2 plies deep
  moefold-backgammon evaluate net test.bm                      points lost in each decision
  moefold-backgammon match net pubeval --pairs 1500            points per game, with an interval
  moefold-backgammon play net                                  you against it, in the terminal
  moefold-backgammon serve net --port 4000                     in gnubg: set player 0 external
                                                               localhost:4000
{PLAYERS}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Returns:
        Exit status: 0, 2 for bad input or a missing program, 130 if interrupted.
    """
    asked = parser().parse_args(arguments)
    try:
        asked.verb(asked)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"moefold-backgammon: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs; what it finds has a `verb` to call with it."""
    made = argparse.ArgumentParser(
        prog="moefold-backgammon",
        description="Learn to choose backgammon plays as an expert does, and measure it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = Verbs(made)
    cli_learning.add_verbs(verbs)
    cli_games.add_verbs(verbs)
    return made


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


__all__ = ["main", "parser"]
