"""What an optimiser knew of a dense model, by the names of its parameters.

    optimizer.state_dict()   {"state": {0: {"step": ..., "exp_avg": ...}, 1: ...},
                              "param_groups": [{"params": [0, 1], "lr": ...}]}
    by name                  {"embeddings.weight": {"step": ..., "exp_avg": ...}, ...}

A state dict numbers the parameters in the order in which the optimiser got them. Newer ones may say
the names; else the orders in use are tried, and the one that fits all sizes and shapes is taken.
Files are read as tensors and numbers only (`weights_only`), never as pickles that may run.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from moefold.surgery.lineage import DenseParameter

State = Mapping[str, Any]
"""What an optimiser keeps for one parameter."""

FILES = ("optimizer.pt", "optimizer.bin")
"""How an optimiser's state is called in a folder of `transformers.Trainer`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What the optimisers of one kind keep for a parameter.

    Attributes:
        name: as messages say it.
        needed: what there is for every parameter that was stepped.
        first: tensors of the shape of the parameter that grow with its gradient.
        second: the same with its square.
        row: its mean over the last dim, where the second moment is factored; empty for none.
        col: its mean over the dim before.
        keepdim: whether these have a dim of one in the place of the one that is gone.
        on_request: entries that there are if a setting of the group is neither None nor False.
    """

    name: str
    needed: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    row: str = ""
    col: str = ""
    keepdim: bool = False
    on_request: tuple[tuple[str, str], ...] = ()

    @property
    def known(self) -> set[str]:
        """All the entries there can be."""
        return {*self.needed, *self.first, *self.second, self.row, self.col} - {""}

    def expected(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of an entry for a parameter of a shape; None if it has none to keep."""
        one = (1,) if self.keepdim else ()
        if key in (*self.first, *self.second):
            return shape
        if key == self.row:
            return (*shape[:-1], *one)
        if key == self.col:
            return (*shape[:-2], *one, *shape[-1:])
        return None


KINDS: dict[type[Optimizer] | str, Kind] = {
    torch.optim.Adam: Kind(  # and AdamW, which is one
        name="Adam or AdamW",
        needed=("step", "exp_avg", "exp_avg_sq"),
        first=("exp_avg",),
        second=("exp_avg_sq", "max_exp_avg_sq"),
        on_request=(("amsgrad", "max_exp_avg_sq"),),
    ),
    torch.optim.SGD: Kind(name="SGD", first=("momentum_buffer",)),
    torch.optim.Adafactor: Kind(
        name="torch's Adafactor",
        needed=("step",),
        second=("variance",),
        row="row_var",
        col="col_var",
        keepdim=True,
    ),
    "transformers.optimization.Adafactor": Kind(
        name="transformers' Adafactor",
        needed=("step", "RMS"),
        first=("exp_avg",),
        second=("exp_avg_sq",),
        row="exp_avg_sq_row",
        col="exp_avg_sq_col",
        on_request=(("beta1", "exp_avg"),),
    ),
}


