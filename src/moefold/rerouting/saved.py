"""The saved form of a rerouted model: the checkpoint it was made from, and how it is rerouted.

    config.json, model.safetensors, ...   what the model's own class writes of the untouched model:
                                          transformers opens it without moefold
    moefold_rerouting.json                the router, and the sha256 of every other file
    moefold_rerouting.safetensors         what routers have learnt (thresholds, predictors), by
                                          block; not there where there is nothing to learn

`moefold.save` and `moefold.load` are here, for every kind of model: a folder is of the kind its
manifest says. Writing is atomic and reading checks everything first, as in `surgery.saved`.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from moefold import surgery
from moefold.rerouting.layer import REROUTER, Rerouter, block_of
from moefold.rerouting.reroute import OWN, Rerouting, reroute, rerouting_of
from moefold.routers import RouterConfig
from moefold.surgery.hosts import refuse_adapters
from moefold.surgery.saved import (
    REROUTED,
    check_files,
    check_shard_size,
    read_manifest,
    recover,
    refuse_foreign_folder,
    write_manifest,
    written_whole,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEARNT = "moefold_rerouting.safetensors"
"""The file of what routers have learnt."""

SCHEMA = 1
"""Version of the manifest."""

_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "router": (
        "a router with its settings, or null for the model's own choice",
        lambda value: value is None or isinstance(value, dict),
    ),
    "faithful": ("true or false", lambda value: isinstance(value, bool)),
    "blocks": (
        "a list of names",
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    ),
}


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Writes an upcycled or a rerouted model into a folder, atomically.

    `moefold.load` opens it. So do, in a process that has imported moefold,
    `AutoModel.from_pretrained` and `SentenceTransformer`, if it is upcycled; a rerouted one is to
    them, with moefold or without, the model it was before rerouting.

    Args:
        model: an upcycled host, or a loaded one; or a rerouted model.
        folder: where; a folder that `save` wrote earlier is replaced, any other must be empty. A
            link stays, and what it leads to is replaced.
        tokenizer: written beside a bare transformer; a SentenceTransformer brings its own.
        max_shard_size: bytes that a file of weights holds at most, or text such as "5GB"; as much
            as the model's own library likes if None (transformers: 50GB). A larger tensor has a
            file of its own.

    Raises:
        ValueError: the model is neither, or the folder holds something else, or is the current
            directory or one above it; the size is none, or the host knows no shards.
    """
    write = surgery.save if rerouting_of(model) is None else save_rerouted
    write(model, folder, tokenizer=tokenizer, max_shard_size=max_shard_size)


def load(folder: str | Path, *, into: nn.Module | None = None) -> nn.Module:
    """Opens what `save` wrote: on the CPU, in evaluation mode, every bit of its weights as it was.

    They lie at other addresses, so that a kernel may sum in another order: outputs are equal up to
    rounding.

    Args:
        folder: the folder.
        into: for an upcycled model of no library (timm's, your own), which nothing here could
            build: the dense model as it was before surgery. It is changed in place and returned.

    Returns:
        The model, of the kind that was saved (a BertModel, an OlmoeForCausalLM, ...), upcycled or
        rerouted as it was.

    Raises:
        ValueError: the folder is not there or not of this kind, was written by a newer moefold, or
            one of its files is missing, truncated, altered, or was added later.
    """
    folder = Path(folder).resolve()
    recover(folder)
    if not (folder / REROUTED).is_file():
        return surgery.load(folder, into=into)
    if into is not None:
        raise ValueError(
            f"{folder} holds a rerouted model, which is built from its own config; leave `into` out"
        )
    return load_rerouted(folder)


