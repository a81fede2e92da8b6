"""Modes of a model, put back as they were found."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from moefold.routers import AbstractRouter


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def competing(model: nn.Module, *, untaught_only: bool = False) -> Iterator[None]:
    """Routers with an inference rule let the group choose, as in training.

    For embeddings of whole texts, where seeing later tokens does no harm.

    Args:
        model: a model, or a router.
        untaught_only: only those whose rule has to be taught first and was not: for what is
            measured before any training.
    """
    routers = [
        module
        for module in model.modules()
        if isinstance(module, AbstractRouter) and not (untaught_only and module.is_taught)
    ]
    before = [router.competes for router in routers]
    for router in routers:
        router.competes = True
    try:
        yield
    finally:
        for router, mode in zip(routers, before, strict=True):
            router.competes = mode
