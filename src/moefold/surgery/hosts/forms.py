"""Reading a layer by its form: its weights, its activation, and whether that is all of it.

Nothing is guessed from names alone. The weights are found where the form says, the activation is
recognised by its values, and the MLP is run on a few random tokens and compared with what the
weights and the activation give: a layer that does anything else is not a site.

Shapes: `dim` is the width of a token, `width` the inner width of the MLP.
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from moefold.experts import activations
from moefold.modes import evaluating
from moefold.registry import Registry
from moefold.surgery.hosts.base import DenseMLP, Form, Site

FORMS: Registry[Form] = Registry("form", Form)

_TOKENS = 3
"""Tokens of the input an MLP is tried on."""


def form_of(layer: nn.Module) -> Form | None:
    """The registered form of a layer, None if it has none (by its exact class)."""
    return _fitting(layer, _forms_by_layer())


def name_of(form: Form) -> str:
    """The name a form is registered under."""
    return next(name for name in FORMS.names() if FORMS.get(name) is form)


def known_layers(model: nn.Module) -> list[tuple[str, nn.Module, Form]]:
    """Every layer of the model that has a form, with its name, in the order of the model."""
    forms = _forms_by_layer()
    found = []
    for name, module in model.named_modules():
        form = _fitting(module, forms)
        if form is not None:
            found.append((name, module, form))
    return found


def describe(name: str, layer: nn.Module, form: Form, config: Any = None) -> Site:
    """Describes a layer; gathers all the reasons against it.

    Args:
        name: of the layer in its model.
        layer: a layer.
        form: its form.
        config: configuration of the model it is in, if that has one.
    """
    causal = form.causal(layer, config) if callable(form.causal) else form.causal
    site = Site(
        name=name,
        layer=layer,
        form=form,
        dim=0,
        width=0,
        activation="",
        causal=causal,
        mlp=None,
        reasons_against=tuple(_reasons_against_maps(layer, form)),
        notes=tuple(_notes(layer, form)),
    )
    if site.reasons_against:
        return site
    mlp = weights(layer, form)
    site = dataclasses.replace(site, mlp=mlp, width=mlp.up.shape[0], dim=mlp.up.shape[1])
    activation = activations.recognise(_reach(layer, form.activation))
    if activation is None:
        what = type(_reach(layer, form.activation)).__qualname__
        reason = f"its activation ({what}) is none of {', '.join(activations.names())}"
        return dataclasses.replace(site, mlp=None, reasons_against=(reason,))
    difference = _difference(layer, form, mlp, activation)
    if difference is not None:
        reason = (
            f"its MLP computes something else than its weights and {activation} do (relative "
            f"difference {difference:.1e}): a hook, an adapter, or another kind of MLP"
        )
        return dataclasses.replace(site, mlp=None, reasons_against=(reason,))
    return dataclasses.replace(site, activation=activation)


def weights(layer: nn.Module, form: Form) -> DenseMLP:
    """The weights of a layer's MLP, where its form says they are."""
    up, up_bias = _map(layer, form.up)
    down, down_bias = _map(layer, form.down)
    if form.fused_gate:
        gate, up = up.chunk(2)
        gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
    else:
        gate, gate_bias = (None, None) if form.gate is None else _map(layer, form.gate)
    return DenseMLP(
        up=up, up_bias=up_bias, down=down, down_bias=down_bias, gate=gate, gate_bias=gate_bias
    )


def run_dense(layer: nn.Module, form: Form, x: Float[Tensor, "*batch dim"]) -> Tensor:
    """The MLP as the host computes it in the dtype of `x`, without what is done around it."""
    dtype = x.dtype
    for piece in form.pieces:
        x = _run_in(dtype, module_at(layer, piece), x)
    return x


def module_at(layer: nn.Module, path: str) -> nn.Module:
    """The module at a path below the layer."""
    found = _reach(layer, path)
    assert isinstance(found, nn.Module), f"{type(layer).__name__} has no module {path}"
    return found


