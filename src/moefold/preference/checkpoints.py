"""What a checkpoint has beside the weights, as safetensors: the rest of a run's state.

A trainer would pickle the optimizer's moments, the schedule and the states of random numbers.

    checkpoint-500/model.safetensors, trainer_state.json     as transformers writes them
                   moefold_training.safetensors              all else; written last

Shapes: none.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

STATE = "moefold_training.safetensors"
"""The file; a checkpoint without it is not whole."""

_KEPT = 2
"""Checkpoints that stay; should the last be damaged, there is one before."""

_PICKLE = "training_args.bin"


def keep(folder: Path, run: str, optimizer: Any, scheduler: Any) -> None:
    """Completes a checkpoint, whole or not at all, and takes its pickle and old ones away.

    Args:
        folder: of the checkpoint.
        run: what tells its run from others.
        optimizer: whose moments are kept.
        scheduler: whose state is kept.
    """
    (folder / _PICKLE).unlink(missing_ok=True)
    tensors = {
        f"optimizer.{number}.{name}": value.detach().cpu().contiguous()
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    tensors["random.cpu"] = torch.random.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.random.get_rng_state()
    new = folder / f"{STATE}.new"
    save_file(tensors, new, {"run": run, "scheduler": json.dumps(scheduler.state_dict())})
    new.replace(folder / STATE)
    for other in _whole(folder.parent)[:-_KEPT]:
        shutil.rmtree(other)


def restore(folder: Path, optimizer: Any, scheduler: Any) -> Mapping[str, Tensor]:
    """Gives optimizer and schedule their state back.

    Returns:
        The states of random numbers, for `restore_random` when nothing else is drawn any more.
    """
    with safe_open(folder / STATE, "pt") as opened:
        plain = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    scheduler.load_state_dict(json.loads(plain["scheduler"]))
    state = optimizer.state_dict()
    state["state"] = {}
    for name, value in tensors.items():
        kind, number, *rest = name.split(".")
        if kind == "optimizer":
            state["state"].setdefault(int(number), {})[rest[0]] = value
    for group, rate in zip(state["param_groups"], scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    optimizer.load_state_dict(state)
    return {name: value for name, value in tensors.items() if name.startswith("random.")}


def restore_random(states: Mapping[str, Tensor]) -> None:
    """Sets the random numbers of torch; what draws from others does not go on exactly."""
    torch.random.set_rng_state(states["random.cpu"])
    if "random.cuda" in states and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(states["random.cuda"])


def last(folder: Path) -> Path | None:
    """The last whole checkpoint of a folder."""
    return next(reversed(_whole(folder)), None)


def clear(folder: Path, *, whole: bool) -> None:
    """Removes checkpoints of earlier runs, by whose age and number a trainer would judge its own.

    Args:
        folder: where they are.
        whole: also those that a run could go on from.
    """
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        if whole or not (state.parent / STATE).is_file():
            shutil.rmtree(state.parent)


def refuse_other_run(checkpoint: Path, run: str) -> None:
    """Raises if a checkpoint is of another run.

    Raises:
        ValueError: it is, or it is damaged.
    """
    try:
        with safe_open(checkpoint / STATE, "pt") as opened:
            other = opened.metadata()["run"]
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint / STATE} is damaged ({error}); remove {checkpoint} to go on from the one "
            f"before"
        ) from error
    if other != run:
        raise ValueError(
            f"{checkpoint} is of a run with other groups, another model or other settings; repeat "
            f"those, remove {checkpoint.parent}, or do not resume"
        )


def _whole(folder: Path) -> list[Path]:
    made = [state.parent for state in folder.glob(f"checkpoint-*/{STATE}")]
    return sorted(made, key=lambda place: int(place.name.rpartition("-")[2]))


__all__ = ["STATE", "clear", "keep", "last", "refuse_other_run", "restore", "restore_random"]
