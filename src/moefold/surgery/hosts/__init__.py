"""Hosts: the dense models surgery knows, each with an adapter that describes its own geometry.

Adapters are named by string, so that a host whose library is not installed costs nothing until
somebody asks for it.
"""

from torch import nn

from moefold.registry import Registry
from moefold.surgery.hosts.base import AbstractHost, Changes, DenseMLP, Site

HOSTS: Registry[type[AbstractHost]] = Registry("host", AbstractHost)
HOSTS.register(
    "bert",
    "moefold.surgery.hosts.bert:BertHost",
    summary="BERT of transformers, bare or with one of its usual heads",
)
HOSTS.register(
    "sentence-transformer",
    "moefold.surgery.hosts.sentence_transformer:SentenceTransformerHost",
    summary="a SentenceTransformer, by the transformers inside it",
)


def find_host(model: nn.Module) -> AbstractHost:
    """Returns the adapter of the model.

    Raises:
        ValueError: no host is of this kind; the message lists those there are, and why one of them
            could not be asked.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is a {type(model).__name__}; it must be a torch.nn.Module")
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            f"{type(model).__name__} is a compiled model; upcycle the model first, compile it then"
        )
    missing = []
    for name in HOSTS.names():
        try:
            host = HOSTS.get(name)()
        except ModuleNotFoundError as error:
            missing.append(f" ({name} needs {error.name}, which is not installed)")
            continue
        if host.claims(model):
            return host
    raise ValueError(
        f"no host for a {type(model).__module__}.{type(model).__qualname__}; there are: "
        f"{', '.join(HOSTS.names())}{''.join(missing)}. Pass such a model, not a wrapper of it"
    )


__all__ = ["HOSTS", "AbstractHost", "Changes", "DenseMLP", "Site", "find_host"]
