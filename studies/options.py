"""The options that every study has."""

import argparse
from pathlib import Path


def options_of(
    description: str, *, data: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    """A parser of what a study is asked for; `data` says what the folder of that name holds."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help=data)
    parser.add_argument("--output", type=Path, help="folder of everything that is written")
    parser.add_argument("--quick", action="store_true", help="a look at every part")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each (default 2)")
    parser.add_argument(
        "--publish", action="store_true", help="put the results beside the code, README included"
    )
    parser.add_argument(
        "--report", action="store_true", help="only make the README's tables from results.json"
    )
    return parser
