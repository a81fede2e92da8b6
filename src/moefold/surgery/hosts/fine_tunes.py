"""Opening what was trained from the same model as a host: fine-tunes, and the words they know.

A fine-tune is a folder that the host's own library wrote. It is opened with the class of the host,
from safetensors only, and must have the same weights under the same names.

Shapes: a text becomes `1 tokens` ids.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moefold.surgery.encoder import pretrained_encoder, refuse_pickles
from moefold.surgery.hosts.base import AbstractHost


def check_folder(host: AbstractHost, model: nn.Module, folder: Path) -> None:
    """Refuses a folder that cannot be a fine-tune of the model, before any weight is read.

    Raises:
        ValueError: the host is of no library that could open it; there is no such folder, it holds
            pickles, or a model of another type.
    """
    if host.name not in _HOSTS:
        raise ValueError(
            f"fine-tunes are opened from folders that transformers or sentence-transformers wrote; "
            f"a {type(model).__name__} is of neither (host {host.name!r})"
        )
    if not folder.is_dir():
        raise ValueError(f"no folder at {folder}; give one that save_pretrained wrote")
    refuse_pickles(folder)
    wanted, found = _type_of(model), _type_in(folder)
    if found != wanted:
        raise ValueError(
            f"{folder} holds a model of type {found!r}, the host is one of type {wanted!r}; "
            f"experts come from fine-tunes of one model"
        )


def check_prompts(model: nn.Module) -> None:
    """Refuses a model that reads no text.

    Raises:
        ValueError: names what it takes in place of token ids.
    """
    names = {getattr(module, "main_input_name", None) for module in model.modules()} - {None}
    if "input_ids" not in names:
        raise ValueError(
            f"a {type(model).__name__} takes {', '.join(map(str, names))}, no prompts; say "
            f"router='random'"
        )


def open_fine_tune(host: AbstractHost, model: nn.Module, folder: Path) -> nn.Module:
    """The fine-tune in a folder, on the CPU, in evaluation mode.

    Raises:
        ValueError: it cannot be opened, or lacks a weight of the model, or has one of another
            shape.
    """
    check_folder(host, model, folder)
    if host.name == "sentence-transformer":
        found: nn.Module = pretrained_encoder(folder)
    else:
        found = _open_transformer(type(model), folder)
    theirs = {name: value.shape for name, value in found.state_dict().items()}
    for name, value in model.state_dict().items():
        if theirs.get(name) != value.shape:
            has = "no such weight" if name not in theirs else f"{list(theirs[name])}"
            raise ValueError(
                f"{folder} is no fine-tune of this {type(model).__name__}: {name} is "
                f"{list(value.shape)} here, and there {has}"
            )
    return found


def tokenize(
    host: AbstractHost, model: nn.Module, folders: Sequence[Path], text: str
) -> dict[str, Tensor]:
    """A text as the model takes it, one sequence without padding.

    Args:
        host: the adapter of the model.
        model: the model.
        folders: where a tokenizer may be, the first that holds one counts; that of a
            SentenceTransformer is its own.
        text: the text.

    Raises:
        ValueError: no folder holds a tokenizer.
    """
    if host.name == "sentence-transformer":
        return dict(model.preprocess([text]))  # pyright: ignore
    return dict(_tokenizer_in(folders)(text, return_tensors="pt"))


_HOSTS = ("transformers", "sentence-transformer")


def _tokenizer_in(folders: Sequence[Path]) -> Any:
    import transformers

    for folder in folders:
        if (folder / "tokenizer_config.json").is_file():
            return transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    raise ValueError(
        f"prompts are texts, and none of {', '.join(map(str, folders))} holds a tokenizer; save "
        f"one there with tokenizer.save_pretrained, or give token ids in place of texts"
    )


def _open_transformer(kind: type[nn.Module], folder: Path) -> nn.Module:
    try:
        found, info = kind.from_pretrained(  # pyright: ignore
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are compared with the host's own, by name
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot open {folder} as a {kind.__name__} ({reason})") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{folder} lacks weights of a {kind.__name__}: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; save the fine-tune with the class of the host"
        )
    return found.eval()


def _type_of(model: nn.Module) -> str:
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "model_type"):
            return str(config.model_type)  # pyright: ignore
    raise ValueError(f"a {type(model).__name__} holds no model of transformers")


def _type_in(folder: Path) -> str:
    """The type of model that a folder holds; of a SentenceTransformer, of the one inside."""
    places = [folder]
    modules = folder / "modules.json"
    try:
        if modules.is_file():
            listed = json.loads(modules.read_text(encoding="utf-8"))
            places = [folder / str(module["path"]) for module in listed]
        for place in places:
            config = place / "config.json"
            if config.is_file():
                return str(json.loads(config.read_text(encoding="utf-8")).get("model_type"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read the configuration in {folder} ({error})") from error
    raise ValueError(f"{folder} has no config.json; give a folder that save_pretrained wrote")
