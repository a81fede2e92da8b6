"""The saved form of a preference model: a folder of JSON and safetensors, nothing that runs.

    moefold_preference.json    how the model is built, and the sha256 of every other file
    model.safetensors          its weights
    encoder/                   of a model of texts: what reads them, as sentence-transformers or
                               transformers writes it

The folder is written beside its place and then takes it, so that a process that dies leaves the old
one or the new one. Loading checks all hashes before it builds anything.

Shapes: none.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from moefold.preference.comparators import AbstractComparator, ConsistentComparator
from moefold.preference.cross_encoder import (
    CrossEncoderScorer,
    open_cross_encoder,
    write_cross_encoder,
)
from moefold.preference.model import PreferenceConfig, PreferenceModel
from moefold.preference.text import EncoderScorer, open_encoder, write_encoder

MANIFEST = "moefold_preference.json"
WEIGHTS = "model.safetensors"
ENCODER = "encoder"
SCHEMA = 1
"""Version of the manifest."""

_READ = (".json", ".safetensors")
"""Suffixes of files that a library may read without being told of them."""


def save(model: PreferenceModel, folder: str | Path) -> None:
    """Writes a model into a folder, which is replaced as a whole.

    Args:
        model: one that `PreferenceConfig.build` or `moefold.preference.text` made is opened again
            by `load(folder)`; for a scorer of your own, `load` needs one of the same form.
        folder: where; one that `save` wrote earlier is replaced, any other must be empty.

    Raises:
        ValueError: the folder holds something else, or is the current directory or above it.
    """
    from safetensors.torch import save_file

    folder = Path(folder).resolve()
    refuse_foreign_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as staging:
        new = Path(staging) / "new"  # not the staging folder itself, which nobody else may read
        new.mkdir()
        encoder = _encoder_of(model)
        if encoder is not None:
            _write_encoder(encoder, new / ENCODER)
        weights = {
            name: value.detach().cpu().contiguous().clone()
            for name, value in model.state_dict().items()
            if encoder is None or not name.startswith(_IN_ENCODER)
        }
        save_file(weights, new / WEIGHTS, {"format": "pt"})
        config = model.preference_config
        manifest = {
            "schema": SCHEMA,
            "moefold": version("moefold"),
            "model": None if config is None else config.to_dict(),
            "encoder": None if encoder is None else _told_of(encoder),
            "loss": model.loss,
            "loss_settings": model.loss_settings,
            "temperature": model.temperature,
            "files": {name: _sha256(new / name) for name in _files(new)},
        }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(Path(staging) / "old")
        new.rename(folder)


def load(
    folder: str | Path, *, scorer: nn.Module | None = None, encoder: Any = None
) -> PreferenceModel:
    """Opens what `save` wrote: on the CPU, in evaluation mode, every bit of its weights as it was.

    Args:
        folder: the folder.
        scorer: for a model of your own: the scorer, or the comparator, to load weights into.
        encoder: a SentenceTransformer to use for the one in the folder, which is not opened then.

    Raises:
        ValueError: the folder is not there or not of this kind, was written by a newer moefold, one
            of its files is missing or altered, or the weights are not those of the scorer.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder).resolve()
    manifest = _manifest(folder)
    _check_files(folder, manifest["files"])
    try:
        # Copied, since in the file they may lie at addresses that kernels are slow with.
        weights = {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot open {folder / WEIGHTS}: {error}") from error
    model = _built(folder, manifest, scorer, encoder)
    own = {
        name: value
        for name, value in model.state_dict().items()
        if manifest["encoder"] is None or not name.startswith(_IN_ENCODER)
    }
    wrong = sorted(own.keys() ^ weights.keys()) or sorted(
        name for name, value in own.items() if value.shape != weights[name].shape
    )
    if wrong:
        raise ValueError(
            f"the weights in {folder} are not those of the {type(model.comparator).__name__} that "
            f"they are for: {', '.join(wrong[:3])}; give a scorer of the form that was saved"
        )
    # Assigned, not copied: a model in float64 stays in it.
    model.load_state_dict(weights, strict=False, assign=True)
    model.temperature = float(manifest["temperature"])
    return model.eval()


def is_saved(folder: str | Path) -> bool:
    """Whether `save` wrote the folder."""
    return (Path(folder) / MANIFEST).is_file()


def refuse_foreign_folder(folder: Path) -> None:
    """Raises if writing to the folder would destroy something that `save` did not write.

    Raises:
        ValueError: says what is there.
    """
    folder, here = folder.resolve(), Path.cwd()
    if folder in (here, *here.parents):
        what = "the current directory" if folder == here else "above the current directory"
        raise ValueError(f"{folder} is {what}; give a folder inside it, or another one")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not is_saved(folder):
        raise ValueError(
            f"{folder} is not empty and holds no model of preferences; give a new or an empty "
            f"folder"
        )


_IN_ENCODER = "comparator.scorer.encoder."


def _encoder_of(model: PreferenceModel) -> EncoderScorer | CrossEncoderScorer | None:
    scorer = getattr(model.comparator, "scorer", None)
    return scorer if isinstance(scorer, EncoderScorer | CrossEncoderScorer) else None


def _write_encoder(scorer: EncoderScorer | CrossEncoderScorer, folder: Path) -> None:
    if isinstance(scorer, CrossEncoderScorer):
        write_cross_encoder(scorer, folder)
    else:
        write_encoder(scorer, folder)


def _told_of(scorer: EncoderScorer | CrossEncoderScorer) -> dict[str, Any]:
    if isinstance(scorer, CrossEncoderScorer):
        return {"kind": "cross-encoder"}
    return {"kind": "sentence-encoder", "trained": scorer.trained}


def _built(
    folder: Path, manifest: Mapping[str, Any], scorer: nn.Module | None, encoder: Any
) -> PreferenceModel:
    """The model with weights that are yet to be loaded."""
    told = {"loss": manifest["loss"], "loss_settings": manifest["loss_settings"]}
    if (manifest["encoder"] or {}).get("kind") == "cross-encoder":
        return PreferenceModel(ConsistentComparator(open_cross_encoder(folder / ENCODER)), **told)
    if manifest["model"] is None:
        if scorer is None:
            raise ValueError(
                f"{folder} holds a model whose scorer is not of moefold; give one of the same form "
                f"to load the weights into: load(folder, scorer=...)"
            )
        own = scorer if isinstance(scorer, AbstractComparator) else ConsistentComparator(scorer)
        return PreferenceModel(own, **told)
    if scorer is not None:
        raise ValueError(
            f"{folder} holds a model that is built from its own config; leave out scorer"
        )
    try:
        config = PreferenceConfig.from_dict(manifest["model"])
        model = config.build()
    except (TypeError, KeyError) as error:
        raise ValueError(f"{folder / MANIFEST} describes no model ({error!r})") from error
    if manifest["encoder"] is None:
        return model
    opened = open_encoder(folder / ENCODER) if encoder is None else encoder
    head: Any = model.comparator.scorer
    whole = PreferenceModel(
        ConsistentComparator(
            EncoderScorer(opened, head, trained=bool(manifest["encoder"]["trained"]))
        ),
        loss=config.loss,
        loss_settings=config.loss_settings,
    )
    whole.preference_config = config
    return whole


def _manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"no folder at {folder}; give one that moefold.preference.save wrote")
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it holds no model of preferences")
    keys = {"schema", "model", "encoder", "loss", "loss_settings", "temperature", "files"}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        missing = sorted(keys - manifest.keys())
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is no manifest ({error}); save the model again") from error
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; save the model again")
    if not isinstance(manifest["schema"], int) or manifest["schema"] > SCHEMA:
        raise ValueError(
            f"{file} has schema {manifest['schema']}, written by moefold "
            f"{manifest.get('moefold')}; this is moefold {version('moefold')}, which "
            f"reads up to {SCHEMA}: upgrade moefold"
        )
    return manifest


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    """Compares the weights with their hashes; a page or a report beside them is nobody's loss."""
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder} lacks {name}, which {MANIFEST} lists; copy it again")
        if _sha256(file) != expected:
            raise ValueError(
                f"{file} is not what was saved: its sha256 is {_sha256(file)}, {MANIFEST} says "
                f"{expected}; the file is truncated or was altered, copy it again"
            )


def _files(folder: Path) -> list[str]:
    found = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(found)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


__all__ = ["ENCODER", "MANIFEST", "is_saved", "load", "refuse_foreign_folder", "save"]
