"""Tables in Markdown, and a README that holds each of them between two marks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

MARK, END = "<!-- table: {} -->", "<!-- end of table -->"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_tables(text: str, made: Mapping[str, str]) -> str:
    """A text with these tables between its marks.

    Raises:
        ValueError: a table has no place in it.
    """
    for name, one in made.items():
        mark = MARK.format(name)
        before, found, rest = text.partition(mark)
        old, ended, after = rest.partition(END)
        if not found or not ended or MARK.partition("{")[0] in old:
            raise ValueError(f"the README has no {mark} with {END} after it; put both there")
        text = f"{before}{mark}\n\n{one}\n\n{END}{after}"
    return text


def into_readme(made: Mapping[str, str], readme: Path) -> None:
    """Writes tables between their marks in a README.

    Raises:
        ValueError: a table has no place in it.
    """
    text = with_tables(readme.read_text(encoding="utf-8"), made)
    readme.write_text(text, encoding="utf-8")


def write_tables(made: Mapping[str, str], path: Path) -> str:
    """Writes all tables into a file and returns its text."""
    text = "\n\n".join(f"### {name}\n\n{one}" for name, one in made.items()) + "\n"
    path.write_text(text, encoding="utf-8")
    return text
