"""Write the numbers of a README, between its marks, from files of results.

    python -m benchmarks.readme benchmarks/results/bench-*.json
    python -m benchmarks.readme --readme benchmarks/layers/README.md FILE ...

A table goes between `<!-- table: speed -->` and `<!-- end of table -->`; there are `speed`,
`models` and `scaling`, and those with a mark are written. A README without any is an error.
"""

import argparse
from pathlib import Path

from moefold.bench.results import read_results
from moefold.bench.tables import readme_tables
from studies.tables import MARK, into_readme

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Read, make, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="what `moefold bench` wrote")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args()
    made = readme_tables([read_results(file) for file in options.results])
    text = options.readme.read_text(encoding="utf-8")
    wanted = {name: one for name, one in made.items() if MARK.format(name) in text}
    if not wanted:
        raise SystemExit(
            f"{options.readme} has no mark for {', '.join(made) or 'these results'}; put "
            f"{MARK.format('speed')} and <!-- end of table --> where a table should be"
        )
    into_readme(wanted, options.readme)
    print(f"wrote {', '.join(wanted)} into {options.readme}")


if __name__ == "__main__":
    main()
