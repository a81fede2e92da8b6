"""Text and pairs of texts from files: plain or `.jsonl`, and `.xz` of either."""

import json
import lzma
from pathlib import Path
from typing import Any

PAIR = ("sentence1", "sentence2", "score")
"""What the parts of a pair are called where a line is an object."""


def read_texts(file: Path) -> list[str]:
    """The texts of a file: one for each line of `.jsonl`, or all of a plain file as one.

    A line of `.jsonl` is a text, a list that begins with one, or an object with a "text".

    Raises:
        ValueError: there is no such file, it is no text, or a line holds none.
    """
    whole = _read(file)
    texts = [whole]
    if _is_jsonl(file):
        texts = []
        for number, row in _rows(file, whole):
            text = row[0] if isinstance(row, list) and row else row
            text = row.get("text") if isinstance(row, dict) else text
            if not isinstance(text, str):
                raise ValueError(
                    f'{file}, line {number}: {_short(row)} holds no text; write "text", '
                    f'["text", ...] or {{"text": "..."}}'
                )
            texts.append(text)
    if not any(text.strip() for text in texts):
        raise ValueError(
            f"{file} is empty; give text of the kind the model will see, a few thousand tokens"
        )
    return texts


def read_pairs(file: Path) -> list[tuple[str, str, float]]:
    """Pairs of texts with scores from `.jsonl`, a line each: `[a, b, score]`.

    Raises:
        ValueError: there is no such file, a line is no pair, or there are fewer than three.
    """
    pairs = []
    for number, row in _rows(file, _read(file)):
        pair: Any = [row.get(name) for name in PAIR] if isinstance(row, dict) else row
        if not _is_pair(pair):
            raise ValueError(
                f'{file}, line {number}: {_short(row)} is no pair; write ["text", "text", score] '
                f"or an object with {', '.join(PAIR)}"
            )
        pairs.append((pair[0], pair[1], float(pair[2])))
    if len(pairs) < 3:
        raise ValueError(f"{file} holds {len(pairs)} pairs; an order needs at least 3")
    return pairs


def _is_pair(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 3:
        return False
    score = row[2]
    number = isinstance(score, int | float) and not isinstance(score, bool)
    return number and all(isinstance(text, str) and text.strip() for text in row[:2])


def _read(file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"no file at {file}; give a text file, .jsonl, or .xz of either")
    data = file.read_bytes()
    try:
        return (lzma.decompress(data) if file.suffix == ".xz" else data).decode()
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}); give a text file") from error


def _is_jsonl(file: Path) -> bool:
    return file.name.removesuffix(".xz").endswith(".jsonl")


def _rows(file: Path, whole: str) -> list[tuple[int, Any]]:
    """Numbers of lines and what they hold; split at line feeds only, which JSON escapes."""
    rows = []
    for number, line in enumerate(whole.split("\n"), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is no JSON ({error})") from error
    return rows


def _short(row: Any) -> str:
    text = json.dumps(row)
    return text if len(text) <= 40 else f"{text[:40]}..."
