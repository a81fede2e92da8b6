"""The saved form of an upcycled model: a folder of JSON and safetensors, nothing that runs.

    config.json, model.safetensors, ...   as the host's own library writes them, of a type that is
                                          known only where moefold is imported; large weights in
                                          shards, with an index
    moefold.json                          what was done to what, and the sha256 of every file above

Saving is atomic: the folder is written beside its place and then exchanged for what is there, so a
process that dies at any moment leaves the old folder or the new one, and of several that save at
once the last wins. Loading checks all the hashes before it builds anything.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from moefold.moe import MoE
from moefold.surgery.encoder import sha256_of
from moefold.surgery.hosts import HOSTS, find_host
from moefold.surgery.hosts.plain import PlainHost
from moefold.surgery.upcycle import SCHEMA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "moefold.json"

REROUTED = "moefold_rerouting.json"
"""The manifest of a rerouted model, see `rerouting.saved`; such a folder is ours too."""

_READ = (".json", ".safetensors")
"""Suffixes of files that a library may read without being told of them."""

_OLD_HOSTS = {"bert": "transformers"}
"""Names in manifests of versions before 0.1, which had a host for every kind of transformer."""

_STALE = 24 * 3600.0
"""Seconds after which what lies beside a folder was left by a process that died."""


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Writes an upcycled model into a folder, atomically.

    `moefold.load` opens it; so do `AutoModel.from_pretrained` and `SentenceTransformer` in a
    process that has imported moefold.

    Args:
        model: an upcycled host, or a loaded one.
        folder: where; a folder that `save` wrote earlier is replaced, any other must be empty. A
            link stays, and what it leads to is replaced.
        tokenizer: written beside a bare transformer; a SentenceTransformer brings its own.
        max_shard_size: bytes that a file of weights holds at most, or text such as "5GB"; as much
            as the model's own library likes if None (transformers: 50GB). A larger tensor has a
            file of its own.

    Raises:
        ValueError: the model is not upcycled, or the folder holds something else, or is the
            current directory or one above it; the size is none, or the host knows no shards.
    """
    folder = Path(folder).resolve()
    check_shard_size(max_shard_size)
    host = find_host(model)
    section = host.section(model)
    if section is None:
        raise ValueError(
            f"{type(model).__name__} is not upcycled; call moefold.upcycle(model) first, or save "
            f"a dense model with its own save_pretrained"
        )
    refuse_foreign_folder(folder)
    with written_whole(folder) as new:
        host.write(model, new, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        manifest = {
            "schema": SCHEMA,
            "moefold": version("moefold"),
            "host": host.name,
            "upcycle": section["upcycle"],
            "sites": list(section["sites"]),
            "source": section["source"],
        }
        write_manifest(new, manifest)


def write_manifest(folder: Path, manifest: Mapping[str, Any], name: str = MANIFEST) -> None:
    """Writes a manifest that lists the hashes of all files of a folder beside what it is given."""
    hashes = {file: sha256_of(folder / file) for file in _files(folder)}
    text = json.dumps({**manifest, "files": hashes}, indent=2)
    (folder / name).write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write into, which takes the place of `folder` at the end.

    A process that dies at any moment leaves what was there before, or all of what is new.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    staging = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
    new = staging / "new"  # not `staging` itself, which nobody else may read
    try:
        new.mkdir()
        yield new
        _sync(new)
        _put_in_place(new, folder)
    except BaseException:
        if folder.exists() or not _olds(staging):  # else the only copy is there
            shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)


