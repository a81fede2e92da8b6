"""Surgery from folder to folder, for a checkpoint that need not fit into memory.

    dense shards -> a model without weights -> plan, empty mixtures, config -> `save`
                                                                                |
    new shards   <- each weight, read or born at the moment it is written <-----'

The model is on the device "meta", and `save` writes it like any other: same names, same files, same
hashes, all or nothing. Its state dict holds promises in place of weights. A promise is kept when
the writer takes it, and forgotten when the shard it is in is on the disk. So there is never more
in memory than the shard being filled and the rest of the one site it has come to.

The random numbers are those of `upcycle`: with the same seed, the same bits are written.
"""

import copy
import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from moefold.moe import MoE, MoEConfig
from moefold.surgery.births import born
from moefold.surgery.config import UpcycleConfig
from moefold.surgery.hosts import Changes, Site
from moefold.surgery.hosts.forms import describe, module_at
from moefold.surgery.hosts.layer import MIXTURE
from moefold.surgery.plan import Plan, draft
from moefold.surgery.saved import (
    MANIFEST,
    check_shard_size,
    refuse_foreign_folder,
    refuse_unwritable_folder,
    save,
)
from moefold.surgery.upcycle import section_of

if TYPE_CHECKING:
    from moefold.surgery.hosts.checkpoint import Checkpoint


