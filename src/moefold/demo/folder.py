"""The folder a demo writes into: one it made, and nobody else's."""

from pathlib import Path

_MARK = ".moefold-demo"


def claim(out: Path) -> None:
    """Make the folder, or find that an earlier demo made it.

    Raises:
        ValueError: there is something that no demo wrote; it would be overwritten.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder for the demo to write into")
    if out.is_dir() and any(out.iterdir()) and not (out / _MARK).exists():
        raise ValueError(
            f"{out} holds files that no demo wrote; give a new or an empty folder with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()


def forget(out: Path) -> None:
    """Delete what finished runs left, so that everything is run again."""
    for pattern in ("seed-*-*.json", "untouched.json"):
        for file in (out / "runs").glob(pattern):
            file.unlink()
