"""The optimiser's memory of the dense run, carried over to the upcycled model.

    left alone     state of the dense parameter, as it is
    experts        tile: state of the MLP, one copy for each expert; or none
    router, new    none: step 0, so that Adam corrects the bias of its young moments

An entry is laid out for the expert parameter as if the optimiser had had that from the beginning:
halves of a gated map one below the other, Conv1D transposed, factored moments along the dims that
are left. A parameter without an entry is one the optimiser meets for the first time.

Shapes: a map is `[out, in]`, its factored moments `[out]` and `[in]`; a stack of experts
`[experts, out, in]`, its factored moments `[experts, out]` and `[experts, in]`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moefold.routers.base import check_one_of
from moefold.surgery.births import Copies
from moefold.surgery.dense_state import Kind, State, by_name, kind_of
from moefold.surgery.hosts import find_host
from moefold.surgery.hosts.layer import MIXTURE, is_moe_layer
from moefold.surgery.lineage import DenseParameter, Origin, origins

POLICIES = ("tile", "reset-experts", "reset-all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """What became of the state of each parameter that the new optimiser holds.

    Attributes:
        policy: what was asked for.
        kept: names of those that have the state they had in the dense run.
        tiled: names of those of experts that have the state of the MLP.
        fresh: names of those that start without one, at step 0.
    """

    policy: str
    kept: tuple[str, ...]
    tiled: tuple[str, ...]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"optimiser state, {self.policy}: {len(self.kept)} parameters keep theirs, "
            f"{len(self.tiled)} of experts are tiled, {len(self.fresh)} start at step 0"
        )


def carry_optimizer(
    state: Mapping[str, Any] | str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    policy: str = "tile",
    gradient_share: float = 1.0,
    names: Iterable[str] | None = None,
    dense: nn.Module | None = None,
) -> Carried:
    """Loads into a new optimiser over an upcycled model what the dense run's optimiser knew.

    Learning rate, weight decay and all other settings stay those of the new optimiser; only what
    it keeps for each parameter is replaced, completely or not at all. The kinds are AdamW, Adam,
    SGD, torch's Adafactor and that of transformers.

    Sparse Upcycling (Komatsuzaki et al., 2023, section 2) tiles for vision, and starts all anew for
    language. With tiled moments an expert's first updates of AdamW are too small, for it sees a
    part of the tokens and has a part of the gradient that the moments are of, until the second
    moment has forgotten: about `1 / (1 - beta2)` steps.

    Args:
        state: what `state_dict()` of the dense run's optimiser returned, a file of `torch.save`
            that holds it, or a checkpoint folder of `transformers.Trainer`. Not read for
            `"reset-all"`.
        model: the object that `moefold.upcycle` was given, or a loaded one.
        optimizer: made from the parameters of the upcycled model.
        policy: `"tile"`: every expert gets the state of the MLP it copies; `"reset-experts"`: none;
            `"reset-all"`: no parameter gets any.
        gradient_share: an expert's gradient as a share of the MLP's. First moments of experts are
            multiplied with it, second moments with its square, as if it had always been so: about
            `k / num_experts` for weights near one, `1 / num_experts` for weights that sum to one.
            At 1 the moments are the MLP's own.
        names: of the dense parameters, in the order in which the dense run's optimiser got them;
            None to find out (one group, `Trainer`'s two, or matrices and the rest).
        dense: for a loaded model, the model as it was before surgery; only its names count.

    Returns:
        Which parameters kept, got or lost what.

    Raises:
        ValueError: an unknown policy; the state is of another kind of optimiser or another model,
            or its parameters cannot be named; the optimiser lacks parameters of a mixture, or holds
            some that are not in the model; experts are no copies. The optimiser is then untouched.
    """
    check_one_of("policy", policy, POLICIES)
    if not 0 < gradient_share < math.inf:
        raise ValueError(f"gradient_share is {gradient_share!r}; it must be a number above zero")
    kind = kind_of(optimizer)
    origin, dense_parameters = origins(model, dense)
    held = _names_in(optimizer, model)
    known = {} if policy == "reset-all" else by_name(state, dense_parameters, kind, names)
    if policy == "tile":
        _refuse_other_births(model, origin, dense_parameters)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for name in held:
        entries = [known[source] for source in origin[name].sources if source in known]
        copied = origin[name].experts is not None
        if not entries or len(entries) < len(origin[name].sources):
            continue
        if copied and policy == "tile":
            found[name] = _tile(entries, origin[name], shapes[name], kind, gradient_share)
        elif not copied:
            found[name] = {key: _clone(value) for key, value in entries[0].items()}
    _check_settings(optimizer, held, found, kind)
    new = optimizer.state_dict()
    new["state"] = {number: found[name] for number, name in enumerate(held) if name in found}
    optimizer.load_state_dict(new)
    return Carried(
        policy=policy,
        kept=tuple(n for n in held if n in found and origin[n].experts is None),
        tiled=tuple(n for n in held if n in found and origin[n].experts is not None),
        fresh=tuple(n for n in held if n not in found),
    )


def _names_in(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """The names of an optimiser's parameters, in its order.

    Raises:
        ValueError: it holds parameters of something else, or lacks some of a mixture.
    """
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = [parameter for parameter in held if parameter not in name_of]
    inside = set(held)
    lacking = [
        f"{site}.{MIXTURE}.{name}".lstrip(".")
        for site, layer in model.named_modules()
        if is_moe_layer(layer)
        for name, parameter in layer.get_submodule(MIXTURE).named_parameters()
        if parameter.requires_grad and parameter not in inside
    ]
    if foreign:
        raise ValueError(
            f"the optimiser holds {len(foreign)} parameters that are not in the upcycled "
            f"{type(model).__name__} (the first is {list(foreign[0].shape)}); make it after "
            f"surgery, from the parameters of the model"
        )
    if lacking:
        raise ValueError(
            f"the optimiser lacks {len(lacking)} parameters of mixtures ({lacking[0]}, ...), which "
            f"would never learn; make it from all the parameters of the upcycled model, or freeze "
            f"those with requires_grad_(False)"
        )
    return [name_of[parameter] for parameter in held]


def _refuse_other_births(
    model: nn.Module, origin: Mapping[str, Origin], parameters: Mapping[str, DenseParameter]
) -> None:
    """Refuses experts that are no copies of an MLP.

    Raises:
        ValueError: names the birth, if it is known, or an expert parameter of another shape.
    """
    section = find_host(model).section(model)
    kind = Copies.kind if section is None else section["upcycle"]["birth"]["kind"]
    if kind != Copies.kind:
        raise ValueError(
            f"the experts were born by {kind!r} and are no copies of the MLP, whose optimiser "
            f"state does not fit them; use policy='reset-experts'"
        )
    for name, parameter in model.named_parameters():
        sources = origin[name].sources
        if origin[name].experts is None or not sources:
            continue
        turn = -1 if origin[name].transposed else 1
        maps = [parameters[source].shape[::turn] for source in sources]
        wanted = [origin[name].experts, sum(shape[0] for shape in maps), *maps[0][1:]]
        if list(parameter.shape) != wanted:
            raise ValueError(
                f"{name} is {list(parameter.shape)}, and copies of {' and '.join(sources)} would "
                f"be {wanted}; pass as `dense` the model as it was before surgery, or use "
                f"policy='reset-experts'"
            )


def _check_settings(
    optimizer: Optimizer, held: Sequence[str], found: Mapping[str, State], kind: Kind
) -> None:
    """Refuses an optimiser that would look for an entry that the dense run did not have."""
    names = iter(held)
    for group in optimizer.param_groups:
        mine = [next(names) for _ in group["params"]]
        for setting, entry in kind.on_request:
            if group.get(setting) in (None, False):
                continue
            without = [name for name in mine if name in found and entry not in found[name]]
            if without:
                raise ValueError(
                    f"the optimiser has {setting}={group[setting]}, for which the state needs "
                    f"{entry}, and the dense run did not keep it ({without[0]}, ...); make the "
                    f"optimiser with the {setting} of the dense run"
                )


def _tile(
    entries: Sequence[State], origin: Origin, shape: tuple[int, ...], kind: Kind, share: float
) -> dict[str, Any]:
    """The state of an expert parameter, from those of the maps it came from."""
    if origin.transposed:
        entries = [_transposed(entry, kind) for entry in entries]
    joined = _joined(entries, kind)
    if kind.row and len(shape) == 2:
        joined = _factored(joined, kind)  # biases of an MLP have one dim, of experts two
    tiled = {}
    for key, value in joined.items():
        # The column moment of biases is one for all experts.
        wanted = kind.expected(key, shape)
        if isinstance(value, Tensor) and wanted is not None:
            scale = share if key in kind.first else share**2
            tiled[key] = value.expand(wanted).clone().mul_(scale)
        else:
            tiled[key] = _clone(value)
    return tiled


def _transposed(entry: State, kind: Kind) -> dict[str, Any]:
    """The entry of a map kept `[in, out]` as that of the same map kept `[out, in]`."""
    swapped = {kind.row: kind.col, kind.col: kind.row}
    turned = {}
    for key, value in entry.items():
        matrix = isinstance(value, Tensor) and value.dim() == 2
        turned[swapped.get(key, key)] = value.t() if matrix else value
    return turned


def _joined(entries: Sequence[State], kind: Kind) -> dict[str, Any]:
    """One entry for maps that lie one below the other: `[out, in]` each, `[2 * out, in]` together.

    Moments are joined, also those by row; of those by column, which are means over the rows, it is
    the mean. The maps were stepped together; were they not, the younger one's step counts: Adam
    then takes none of the moments for older than it is.
    """
    if len(entries) == 1:
        return dict(entries[0])
    joined = {}
    for key in entries[0]:
        values = [entry[key] for entry in entries]
        if key == kind.col:
            joined[key] = torch.stack(values).mean(0)
        elif key == kind.row or key in (*kind.first, *kind.second):
            joined[key] = None if values[0] is None else torch.cat(values)
        else:
            joined[key] = min(values, key=float)
    return joined


def _factored(entry: State, kind: Kind) -> dict[str, Any]:
    """The entry of a bias, which is not factored, as that of a stack of biases, which is.

    For rows that are all alike the factors are exact: the second moment at (expert, out) is
    `row * col / mean(row)`, row being the mean of the bias's moment and col that moment.
    """
    (full,) = (key for key in kind.second)
    moment = entry[full]
    rest = {key: value for key, value in entry.items() if key != full}
    return {**rest, kind.row: moment.mean(-1, keepdim=kind.keepdim), kind.col: moment}


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