def kind_of(optimizer: Optimizer) -> Kind:
    """What an optimiser keeps.

    Raises:
        ValueError: it is of no kind whose state can be carried.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps them
    for base in type(inner).__mro__:
        kind = KINDS.get(base) or KINDS.get(f"{base.__module__}.{base.__qualname__}")
        if kind is not None:
            return kind
    raise ValueError(
        f"the optimiser is a {type(optimizer).__module__}.{type(optimizer).__qualname__}, whose "
        f"state is not known here; states of {', '.join(k.name for k in KINDS.values())} can be "
        f"carried; for another, start anew"
    )


def by_name(
    state: Mapping[str, Any] | str | Path,
    parameters: Mapping[str, DenseParameter],
    kind: Kind,
    names: Iterable[str] | None = None,
) -> dict[str, State]:
    """The state of every parameter that has one.

    Args:
        state: what `state_dict()` of the dense run's optimiser returned, a file that holds it, or
            a folder that `transformers.Trainer` wrote.
        parameters: those of the dense model, in its order.
        kind: of the optimiser that the state is for.
        names: of the parameters, in the order in which the optimiser got them; None to find out.

    Raises:
        ValueError: no state of that kind of optimiser, or not of these parameters.
    """
    data = _read(state) if isinstance(state, str | Path) else state
    if not {"state", "param_groups"} <= set(data):
        raise ValueError(
            f"this is no state dict of an optimiser: it has the entries "
            f"{', '.join(sorted(map(str, data)))}, not `state` and `param_groups`; pass what "
            f"optimizer.state_dict() returned, or the entry of a checkpoint that holds it"
        )
    groups = [list(group["params"]) for group in data["param_groups"]]
    entries = {key: entry for key, entry in data["state"].items() if entry}
    for key, entry in entries.items():
        _check_kind(key, entry, kind)
    if names is None and all("param_names" in group for group in data["param_groups"]):
        names = chain.from_iterable(group["param_names"] for group in data["param_groups"])
    if names is None and all(isinstance(key, str) for key in chain(*groups)):
        names = chain(*groups)  # as torch.distributed.checkpoint and FSDP save it
    if names is None:
        order = _find_order(groups, entries, parameters, kind)
    else:
        order = _check_names(list(names), groups, entries, parameters, kind)
    return {order[key]: entry for key, entry in entries.items()}


def _read(path: str | Path) -> Mapping[str, Any]:
    file = Path(path)
    if file.is_dir():
        found = [file / name for name in FILES if (file / name).is_file()]
        if not found:
            inside = ", ".join(sorted(p.name for p in file.iterdir())) or "nothing"
            raise ValueError(
                f"{file} has no {' or '.join(FILES)}, only {inside}; pass a checkpoint folder of "
                f"transformers.Trainer that was not saved with save_only_model, or the file"
            )
        file = found[0]
    try:
        data = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file or folder {file}") from None
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{file} is not opened ({reason}): it must be a file of torch.save with tensors and "
            f"numbers only; read it yourself if you trust it, and pass the state dict"
        ) from error
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{file} holds a {type(data).__name__}, not the state dict of an optimiser"
        )
    return data


def _check_kind(key: Any, entry: State, kind: Kind) -> None:
    unknown = sorted(set(entry) - kind.known)
    missing = sorted(set(kind.needed) - set(entry))
    if unknown or missing:
        wrong = [f"has {', '.join(unknown)}"] if unknown else []
        wrong += [f"lacks {', '.join(missing)}"] if missing else []
        raise ValueError(
            f"the state is not one of {kind.name}: parameter {key} {' and '.join(wrong)}; make an "
            f"optimiser of the kind that the dense run had"
        )


def _misfit(entry: State, shape: tuple[int, ...], kind: Kind) -> str:
    """What in an entry has another shape than that of a parameter asks for; empty if nothing."""
    for key, value in entry.items():
        wanted = kind.expected(key, shape)
        if wanted is not None and isinstance(value, Tensor) and tuple(value.shape) != wanted:
            return f"{key} is {list(value.shape)}, not {list(wanted)}"
    return ""


def _find_order(
    groups: Sequence[Sequence[Any]],
    entries: Mapping[Any, State],
    parameters: Mapping[str, DenseParameter],
    kind: Kind,
) -> dict[Any, str]:
    """The names of the numbers, by the one order in use that fits."""
    if not entries:
        return {}
    keys, sizes = list(chain(*groups)), [len(group) for group in groups]
    fits: dict[tuple[str, ...], None] = {}
    tried = {}
    for what, order in _orders(parameters).items():
        tried[what] = [len(group) for group in order]
        flat = tuple(chain(*order))
        if tried[what] == sizes and not any(
            _misfit(entry, parameters[name].shape, kind)
            for name, entry in zip(flat, map(entries.get, keys), strict=True)
            if entry
        ):
            fits[flat] = None
    if len(fits) == 1:
        return dict(zip(keys, next(iter(fits)), strict=True))
    if fits:
        raise ValueError(
            f"the state fits the dense model in {len(fits)} orders of its parameters; pass names="
            f"[...], the names in the order in which the dense run's optimiser got them"
        )
    shown = "; ".join(f"{what}: {', '.join(map(str, of))}" for what, of in tried.items())
    raise ValueError(
        f"the state is of {', '.join(map(str, sizes))} parameters (by group), which fits the dense "
        f"model in none of the orders known ({shown}), or fits in number and not in shape; it is "
        f"of another model, or pass names=[...], the names in the order in which the dense run's "
        f"optimiser got them"
    )


def _orders(parameters: Mapping[str, DenseParameter]) -> dict[str, list[list[str]]]:
    """The orders in use: all in one group, or split by a rule; what is trained, or everything."""
    trained = [name for name, parameter in parameters.items() if parameter.trained]
    orders = {}
    for which, names in (("trained", trained), ("all", list(parameters))):
        decayed = [name for name in names if decays(name, parameters[name])]
        matrices = [name for name in names if len(parameters[name].shape) >= 2]
        orders[which] = [names]
        orders[f"{which}, as Trainer"] = _split(names, decayed)
        orders[f"{which}, matrices first"] = _split(names, matrices)
    return orders


def _split(names: Sequence[str], first: Iterable[str]) -> list[list[str]]:
    chosen = set(first)
    return [[n for n in names if n in chosen], [n for n in names if n not in chosen]]


_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def decays(name: str, parameter: DenseParameter) -> bool:
    """Whether `transformers.Trainer` puts a parameter into its first group, with weight decay.

    That is `Trainer.get_decay_parameter_names` of transformers 5: no LayerNorm, and no bias or norm
    by name.
    """
    return not parameter.in_layer_norm and _UNDECAYED.search(name.lower()) is None


def _check_names(
    names: Sequence[str],
    groups: Sequence[Sequence[Any]],
    entries: Mapping[Any, State],
    parameters: Mapping[str, DenseParameter],
    kind: Kind,
) -> dict[Any, str]:
    """The names of the numbers, as somebody said them."""
    keys = list(chain(*groups))
    if len(names) != len(keys):
        raise ValueError(
            f"there are {len(names)} names for a state of {len(keys)} parameters; give one for "
            f"each, in the order in which the dense run's optimiser got them"
        )
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ValueError(f"the names hold {', '.join(twice)} more than once; give each once")
    for key, name in zip(keys, names, strict=True):
        if key not in entries:
            continue
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            raise ValueError(
                f"the state names {name}, which is no parameter of the dense model"
                f"{f'; did you mean {near[0]}?' if near else ''}; pass names=[...] as "
                f"named_parameters() of the dense model spells them"
            )
        wrong = _misfit(entries[key], parameters[name].shape, kind)
        if wrong:
            raise ValueError(
                f"the state of {name} is of another shape: {wrong}; it is the state of another "
                f"model, or the names are in another order than the optimiser got them in"
            )
    return dict(zip(keys, names, strict=True))
