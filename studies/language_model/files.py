"""Where the study keeps what."""

from pathlib import Path


def place(output: Path, arm: str, seed: int) -> Path:
    """The folder of a trained model."""
    return output / "trained" / f"{arm}-{seed}"


def verdict(output: Path, kind: str, arm: str, seed: int, rule: str) -> Path:
    """The file of a model that was judged under a rule."""
    return output / kind / f"{arm}-{seed}" / f"{rule.replace(', ', '_').replace(' ', '-')}.json"