def upcycle_folder(
    folder: str | Path,
    out: str | Path,
    config: UpcycleConfig | None = None,
    *,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Upcycles a saved dense model into another folder, without ever holding it in memory.

    What is written is what `moefold.upcycle(model, config, inputs=False)` and `moefold.save` would
    write for the opened model and the same random state, bit for bit, its tokenizer beside it.
    Memory: at most two shards, where a shard is not smaller than the experts of one site.

    Args:
        folder: a transformer or SentenceTransformer, as `save_pretrained` writes it.
        out: the folder to write, as in `moefold.save`.
        config: what to do; the defaults of `UpcycleConfig` if None.
        max_shard_size: bytes that a file of new weights holds at most, or text such as "5GB".
        progress: called with the bytes that are done and those there will be, as they are made.

    Returns:
        The plan that was carried out. There is no receipt, for nothing was run.

    Raises:
        ValueError: whatever `moefold.plan` and `moefold.save` refuse; the folder holds no
            safetensors, or some that are truncated, missing, or not those of the model its config
            names; the disk has too little room.
    """
    folder, out = Path(folder).expanduser(), Path(out)
    config = config or UpcycleConfig()
    check_shard_size(max_shard_size)
    refuse_foreign_folder(out)
    refuse_unwritable_folder(out)
    _refuse_no_dense_folder(folder)
    if config.birth.reads_models:
        raise ValueError(
            f"birth {config.birth.kind!r} reads whole models, which are not in memory here; open "
            f"the model and call moefold.upcycle"
        )
    from moefold.surgery.hosts import checkpoint as on_disk  # other people's libraries are guests

    on_disk.places_in(folder)  # so that damage is called by its name
    model = on_disk.open_empty(folder)
    made, host, taken = draft(model, config)
    prefix, inner = on_disk.transformer_in(model)
    weights = on_disk.Checkpoint(inner, folder)
    births = _Births(made, taken, prefix, weights)
    changes = Changes()
    for site in taken:
        host.install(model, site, births.empty[site.name], changes)
    host.sign(model, section_of(made, host.source(model)), changes)

    state = inner.state_dict()
    sizes = {id(inner.get_parameter_or_buffer(name)): value.nbytes for name, value in state.items()}
    needed, done = sum(sizes.values()), 0  # tied weights are written once
    _refuse_full_disk(out, needed)

    def keep(name: str) -> Tensor:
        nonlocal done
        value = births.take(name) if births.bears(name) else weights.read(name)
        done += value.nbytes
        if progress is not None:
            progress(done, needed)
        return value

    promises = {name: _promise(name, value, keep) for name, value in state.items()}
    inner.__dict__["state_dict"] = lambda: dict(promises)  # a new one, which the writer empties
    tokenizer = None if prefix else on_disk.open_processor(folder)
    save(model, out, tokenizer=tokenizer, max_shard_size=max_shard_size)
    births.leave_random_state()
    why = "it was never whole in memory; moefold.load opens it"
    return dataclasses.replace(made, unmeasured=why)


class _Promise(Tensor):
    """A weight that is not there yet: on the device "meta", until a writer asks for its bytes."""

    _keep: Callable[[], Tensor]

    def contiguous(self, *_: Any, **__: Any) -> Tensor:
        """The weight itself."""
        return self._keep()


def _promise(name: str, like: Tensor, keep: Callable[[str], Tensor]) -> _Promise:
    promise = Tensor._make_subclass(_Promise, torch.empty_like(like, device="meta"))
    promise._keep = lambda: keep(name)
    return promise


@final
class _Births:
    """The mixtures of a model that is never whole, born one at a time when one is asked for.

    Born in the order of the sites, as `upcycle` does it, each begins where the random numbers of
    the one before ended. Asked for in another order, the earlier ones are born for that alone.

    Args:
        made: the plan.
        sites: those taken, of an empty model that still has its MLPs.
        prefix: path of the transformer in the model, as the names of the sites have it.
        weights: of the transformer.
    """

    def __init__(
        self, made: Plan, sites: Sequence[Site], prefix: str, weights: "Checkpoint"
    ) -> None:
        self._birth = made.config.birth
        self._weights = weights
        self._configs = [made.mixtures[site.name].moe for site in sites]
        self._sites = [dataclasses.replace(s, layer=copy.deepcopy(s.layer)) for s in sites]
        self._paths = [site.name.removeprefix(prefix) for site in sites]
        self.empty = {
            site.name: _empty(moe, site) for site, moe in zip(sites, self._configs, strict=True)
        }
        self._owners = {
            name: index
            for index, site in enumerate(sites)
            for name in self._names(index, self.empty[site.name])
        }
        self._random_states = [torch.get_rng_state()]
        self._born: dict[str, Tensor] = {}

    def bears(self, name: str) -> bool:
        """Whether a weight is that of a mixture."""
        return name in self._owners

    def take(self, name: str) -> Tensor:
        """A weight of a mixture; it is not kept here."""
        if name not in self._born:
            self._born.clear()  # before the next is born: there is room for one
            index = self._owners[name]
            while len(self._random_states) <= index:
                self._bear(len(self._random_states) - 1)
            self._born = self._names(index, self._bear(index))
        return self._born.pop(name)

    def leave_random_state(self) -> None:
        """Leaves the random state as `upcycle` would."""
        while len(self._random_states) <= len(self._sites):
            self._bear(len(self._random_states) - 1)
        torch.set_rng_state(self._random_states[-1])

    def _bear(self, index: int) -> MoE:
        site = self._site_with_weights(index)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random_states[index])
            moe = born(self._configs[index], site, self._birth)
            if len(self._random_states) == index + 1:
                self._random_states.append(torch.get_rng_state())
        return moe

    def _names(self, index: int, moe: MoE) -> dict[str, Tensor]:
        place = f"{self._paths[index]}.{MIXTURE}."
        return {place + name: value for name, value in moe.state_dict().items()}

    def _site_with_weights(self, index: int) -> Site:
        """The site with its MLP in memory, once that has been seen to compute what it should.

        Raises:
            ValueError: it computes something else.
        """
        site = self._sites[index]
        layer = copy.deepcopy(site.layer)
        pieces = {m for piece in site.form.pieces for m in module_at(layer, piece).modules()}
        for path, module in layer.named_modules():
            if module in pieces:
                for own, value in module.named_parameters(recurse=False):
                    real = self._weights.read(f"{self._paths[index]}.{path}.{own}")
                    module.register_parameter(own, nn.Parameter(real, value.requires_grad))
        seen = describe(site.name, layer, site.form)
        if seen.mlp is None:
            raise ValueError(f"cannot upcycle {site.name}: {'; '.join(seen.reasons_against)}")
        return dataclasses.replace(site, layer=layer, mlp=seen.mlp)


def _empty(config: MoEConfig, site: Site) -> MoE:
    assert site.mlp is not None
    with torch.device("meta"):
        moe = config.build(site.dim, causal=site.causal, site=site.name)
    return moe.to(site.mlp.up.dtype).train(site.layer.training)


def _refuse_no_dense_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(
            f"no folder at {folder}; give a local folder of a dense model (a model of the hub is "
            f"fetched with `hf download owner/name --local-dir FOLDER`)"
        )
    if (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} holds an upcycled model; give the dense one it was made from")
    if not any((folder / name).is_file() for name in ("config.json", "modules.json")):
        raise ValueError(f"{folder} has no config.json; give a folder that save_pretrained wrote")


def _refuse_full_disk(out: Path, needed: int) -> None:
    place = out.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"{out} needs {needed / 1e9:.2f} GB, and {place} has {free / 1e9:.2f} GB left; make "
            f"room, or give a folder elsewhere"
        )
