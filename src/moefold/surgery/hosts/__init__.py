"""Hosts: the dense models surgery knows.

A host is a kind of model: how its sites are found, how it says what was done to it, how it is
written and read. What its layers look like is said by their forms, of which there is one for each
class of layer. Hosts are named by string, so that one whose library is not installed costs nothing
until somebody asks for it.
"""

from torch import nn

from moefold.registry import Registry
from moefold.surgery.hosts import families
from moefold.surgery.hosts.base import AbstractHost, DenseMLP, Form, Site
from moefold.surgery.hosts.changes import Changes
from moefold.surgery.hosts.forms import FORMS

HOSTS: Registry[type[AbstractHost]] = Registry("host", AbstractHost)
HOSTS.register(
    "sentence-transformer",
    "moefold.surgery.hosts.sentence_transformer:SentenceTransformerHost",
    summary="a SentenceTransformer, by the transformer inside it",
)
HOSTS.register(
    "transformers",
    "moefold.surgery.hosts.transformer:TransformersHost",
    summary="a model of transformers with layers of a known form, whatever its head",
)
HOSTS.register(
    "plain",
    "moefold.surgery.hosts.plain:PlainHost",
    summary="any other module with layers of a known form: timm's, or your own",
)


def find_host(model: nn.Module) -> AbstractHost:
    """Returns the adapter of the model.

    Raises:
        ValueError: no host is of this kind; the message lists the layers that are known, and why
            one of the hosts could not be asked.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is a {type(model).__name__}; it must be a torch.nn.Module")
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            f"{type(model).__name__} is a compiled model; upcycle the model first, compile it then"
        )
    refuse_adapters(model)
    missing = []
    for name in HOSTS.names():
        try:
            host = HOSTS.get(name)()
        except ModuleNotFoundError as error:
            missing.append(f" ({name} needs {error.name}, which is not installed)")
            continue
        if host.claims(model):
            return host
    refuse_wrapped(model)  # sharded layers are of classes of their own
    raise ValueError(
        f"no host for a {type(model).__module__}.{type(model).__qualname__}: it has no layer of a "
        f"known form. There are: {', '.join(FORMS.names())}{''.join(missing)}. Pass a model that "
        f"holds such layers, or say with moefold.surgery.describe_layer where yours keep their MLP"
    )


def refuse_adapters(model: nn.Module) -> None:
    """Raises if peft's adapters are in the model, whose weights are then not all of it.

    Raises:
        ValueError: names some of the modules that peft put there, and how to merge them.
    """
    held = [
        f"{name or 'the model itself'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if type(module).__module__.partition(".")[0] == "peft"
    ]
    if held:
        raise ValueError(
            f"{type(model).__name__} carries adapters of peft: {', '.join(held[:3])}"
            f"{', ...' if len(held) > 3 else ''}; merge them first, model = "
            f"peft_model.merge_and_unload(), or take them out with peft_model.unload()"
        )


def refuse_wrapped(model: nn.Module) -> None:
    """Raises if the model is inside what has taken note of its weights, or of its code.

    Surgery would go past the wrapper: gradients of the experts would not be averaged over
    processes, say, without any error.

    Raises:
        ValueError: names the wrapper.
    """
    for name, module in model.named_modules():
        kind = type(module)
        if hasattr(module, "_orig_mod") or kind.__module__.startswith(_WRAPPERS):
            raise ValueError(
                f"{name or 'the model itself'} is wrapped in {kind.__name__}, which has taken note "
                f"of the dense weights; upcycle the model first, then wrap, shard or compile it"
            )


_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.", "deepspeed.")


def describe_layer(name: str, summary: str, form: Form) -> Form:
    """Makes a kind of layer known, so that models that hold it are hosts.

    Args:
        name: a name for the kind.
        summary: one line on what it is.
        form: where it keeps its MLP.

    Raises:
        ValueError: the name is taken.
    """
    return FORMS.register(name, form, summary=summary)


__all__ = [
    "FORMS",
    "HOSTS",
    "AbstractHost",
    "Changes",
    "DenseMLP",
    "Form",
    "Site",
    "describe_layer",
    "families",
    "find_host",
    "refuse_adapters",
    "refuse_wrapped",
]