def load(folder: str | Path, *, into: nn.Module | None = None) -> nn.Module:
    """Opens what `save` wrote: on the CPU, in evaluation mode, every bit of its weights as it was.

    They lie at other addresses, so that a kernel may sum in another order: outputs are equal up to
    rounding.

    Args:
        folder: the folder.
        into: for a model of no library (timm's, your own), which nothing here could build: the
            dense model as it was before surgery. It is changed in place and returned.

    Returns:
        The model, of the kind that was saved (a BertModel, a SentenceTransformer, ...).

    Raises:
        ValueError: the folder is not there or not of this kind, was written by a newer moefold, or
            one of its files is missing, truncated, altered, or was added later.
    """
    from safetensors import SafetensorError

    folder = Path(folder).resolve()
    recover(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest["files"], MANIFEST)
    host = HOSTS.get(_OLD_HOSTS.get(str(manifest["host"]), str(manifest["host"])))()
    if into is not None and not isinstance(host, PlainHost):
        raise ValueError(
            f"{folder} holds a model of host {host.name!r}, which is built from its own config; "
            f"leave `into` out"
        )
    try:
        model = host.read_into(folder, into) if isinstance(host, PlainHost) else host.read(folder)
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot open {folder}: {error}") from error
    section = host.section(model)
    # Sorted: a JSON file may list layer.10 before layer.2.
    if section is None or sorted(section["sites"]) != sorted(manifest["sites"]):
        found = None if section is None else sorted(section["sites"])
        raise ValueError(
            f"{folder}: {MANIFEST} lists the sites {manifest['sites']}, config.json {found}; the "
            f"two files do not belong together"
        )
    for name in manifest["sites"]:
        for module in model.get_submodule(name).modules():
            if isinstance(module, MoE):
                module.site = name
    return model


def check_files(folder: Path, files: Mapping[str, str], manifest: str) -> None:
    """Compares a folder with the hashes of its files.

    Args:
        folder: the folder.
        files: the sha256 of each file.
        manifest: name of the file that says so.

    Raises:
        ValueError: a file is missing, altered, or was added.
    """
    added = [name for name in _files(folder) if name not in files and name.endswith(_READ)]
    if added:
        raise ValueError(
            f"{folder} holds {', '.join(added)}, which {manifest} does not list; take out what was "
            f"added, or save the model again"
        )
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder} lacks {name}, which {manifest} lists; copy it again")
        found = sha256_of(file)
        if found != expected:
            raise ValueError(
                f"{file} is not what was saved: its sha256 is {found}, {manifest} says {expected}; "
                f"the file is truncated or was altered, copy it again"
            )


_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "host": ("a name", lambda value: isinstance(value, str)),
    "sites": ("a list of names", lambda value: _are_texts(value, list)),
}
"""What must be in `moefold.json` beside the files, in words and as a check."""

_FILES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "files": (
        "a mapping from file names to hashes",
        lambda value: _are_texts(value, dict) and _are_texts([*value.values()], list),
    )
}


def read_manifest(
    folder: Path,
    name: str = MANIFEST,
    *,
    newest: int = SCHEMA,
    keys: Mapping[str, tuple[str, Callable[[Any], bool]]] | None = None,
) -> dict[str, Any]:
    """What `moefold.json` says, or another manifest.

    Args:
        folder: where it is.
        name: of the file.
        newest: schema that can be read.
        keys: what must be in it beside the files, in words and as a check; those of an upcycled
            model if None.

    Raises:
        ValueError: there is none, it is not valid, or it is newer than this code.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder at {folder}; give one that moefold.save wrote")
    file = folder / name
    if not file.is_file():
        raise ValueError(f"{folder} has no {name}: {_what_it_is(folder)}")
    wanted = {**(_KEYS if keys is None else keys), **_FILES}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        schema = manifest["schema"]
        if not isinstance(schema, int):
            raise ValueError(f"{file}: 'schema' is {schema!r}, it must be a number; save again")
        if schema > newest:
            raise ValueError(
                f"{file} has schema {schema}, written by moefold {manifest.get('moefold')}; this "
                f"is moefold {version('moefold')}, which reads up to {newest}: upgrade moefold"
            )
        missing = [key for key in wanted if key not in manifest]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a manifest of moefold ({error!r}); save again") from error
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; save the model again")
    for key, (form, is_right) in wanted.items():
        if not is_right(manifest[key]):
            raise ValueError(
                f"{file}: {key!r} is {manifest[key]!r}, it must be {form}; save the model again"
            )
    return manifest


def refuse_foreign_folder(folder: Path) -> None:
    """Raises if writing to the folder would destroy something that `save` did not write.

    Raises:
        ValueError: the path is a file, a folder with content but without a manifest, or the
            current directory or one above it, which a replaced folder would pull away.
    """
    folder, here = folder.resolve(), Path.cwd()
    if folder in (here, *here.parents):
        what = "the current directory" if folder == here else "above the current directory"
        raise ValueError(f"{folder} is {what}; give a folder inside it, or another one")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not is_saved(folder):
        raise ValueError(
            f"{folder} is not empty and was not written by moefold; give a new or an empty folder"
        )


def is_saved(folder: Path) -> bool:
    """Whether `save` wrote the folder, or something that was put into it since."""
    return any((folder / name).is_file() for name in (MANIFEST, REROUTED))


def refuse_unwritable_folder(folder: Path) -> None:
    """Raises if `save` could not write there; asks before hours are spent on what to save.

    Raises:
        ValueError: nothing can be made in the parent of the folder, or above it.
    """
    place = folder.resolve().parent
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(prefix=_prefix(folder), dir=place):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder}: {place}: {error.strerror}; give a folder elsewhere"
        ) from error


def check_shard_size(size: int | str | None) -> None:
    """Refuses what is no size of a file.

    Raises:
        ValueError: names the size and what is allowed.
    """
    text = number = False
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d*\.?\d+)\s*[kmgt]b\s*", size.lower())
        text = found is not None and float(found[1]) > 0
    elif isinstance(size, int) and not isinstance(size, bool):
        number = size > 0
    if not (size is None or text or number):
        raise ValueError(
            f"max_shard_size is {size!r}; it must be a number of bytes, or a number with a unit, "
            f"KB, MB, GB or TB, as in '5GB'"
        )


def _what_it_is(folder: Path) -> str:
    """Says what a folder without a manifest seems to be, and what opens it."""
    config = folder / "config.json"
    if not config.is_file():
        return "it holds no model that moefold.save wrote"
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return "and its config.json cannot be read"
    if str(kind).startswith("moefold_"):
        return (
            "a trainer's checkpoint of an upcycled model; open it with AutoModel.from_pretrained "
            "or SentenceTransformer after `import moefold`"
        )
    return f"a dense model of type {kind!r}; open it with its own library and call moefold.upcycle"


def _are_texts(value: object, kind: type) -> bool:
    return isinstance(value, kind) and all(isinstance(one, str) for one in value)  # pyright: ignore


def _files(folder: Path) -> list[str]:
    """Every file at any depth but the manifests, by its path in the folder."""
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in files if name not in (MANIFEST, REROUTED))


def _prefix(folder: Path) -> str:
    """How the name of a place for the folder's next version begins, on the same file system."""
    return f".{folder.name}.moefold-"


