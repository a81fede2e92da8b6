"""Write the numbers of READMEs, between their marks, from files of results.

    python -m benchmarks.readme                                   # both, from all that is committed
    python -m benchmarks.readme FILE ... --readme benchmarks/layers/README.md

A table goes between `<!-- table: speed -->` and `<!-- end of table -->`; their names are those of
`moefold.bench.tables.readme_tables`, and those with a mark are written. A README without any is an
error. What nobody measured says so.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from moefold.bench.results import read_results
from moefold.bench.tables import readme_tables
from moefold.evaluate.files import whole_file
from studies.tables import MARK, with_tables

ROOT = Path(__file__).parents[1]
READMES = (ROOT / "README.md", ROOT / "benchmarks" / "layers" / "README.md")


def committed() -> list[Path]:
    """The files of results that the READMEs are written from."""
    return sorted((ROOT / "benchmarks" / "results").glob("bench-*.json"))


def written(readme: Path, files: Sequence[Path]) -> tuple[str, list[str]]:
    """A README with its tables made anew, and the names of these; the file stays as it is.

    Raises:
        ValueError: it has no place for any table, a table has no end, or a file holds no results.
    """
    made = readme_tables({_link(file, readme): read_results(file) for file in files})
    text = readme.read_text(encoding="utf-8")
    wanted = {name: one for name, one in made.items() if MARK.format(name) in text}
    if not wanted:
        raise ValueError(
            f"{readme} has no mark for any of {', '.join(made)}; put {MARK.format('speed')} and "
            f"<!-- end of table --> where a table should be"
        )
    return with_tables(text, wanted), list(wanted)


def _link(file: Path, readme: Path) -> str:
    to = Path(os.path.relpath(file.resolve(), readme.resolve().parent)).as_posix()
    return f"[{file.stem}]({to})"


def main() -> None:
    """Read, make, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="*", help="what `moefold bench` wrote")
    parser.add_argument("--readme", type=Path, nargs="+", default=READMES)
    options = parser.parse_args()
    for readme in options.readme:
        try:
            text, names = written(readme, options.results or committed())
        except ValueError as error:
            raise SystemExit(str(error)) from error
        with whole_file(readme) as beside:
            beside.write_text(text, encoding="utf-8")
        print(f"wrote {', '.join(names)} into {readme}")


if __name__ == "__main__":
    main()
