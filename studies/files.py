"""Files that are there whole or not at all, so that a run that was killed leaves nothing half."""

import hashlib
import json
from pathlib import Path
from typing import Any

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
