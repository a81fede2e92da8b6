"""A layer whose MLP is a mixture of experts: the host's own forward, seen through a lens.

The mixture needs to know which tokens are real; the call of an MLP inside a host's layer says only
what they are. So the layer's own forward runs on a lens: an object that is the layer in every
respect, except that the MLP it finds there is the mixture, with the mask already given.

    layer.forward(x, attention_mask=m)  =  Host.forward(lens(layer, mlp=x -> moe(x, m)), x, ...)

Nothing is kept between two calls and nothing of a layer is written twice, so this is correct under
gradient checkpointing, `torch.compile` and both together, and follows whatever the host's library
changes around the MLP. Hooks on the layer run as ever; of modules between layer and MLP (the last
part of a T5 block) they do not.

Shapes: `batch tokens dim` hidden states.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moefold.moe import MoE, MoEConfig
from moefold.surgery.hosts.base import Form, Site
from moefold.surgery.hosts.changes import Changes
from moefold.surgery.hosts.forms import form_of, holder_of, module_at, weights
from moefold.surgery.hosts.lens import Lens, Seen, names_of_arguments, seen_class, standing_in
from moefold.surgery.hosts.masks import cache_index, is_packed, real_tokens
from moefold.surgery.hosts.past import CachedPast, past_of

MIXTURE = "moe"
"""The name of the mixture in its layer, whatever the host."""

DROPOUT = "moe_dropout"
"""The name of a dropout that belonged to the MLP and is kept."""


def install(site: Site, moe: MoE, changes: Changes) -> None:
    """Puts a mixture in the place of a layer's MLP, whose modules leave the tree."""
    layer, form = site.layer, site.form
    kept = None if form.dropout is None else module_at(layer, form.dropout)
    index = cache_index(layer)  # while the layer is whole
    base = type(layer)
    # The mixture first: undone last, it says where the model is by then, should nothing else.
    changes.replace_children(layer, **{MIXTURE: moe, DROPOUT: kept} if kept else {MIXTURE: moe})
    for piece in form.pieces:
        holder, name = holder_of(layer, piece)
        changes.replace_children(holder, **{name: None})
    changes.set_attribute(layer, "_moefold_form", form)
    changes.set_attribute(layer, "_moefold_layer_index", index)
    changes.become(layer, moe_layer(base))


def install_saved(model: nn.Module, name: str, moe: Mapping[str, Any], changes: Changes) -> None:
    """Puts a mixture as a saved file describes it, its weights still any, into a dense model.

    Raises:
        ValueError: the model has no layer of a known form at that name.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    form = None if layer is None else form_of(layer)
    if layer is None or form is None:
        what = "no module" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(
            f"the config lists the site {name!r}, where {type(model).__name__} has {what}"
        )
    mlp = weights(layer, form)
    width, dim = mlp.up.shape
    site = Site(
        name=name,
        layer=layer,
        form=form,
        dim=dim,
        width=width,
        activation=moe["activation"],
        causal=False,  # whether the router fits the host was settled when it was upcycled
        mlp=mlp,
    )
    built = MoEConfig.from_dict(moe).build(dim, site=name)
    built.to(device=mlp.up.device, dtype=mlp.up.dtype).train(layer.training)
    install(site, built, changes)


def is_moe_layer(module: nn.Module) -> bool:
    """Whether surgery made the module what it is."""
    return issubclass(type(module), Seen) and MIXTURE in module._modules


@functools.cache
def moe_layer(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer of the given class with a mixture in it; see `seen_class`."""
    names = names_of_arguments(base)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        given.update(kwargs)
        form: Form = self._moefold_form  # pyright: ignore
        hidden, told, mask = given[names[0]], None, None
        index: int = self._moefold_layer_index  # pyright: ignore
        cache = given.get(form.cache) if form.cache else None
        if form.mask is not None:
            told = given.get(form.mask)
            mask = real_tokens(told, hidden, cache, index)
        refuse_packed(self, given, told, mask)
        moe: MoE = getattr(self, MIXTURE)
        past = past_of(moe.own_router, cache, index, moe.site)
        return base.forward(_through_lens(self, form, mask, past), *args, **kwargs)

    return seen_class(base, forward, moe_layer)


def refuse_packed(
    layer: nn.Module, given: Mapping[str, Any], told: object, real: Tensor | None
) -> None:
    """Raises if rows of the batch hold several sequences and the router would mix them.

    On a GPU and in a compiled graph what a mask says of it is checked without waiting for the
    device: it fails there, as a RuntimeError with the same text, when the device comes to it.

    Args:
        layer: a layer with a mixture.
        given: the arguments of its forward pass.
        told: the attention mask among them.
        real: which tokens are real, as the mask says it.

    Raises:
        ValueError: names the layer, and what to do.
    """
    moe = getattr(layer, MIXTURE)
    router = moe.own_router
    # Where all tokens of a batch compete, it does not matter which row they are in.
    reach = None if router is None else router.reach_now
    if router is None or reach == "token" or (router.group == "batch" and reach != "past"):
        return
    message = (
        f"{moe.site}: the batch is packed, several sequences in a row, and a router that reaches "
        f"the {reach} would mix them; give each sequence a row of its own and pad it "
        f"(SentenceTransformer: model[0].unpad_inputs = False)"
    )
    if given.get("cu_seq_lens_q") is not None:
        raise ValueError(message)
    packed = is_packed(told, given.get("position_ids"), real)
    if packed is None:
        return
    if torch.compiler.is_compiling() or packed.device.type in ("cuda", "meta"):
        torch._assert_async(~packed, message)  # pyright: ignore[reportPrivateImportUsage]
    elif packed:
        raise ValueError(message)


def _through_lens(
    layer: nn.Module, form: Form, mask: Tensor | None, past: CachedPast | None
) -> Lens:
    moe = getattr(layer, MIXTURE)
    dropout = getattr(layer, DROPOUT, None)

    def mixture(x: Tensor) -> Tensor:
        mixed = moe(x, mask) if past is None else moe(x, mask, past=past)
        return mixed if dropout is None else dropout(mixed)

    stand_ins: dict[str, Any] = {}
    for piece in form.pieces:
        stand_in = mixture if piece == form.pieces[0] else _same
        name, *rest = piece.split(".")
        stand_ins[name] = standing_in(getattr(layer, name, None), rest, stand_in)
    return Lens(layer, stand_ins)


def _same(x: Tensor) -> Tensor:
    return x
