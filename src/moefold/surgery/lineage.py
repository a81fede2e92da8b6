"""Which parameters of the dense model each parameter of an upcycled one came from.

    1.norm.weight                <-  1.norm.weight                                  left alone
    1.moe.experts.gate_up_proj   <-  1.mlp.gate_proj.weight, 1.mlp.up_proj.weight   copied
    1.moe.router.weight          <-  nothing                                        new

What an optimiser knows of the dense parameters can follow these arrows. The dense MLPs are known to
the model that was operated on, outside its tree; for one that was loaded, a dense model says them.

Shapes: an expert parameter is `[experts, out, in]`, the maps it came from `[out, in]` each, one
below the other, or `[in, out]` where they are a Conv1D of transformers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from moefold.moe import MoE
from moefold.surgery.hosts import Changes, Form
from moefold.surgery.hosts.forms import is_transposed
from moefold.surgery.hosts.layer import MIXTURE, is_moe_layer
from moefold.surgery.upcycle import CHANGES


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where one parameter came from.

    Attributes:
        sources: names of dense parameters; none for a new one, two for the halves of a gated map.
        experts: how many copies were made; None for a parameter that was left alone.
        transposed: whether the sources are `[in, out]`.
    """

    sources: tuple[str, ...] = ()
    experts: int | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseParameter:
    """What the name, the place and the shape of a dense parameter say about it.

    Attributes:
        shape: its shape.
        trained: whether it requires a gradient.
        in_layer_norm: whether it is a parameter of an `nn.LayerNorm`.
    """

    shape: tuple[int, ...]
    trained: bool
    in_layer_norm: bool


def lineage(model: nn.Module, dense: nn.Module | None = None) -> dict[str, tuple[str, ...]]:
    """The names of the dense parameters that each parameter of an upcycled model came from.

    Args:
        model: the object that `moefold.upcycle` was given, or a loaded one.
        dense: for a loaded one, the model as it was before surgery; its weights do not matter, it
            may be on the device `meta`.

    Returns:
        For each name in `model.named_parameters()`: its own name if surgery left it alone; for
        experts the one or two maps of the MLP that their weights lie in the place of; nothing for
        routers, shared experts, and biases that an MLP did not have.

    Raises:
        ValueError: the model is not upcycled, or it was loaded and `dense` is missing or another
            kind of model.
    """
    return {name: origin.sources for name, origin in origins(model, dense)[0].items()}


def origins(
    model: nn.Module, dense: nn.Module | None = None
) -> tuple[dict[str, Origin], dict[str, DenseParameter]]:
    """The origin of every parameter, and the dense parameters in the order of the dense model.

    Raises:
        ValueError: see `lineage`.
    """
    if not any(map(is_moe_layer, model.modules())):
        raise ValueError(
            f"{type(model).__name__} is not upcycled: no layer of it is a mixture that surgery "
            f"made; pass the object that was given to moefold.upcycle"
        )
    tree = _DenseTree.of(model, dense)
    parameters = tree.parameters()
    found: dict[str, Origin] = {}
    for name, module in model.named_modules():
        if is_moe_layer(module):
            found.update(_origins_in(name, module, tree, parameters))
    result = {}
    for name, parameter in model.named_parameters():
        result[name] = found.get(name, Origin(sources=(name,)))
        before = parameters.get(name)
        if name not in found and (before is None or before.shape != tuple(parameter.shape)):
            raise ValueError(
                f"{name} is {list(parameter.shape)} in the upcycled model, and in the dense one "
                f"{'not there' if before is None else list(before.shape)}; pass as `dense` the "
                f"model as it was before surgery"
            )
    return result, parameters


def _origins_in(
    site: str, layer: nn.Module, tree: "_DenseTree", parameters: Mapping[str, DenseParameter]
) -> dict[str, Origin]:
    """The origins of all the parameters of the mixture in a layer."""
    form, moe = cast(Form, layer._moefold_form), cast(MoE, getattr(layer, MIXTURE))
    ups = [form.up] if form.gate is None else [form.gate, form.up]
    maps = {"down_proj": [form.down], "gate_up_proj" if moe.experts.gated else "up_proj": ups}
    prefix = f"{site}.{MIXTURE}." if site else f"{MIXTURE}."
    found = {prefix + name: Origin() for name, _ in moe.named_parameters()}
    for name, paths in maps.items():
        linears = [tree.find(site, path) for path in paths]
        found[f"{prefix}experts.{name}"] = Origin(
            sources=tuple(f"{where}.weight" for where, _ in linears),
            experts=moe.experts.num_experts,
            transposed=is_transposed(linears[0][1]),
        )
        biases = tuple(f"{where}.bias" for where, _ in linears)
        # Where the MLP has no bias, or only half of one, the experts' bias is new.
        if f"{prefix}experts.{name}_bias" in found and all(b in parameters for b in biases):
            found[f"{prefix}experts.{name}_bias"] = Origin(
                sources=biases, experts=moe.experts.num_experts
            )
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _DenseTree:
    """The modules of a dense model, whether they are still in it or surgery took them out."""

    root: nn.Module
    before: Mapping[nn.Module, Mapping[str, nn.Module | None]]

    @classmethod
    def of(cls, model: nn.Module, dense: nn.Module | None) -> "_DenseTree":
        changes = model.__dict__.get(CHANGES)
        if dense is not None:
            if any(map(is_moe_layer, dense.modules())):
                raise ValueError(
                    f"the {type(dense).__name__} passed as `dense` is upcycled itself; pass the "
                    f"model as it was before surgery"
                )
            return cls(root=dense, before={})
        if changes is None:
            raise ValueError(
                f"{type(model).__name__} does not hold the dense modules it was made from (it was "
                f"loaded, or upcycled inside another model); pass the model as it was before "
                f"surgery as `dense`, for its names only: it may be built under "
                f"torch.device('meta')"
            )
        return cls(root=model, before=cast(Changes, changes).children_before())

    def children(self, module: nn.Module) -> Mapping[str, nn.Module | None]:
        return self.before.get(module, module._modules)

    def find(self, site: str, path: str) -> tuple[str, nn.Module]:
        """Name and module of a map of the MLP of a layer; the path may count from the end."""
        name, module = [], self.root
        for part in [*filter(None, site.split(".")), *path.split(".")]:
            children = self.children(module)
            key = list(children)[int(part)] if part.startswith("-") and children else part
            child = children.get(key)
            if child is None:
                raise ValueError(
                    f"the dense {type(self.root).__name__} has no {'.'.join([*name, part])}, which "
                    f"the mixture at {site or 'the model itself'} was made from; pass as `dense` "
                    f"the model as it was before surgery"
                )
            name.append(key)
            module = child
        return ".".join(name), module

    def parameters(self) -> dict[str, DenseParameter]:
        """What `named_parameters` of the dense model gives, in its order: each parameter once."""
        seen: set[nn.Parameter] = set()
        found: dict[str, DenseParameter] = {}
        for prefix, module in self._modules("", self.root, set()):
            for name, parameter in module._parameters.items():
                if parameter is None or parameter in seen:
                    continue
                seen.add(parameter)
                found[prefix + name] = DenseParameter(
                    shape=tuple(parameter.shape),
                    trained=parameter.requires_grad,
                    in_layer_norm=isinstance(module, nn.LayerNorm),
                )
        return found

    def _modules(
        self, prefix: str, module: nn.Module, seen: set[nn.Module]
    ) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield prefix, module
        for name, child in self.children(module).items():
            if child is not None:
                yield from self._modules(f"{prefix}{name}.", child, seen)
