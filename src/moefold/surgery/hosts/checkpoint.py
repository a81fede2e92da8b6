"""A dense checkpoint on disk: a model without weights, and the weights one at a time.

    model = open_empty(folder)                  its names, shapes and dtypes, on the device "meta"
    checkpoint = Checkpoint(inner, folder)      where on disk each of its weights is
    checkpoint.read("layers.0.mlp.up.weight")   one of them, as the loaded model would have it

Files may name weights otherwise than the model does (older names, a head's prefix). The names are
worked out as `from_pretrained` does it, by the functions it uses itself.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import transformers
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moefold.surgery.encoder import PICKLES, refuse_pickles

INDEX = "model.safetensors.index.json"


def open_empty(folder: Path) -> nn.Module:
    """The model that a folder describes, its weights on the device "meta".

    Args:
        folder: a transformer or a SentenceTransformer.

    Raises:
        ValueError: the folder does not describe a model that can be built here, or its weights are
            not those of that model.
    """
    refuse_pickles(folder)
    try:
        if (folder / "modules.json").is_file():
            return _open_empty_sentence_transformer(folder).eval()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = (config.get("architectures") or ["AutoModel"])[0]
        kind = getattr(transformers, name, transformers.AutoModel)
        with without_reports():
            return kind.from_pretrained(
                folder,
                device_map="meta",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # `Checkpoint` refuses them, by name
            ).eval()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot open {folder} as a transformer ({reason})") from error


def open_whole(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The transformer that a folder describes, with its weights, on the CPU and in evaluation mode.

    Returns:
        The model, and what transformers says of weights that are missing, left over or of another
        shape.
    """
    refuse_pickles(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or ["AutoModel"])[0]
    with without_reports():
        model, found = getattr(transformers, name, transformers.AutoModel).from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return model.eval(), found


def _open_empty_sentence_transformer(folder: Path) -> SentenceTransformer:
    """Only the transformer in it is empty: what comes after it is small, and kept whole."""
    model = SentenceTransformer(
        str(folder),
        local_files_only=True,
        trust_remote_code=False,
        model_kwargs={
            "device_map": "meta",
            "use_safetensors": True,
            "ignore_mismatched_sizes": True,
        },
    )
    _, inner = transformer_in(model)
    places = {m["name"]: m["path"] for m in json.loads((folder / "modules.json").read_text())}
    for name, module in list(model.named_children()):
        held = [*module.parameters(), *module.buffers()]
        if inner not in module.modules() and any(value.is_meta for value in held):
            with torch.random.fork_rng(devices=[]):  # it was drawn once, as in a model in memory
                kind: Any = type(module)
                whole = kind.load(str(folder), subfolder=places[name], local_files_only=True)
            setattr(model, name, whole.to(inner.dtype))
    return model


@contextmanager
def without_reports() -> Iterator[None]:
    """Keeps transformers from printing a table of weights that are missing or left over."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a bare transformer; None if there is none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def open_processor(folder: Path) -> Any:
    """What makes inputs of text or pixels, beside a bare transformer; None if there is nothing."""
    if any((folder / f"{kind}_config.json").is_file() for kind in ("processor", "preprocessor")):
        return transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    return open_tokenizer(folder)


def transformer_in(model: nn.Module) -> tuple[str, PreTrainedModel]:
    """The outermost transformer of a model, and its path there, with its dot; the model itself."""
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            return f"{name}." if name else "", module
    raise ValueError(f"a {type(model).__name__} holds no transformer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where on disk a weight is.

    Attributes:
        file: the file.
        key: its name there.
        shape: its shape.
    """

    file: Path
    key: str
    shape: tuple[int, ...]


def places_in(folder: Path) -> dict[str, Place]:
    """Where the weights in the safetensors files of a folder are, by their names there.

    Raises:
        ValueError: there are none, one that the index lists is missing, lacks a weight that the
            index says is there, or cannot be read.
    """
    folder = _weights_folder(folder)
    index = folder / INDEX
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({folder / str(name) for name in listed.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} is not an index of shards ({error!r}); copy it again"
            ) from error
    else:
        listed, files = {}, [folder / "model.safetensors"]
        if not files[0].is_file():
            raise ValueError(f"{folder} holds no model.safetensors: {_instead(folder)}")
    found: dict[str, Place] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder} lacks {file.name}, which {INDEX} lists; copy it again")
        with _opened(file) as weights:
            for key in weights.keys():  # noqa: SIM118 - it is no dictionary
                shape = tuple(weights.get_slice(key).get_shape())
                found[key] = Place(file=file, key=key, shape=shape)
    lost = [n for n, file in listed.items() if n not in found or found[n].file.name != file]
    if lost:
        raise ValueError(
            f"{INDEX} in {folder} says that {listed[lost[0]]} holds {lost[0]}, which it does not; "
            f"the files do not belong together, copy them again"
        )
    return found


