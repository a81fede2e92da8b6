"""Files that are there whole or not at all, so that a run that was killed leaves nothing half."""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

from moefold.evaluate.files import whole_file


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON; `NaN` is refused."""
    with whole_file(path) as beside:
        text = json.dumps(value, indent=1, allow_nan=False)
        beside.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def digest(text: str) -> str:
    """A short name for a text: the same text, the same name."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Settings(Protocol):
    """Everything that changes a number of a study."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        ...


def claim(folder: Path, settings: Settings) -> None:
    """Makes a folder the place of a study, or finds that it is one with the same settings.

    Raises:
        ValueError: it holds a study with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, mine = folder / "settings.json", settings.to_dict()
    if not path.exists():
        write_json(path, mine)
        return
    theirs = read_json(path)
    other = sorted(k for k in mine | theirs if mine.get(k) != theirs.get(k))
    if other:
        raise ValueError(
            f"{folder} holds a study with another {', '.join(other)}; give another --output, or "
            f"remove the folder"
        )