def save_rerouted(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Writes a rerouted model of transformers; see `save`.

    Raises:
        ValueError: the model is not rerouted, or of no class of transformers, or the folder holds
            something else.
    """
    from safetensors.torch import save_file

    folder = Path(folder).resolve()
    check_shard_size(max_shard_size)
    rerouting = rerouting_of(model)
    if rerouting is None:
        raise ValueError(
            f"{type(model).__name__} is not rerouted; call moefold.reroute(model, router) first, "
            f"or save it with its own save_pretrained"
        )
    _refuse_strangers(model)
    refuse_adapters(model)
    refuse_foreign_folder(folder)
    with written_whole(folder) as new:
        sized = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        native: Any = model
        native.save_pretrained(new, state_dict=_own_weights(model), **sized)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        learnt = learnt_in(model)
        if learnt:
            save_file(learnt, new / LEARNT, {"format": "pt"})
        manifest = {
            "schema": SCHEMA,
            "moefold": version("moefold"),
            "model": rerouting.model,
            "router": None if rerouting.config is None else rerouting.config.to_dict(),
            "faithful": rerouting.faithful,
            "blocks": list(rerouting.blocks),
        }
        write_manifest(new, manifest, REROUTED)


def load_rerouted(folder: str | Path) -> nn.Module:
    """Opens what `save_rerouted` wrote, as `load` does.

    Raises:
        ValueError: see `load`; or the router is unknown here, or does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from moefold.surgery.hosts.checkpoint import open_whole

    folder = Path(folder).resolve()
    recover(folder)
    manifest = read_manifest(folder, REROUTED, newest=SCHEMA, keys=_KEYS)
    check_files(folder, manifest["files"], REROUTED)
    try:
        model, found = open_whole(folder)
        learnt = load_file(folder / LEARNT) if (folder / LEARNT).is_file() else {}
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot open {folder}: {error}") from error
    _check_weights(folder, model, found)
    told = manifest["router"]
    try:
        router = OWN if told is None else RouterConfig.from_dict(told)
        rerouting = reroute(model, router, faithful=manifest["faithful"])
    except ValueError as error:
        raise ValueError(f"{folder / REROUTED}: {error}") from error
    _check_blocks(folder, rerouting, manifest["blocks"])
    take_over(model, learnt)
    return model.eval()


def learnt_in(model: nn.Module) -> dict[str, Tensor]:
    """What the routers of a rerouted model have learnt, by block: `model.layers.0.mlp.router...`.

    It is empty where they have nothing to learn.
    """
    return {
        f"{block}.{name}": value.detach().cpu().contiguous()
        for block, rerouter in _rerouters(model).items()
        for name, value in rerouter.state_dict().items()
    }


def take_over(model: nn.Module, learnt: dict[str, Tensor]) -> None:
    """The inverse of `learnt_in`, on a model that is rerouted alike.

    Raises:
        ValueError: something is missing, left over, or of another shape.
    """
    own = learnt_in(model)
    missing, strange = sorted(own.keys() - learnt.keys()), sorted(learnt.keys() - own.keys())
    other = [n for n, value in own.items() if n in learnt and learnt[n].shape != value.shape]
    wrong = {"missing": missing, "left over": strange, "of another shape": other}
    said = [f"{', '.join(names[:3])} {what}" for what, names in wrong.items() if names]
    if said:
        raise ValueError(
            f"what was learnt is not that of these routers: {'; '.join(said)}; reroute with the "
            f"router it was learnt with"
        )
    for block, rerouter in _rerouters(model).items():
        own = {name: learnt[f"{block}.{name}"] for name in rerouter.state_dict()}
        device = next((value.device for value in rerouter.state_dict().values()), None)
        # Assigned, not copied: a predictor has the dtype that it was saved in.
        rerouter.load_state_dict({n: v.to(device) for n, v in own.items()}, assign=True)


def _rerouters(model: nn.Module) -> dict[str, Rerouter]:
    return {
        block_of(name): module
        for name, module in model.named_modules()
        if isinstance(module, Rerouter)
    }


def _own_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without ours: what it was before rerouting, tied weights and all."""
    ours = tuple(f"{block}.{REROUTER}." for block in _rerouters(model))
    return {n: value for n, value in model.state_dict().items() if not n.startswith(ours)}


def _refuse_strangers(model: nn.Module) -> None:
    if type(model).__module__.partition(".")[0] != "transformers":
        raise ValueError(
            f"a {type(model).__name__} is of no class of transformers, by which its folder could "
            f"be opened; save the model of transformers in it"
        )


def _check_weights(folder: Path, model: nn.Module, found: dict[str, Any]) -> None:
    wrong = {k: sorted(map(str, found[k])) for k in ("missing_keys", "mismatched_keys") if found[k]}
    if wrong:
        raise ValueError(
            f"the weights in {folder} are not those of the {type(model).__name__} that its "
            f"config.json describes: {wrong}; save the model again"
        )


def _check_blocks(folder: Path, rerouting: Rerouting, blocks: list[str]) -> None:
    if sorted(rerouting.blocks) != sorted(blocks):
        raise ValueError(
            f"{folder}: {REROUTED} lists the blocks {blocks}, the model has "
            f"{list(rerouting.blocks)}; the files do not belong together, save the model again"
        )


__all__ = [
    "LEARNT",
    "SCHEMA",
    "learnt_in",
    "load",
    "load_rerouted",
    "save",
    "save_rerouted",
    "take_over",
]