@final
class Checkpoint:
    """The weights of a folder by the names that a model has for them, read when they are asked for.

    Args:
        model: what `open_empty` returned, or the transformer in it. Weights that are tied, and that
            the folder holds twice, are tied here if they are the same, as loading does it.
        folder: the folder.

    Raises:
        ValueError: weights are missing, or cannot be read one by one.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        state = model.state_dict()
        self._dtypes = {name: value.dtype for name, value in state.items()}
        self._places: dict[str, Place] = {}
        stored = places_in(folder)
        mapping = get_model_conversion_mapping(model)
        for key in sorted(stored, key=dot_natural_key):
            name = _name_in(model, state, key, mapping)
            if name in state:
                self._places.setdefault(name, stored[key])
        self._settle_ties(model)
        self._share_places(model)
        _check(model, state, self._places, folder)

    def read(self, name: str) -> Tensor:
        """One weight, under its name in the model."""
        place = self._places[name]
        with _opened(place.file) as weights:
            return weights.get_tensor(place.key).to(self._dtypes[name])

    def _settle_ties(self, model: PreTrainedModel) -> None:
        """Of two tied weights that are both there: ties them if they are equal, as loading does."""
        for one, other in list(model.all_tied_weights_keys.items()):
            if one not in self._places or other not in self._places:
                continue
            if torch.equal(self.read(one), self.read(other)):
                holder, _, name = one.rpartition(".")
                setattr(model.get_submodule(holder), name, model.get_parameter(other))
            else:
                model.all_tied_weights_keys.pop(one)

    def _share_places(self, model: PreTrainedModel) -> None:
        """Tied weights are one: each of them is where any of them is."""
        tied: dict[int, list[str]] = defaultdict(list)
        for name in self._dtypes:
            tied[id(model.get_parameter_or_buffer(name))].append(name)
        for names in tied.values():
            place = next((self._places[name] for name in names if name in self._places), None)
            if place is not None:
                for name in names:
                    self._places.setdefault(name, place)


def _check(
    model: PreTrainedModel, state: dict[str, Tensor], places: dict[str, Place], folder: Path
) -> None:
    whose = (
        f"the weights in {folder} are not those of the {type(model).__name__} that its config.json "
        f"describes"
    )
    missing = [name for name in state if name not in places]
    if missing:
        raise ValueError(
            f"{whose}: {', '.join(missing)} are missing; open it with its class, which makes them "
            f"up, and save it again"
        )
    other = [name for name, value in state.items() if tuple(value.shape) != places[name].shape]
    if other:
        name = other[0]
        raise ValueError(
            f"{whose}: {name} is {list(places[name].shape)} in {places[name].file.name} and "
            f"{list(state[name].shape)} in the model; copy config.json and weights again"
        )


def _name_in(model: PreTrainedModel, state: dict[str, Tensor], key: str, mapping: list) -> str:
    """What a model calls a weight that a file calls `key`.

    Raises:
        ValueError: the weight is only a part, or more than one, of the model's.
    """
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    name, converted = rename_source_key(key, renamings, converters, prefix, state)
    if name not in state and key in state:
        name, converted = rename_source_key(key, [], [], prefix, state)
    if converted is not None and name in state:
        raise ValueError(
            f"{key} is not stored as a {type(model).__name__} holds it (it is split or joined when "
            f"it is loaded), and cannot be read by itself; open the model and save it with "
            f"save_original_format=False, or upcycle it in memory"
        )
    return name


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"cannot read {file} ({error}): it is truncated or no safetensors file; copy it again"
        ) from error


def _weights_folder(folder: Path) -> Path:
    """Where the transformer's files are: a SentenceTransformer may keep them one folder below."""
    modules = folder / "modules.json"
    if not modules.is_file():
        return folder
    try:
        return folder / str(json.loads(modules.read_text(encoding="utf-8"))[0]["path"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"cannot read {modules} ({error!r})") from error


def _instead(folder: Path) -> str:
    pickle = next((f.name for f in sorted(folder.iterdir()) if f.suffix.lower() in PICKLES), None)
    if pickle:
        return (
            f"{pickle} is a pickle, which is never opened; convert it (load it where you trust it "
            f"and call save_pretrained)"
        )
    return "give a folder that save_pretrained wrote"