def holder_of(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the child at a path, and the name it holds it by."""
    above, _, name = path.rpartition(".")
    holder = module_at(layer, above) if above else layer
    if isinstance(holder, nn.ModuleList) and name.startswith("-"):
        name = str(len(holder) + int(name))
    return holder, name


def _forms_by_layer() -> dict[str, list[Form]]:
    """The registered forms by the class of their layer, of which some have several."""
    found: dict[str, list[Form]] = {}
    for form in map(FORMS.get, FORMS.names()):
        found.setdefault(form.layer, []).append(form)
    return found


def _fitting(layer: nn.Module, by_layer: dict[str, list[Form]]) -> Form | None:
    """The first form of the layer's class whose maps are all there, else the first one."""
    forms = by_layer.get(f"{type(layer).__module__}.{type(layer).__qualname__}", [])
    for form in forms:
        if all(_reach(layer, path) is not None for path in _maps(form)):
            return form
    return forms[0] if forms else None


def _reach(layer: nn.Module, path: str) -> Any:
    found: Any = layer
    for name in path.split("."):
        if isinstance(found, nn.ModuleList) and name.lstrip("-").isdecimal():
            found = found[int(name)]
        else:
            found = getattr(found, name, None)
    return found


def _maps(form: Form) -> list[str]:
    return [path for path in (form.up, form.down, form.gate) if path is not None]


def _map(layer: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
    linear = module_at(layer, path)
    weight, bias = linear.weight, linear.bias
    with torch.enable_grad():  # a view says of itself what its parameter says: trainable or not
        return (weight.t() if is_transposed(linear) else weight), bias  # pyright: ignore


def is_transposed(linear: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers, whose weight is `[in, out]`."""
    kind = type(linear)
    return (kind.__module__, kind.__qualname__) == ("transformers.pytorch_utils", "Conv1D")


def _reasons_against_maps(layer: nn.Module, form: Form) -> list[str]:
    reasons = []
    if "forward" in vars(layer):
        reasons.append(
            "has a forward put over that of its class (a hook of accelerate, a patch), which would "
            "go past a mixture: load the model on one device, or `del layer.forward`"
        )
    kinds = {}
    for path in _maps(form):
        linear = _reach(layer, path)
        if linear is None:
            reasons.append(f"has no {path}")
        elif type(linear) is not nn.Linear and not is_transposed(linear):
            reasons.append(
                f"its {path} is a {type(linear).__qualname__}, whose weights cannot be copied as "
                f"they are (merge adapters and dequantise first)"
            )
        elif not linear.weight.is_floating_point():
            reasons.append(f"its {path} holds {linear.weight.dtype} (dequantise first)")
        elif linear.weight.is_meta and "forward" in vars(linear):
            reasons.append(f"its {path} is offloaded by accelerate; load the model without it")
        elif type(linear.weight) not in (Tensor, nn.Parameter):
            kind = type(linear.weight).__name__
            reasons.append(f"its {path} holds a {kind} (gather or dequantise it first)")
        else:
            kinds[path] = linear.weight.dtype
    if len(set(kinds.values())) > 1:
        reasons.append(f"its maps differ in dtype ({kinds}); cast the model to one")
    chunk = next(
        (
            m.chunk_size_feed_forward
            for m in (layer, _reach(layer, form.pieces[0]))
            if getattr(m, "chunk_size_feed_forward", 0)
        ),
        0,
    )
    if chunk:
        reasons.append(
            f"computes its MLP in chunks of {chunk} tokens, which are no group of tokens that "
            f"compete; set chunk_size_feed_forward=0 in its config"
        )
    return reasons


def _notes(layer: nn.Module, form: Form) -> list[str]:
    inner = None if form.inner_dropout is None else _reach(layer, form.inner_dropout)
    rate = getattr(inner, "p", 0.0)
    return [f"dropout of {rate} between the two maps is left out"] if rate else []


@torch.no_grad()
def _difference(layer: nn.Module, form: Form, mlp: DenseMLP, activation: str) -> float | None:
    """How far the MLP is from what its weights and activation give; None if it is not."""
    if mlp.up.device.type == "meta":
        return None
    generator = torch.Generator().manual_seed(0)
    # Half precision is too coarse to tell one function from another: there it is float32.
    dtype = torch.promote_types(mlp.up.dtype, torch.float32)
    x = torch.randn(1, _TOKENS, mlp.up.shape[1], generator=generator, device="cpu")
    x = x.to(mlp.up.device, dtype)
    with evaluating(layer), torch.autocast(x.device.type, enabled=False):
        found = run_dense(layer, form, x)
        wanted = compute(_mlp_in(dtype, mlp), activation, x)
    if found.shape != wanted.shape:
        return float("inf")
    difference = float((found - wanted).double().norm() / wanted.double().norm().clamp_min(1e-30))
    allowed = 100 * torch.finfo(dtype).eps  # two orders of summing `width` products
    return None if difference <= max(allowed, 1e-8) else difference


def _run_in(dtype: torch.dtype, module: nn.Module, x: Tensor) -> Tensor:
    """What a module makes of a token with its weights in another dtype; it keeps its own."""
    held = [*module.named_parameters(), *module.named_buffers()]
    other = {n: v.to(dtype) for n, v in held if v.is_floating_point() and v.dtype != dtype}
    return torch.func.functional_call(module, other, (x,)) if other else module(x)


def _mlp_in(dtype: torch.dtype, mlp: DenseMLP) -> DenseMLP:
    parts = {part.name: getattr(mlp, part.name) for part in dataclasses.fields(mlp)}
    there = {name: value.to(dtype) for name, value in parts.items() if value is not None}
    return dataclasses.replace(mlp, **there)


def compute(mlp: DenseMLP, activation: str, x: Tensor) -> Tensor:
    """What a dense MLP computes: the definition."""
    activate = activations.get(activation)
    hidden = functional.linear(x, mlp.up, mlp.up_bias)
    if mlp.gate is None:
        hidden = activate(hidden)
    else:
        hidden = activate(functional.linear(x, mlp.gate, mlp.gate_bias)) * hidden
    return functional.linear(hidden, mlp.down, mlp.down_bias)