def _beside(folder: Path) -> list[Path]:
    """The places of this and of other processes, dead or alive."""
    prefix = _prefix(folder)
    return sorted(place for place in folder.parent.iterdir() if place.name.startswith(prefix))


def _olds(staging: Path) -> list[Path]:
    """Versions that were moved away, the latest last."""
    return sorted(old for old in staging.glob("old*") if is_saved(old))


def _sweep(folder: Path) -> None:
    """Removes what processes that died left beside the folder, but no only copy of a model."""
    for place in _beside(folder):
        try:
            stale = time.time() - place.stat().st_mtime > _STALE
        except OSError:  # its owner has just finished
            continue
        if stale and (folder.exists() or not _olds(place)):
            shutil.rmtree(place, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Makes the disk hold the folder before it is put in place."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(new: Path, folder: Path) -> None:
    """Makes `folder` be `new`; what was there before is then beside `new`, or gone."""
    for attempt in range(100):  # another process may put its own there between two steps
        if folder.exists():
            if _exchange(new, folder):
                break
            # Without an exchange there is a moment with no folder; `recover` ends it.
            with contextlib.suppress(FileNotFoundError):
                folder.rename(new.with_name(f"old-{attempt:02}"))
        try:
            new.rename(folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    else:
        raise OSError(errno.EBUSY, "other processes keep replacing it", str(folder))
    _sync_parent(folder)


def _sync_parent(folder: Path) -> None:
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step where the system can (Linux); False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library older than the call
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def recover(folder: Path) -> None:
    """Puts the old version back if a process died between the two renames of `_put_in_place`."""
    if folder.exists() or not folder.parent.is_dir():
        return
    olds = [old for place in _beside(folder) for old in _olds(place)]
    if olds:
        max(olds, key=_written_at).rename(folder)


def _written_at(folder: Path) -> float:
    """When its manifest was written, the last of its files."""
    files = (folder / name for name in (MANIFEST, REROUTED))
    return max(file.stat().st_mtime for file in files if file.is_file())


__all__ = [
    "MANIFEST",
    "REROUTED",
    "check_files",
    "check_shard_size",
    "is_saved",
    "load",
    "read_manifest",
    "recover",
    "refuse_foreign_folder",
    "refuse_unwritable_folder",
    "save",
    "write_manifest",
    "written_whole",
]
