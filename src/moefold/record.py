"""See the routings of a model without changing it.

    with moefold.record_routing(model) as record:
        model(x)
    record.loss(balance=0.01), record.metrics(), record["layers.3.mlp"]

A layer hands its routing over to whoever listens; it keeps none itself. This is not a forward hook,
because hooks added after `torch.compile` are ignored without a word. Passes that activation
checkpointing repeats during backward are not recorded twice; where checkpointing is compiled with
the layer, torch wants to be told that this is meant:

    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moefold.losses import losses
from moefold.metrics import metrics
from moefold.output_losses import output_losses
from moefold.routers import AbstractRouter
from moefold.routing import Routing


@final
class Heard:
    """The routings of one layer, as a chain with the newest first.

    Not a list: torch.compile guards on the length of a list that it has seen grow, so that it would
    compile anew at every pass, and give up after the eighth.
    """

    def __init__(self) -> None:
        self.last: tuple[Any, ...] = ()

    def add(self, routing: Routing) -> None:
        """Append a routing."""
        self.last = (routing, self.last)

    def all(self) -> list[Routing]:
        """Every routing, the oldest first."""
        found, rest = [], self.last
        while rest:
            routing, rest = rest
            found.append(routing)
        return found[::-1]


class AbstractRouted(nn.Module):
    """A layer with a router whose routings can be recorded.

    Attributes:
        router: the router.
        sinks: who wants every routing of this layer; opened and closed by `record_routing`.
    """

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.sinks: tuple[Heard, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # A copy made while a record is open is another layer: nobody listens to it.
        return {**self.__dict__, "sinks": ()}

    @property
    def own_router(self) -> AbstractRouter | None:
        """The router without what another library wrapped around it, as peft does with adapters.

        Where peft trains a copy beside the original, the copy: it comes later and is the one that
        routes. None for a router of another kind.
        """
        found = _routers_in(self.router)
        return found[-1] if found else None

    def hand_over(self, routing: Routing) -> None:
        """Give the routing of this forward pass to whoever listens."""
        if self.sinks and not _in_backward():
            for sink in self.sinks:
                sink.add(routing)


@final
class Record(Mapping[str, list[Routing]]):
    """Routings by site: a list for each MoE layer, with an entry for each forward pass so far.

    Attributes:
        heard: where the layers write, by site.
    """

    def __init__(self, layers: dict[str, AbstractRouted]) -> None:
        self._layers = layers
        self.heard = {site: Heard() for site in layers}

    def __getitem__(self, site: str) -> list[Routing]:
        if site not in self.heard:
            raise KeyError(f"no MoE layer at {site!r}; layers: {', '.join(self.heard)}")
        return self.heard[site].all()

    def __iter__(self) -> Iterator[str]:
        return iter(self.heard)

    def __len__(self) -> int:
        return len(self.heard)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the MoE layers."""
        return tuple(self.heard)

    def loss(self, **coefficients: float) -> Float[Tensor, ""]:
        """Weighted sum of auxiliary losses: mean over forward passes, sum over sites.

        Use it where losses do not ride on the graph: both together would count them twice. Under
        reentrant activation checkpointing the routing that is recorded has no gradient, nor has
        this loss: use `use_reentrant=False`, or let the losses ride.

        Args:
            **coefficients: by loss name, `_` for `-`: `loss(balance=0.01, z=0.001)`.

        Raises:
            ValueError: an unknown loss, or one of the experts' results.
        """
        total = torch.zeros(())
        for name, coefficient in coefficients.items():
            name = name.replace("_", "-")
            if name not in losses and name in output_losses:
                raise ValueError(
                    f"loss {name!r} needs the experts' results, which a record does not hold; name "
                    f"it in the layer, MoEConfig(losses={{{name!r}: {coefficient}}}), and it rides."
                )
            function = losses.get(name)
            for routings in self.values():
                if routings:
                    value = torch.stack([function(routing) for routing in routings]).mean()
                    total = total.to(value.device) + coefficient * value
        return total

    def metrics(self) -> dict[str, dict[str, float]]:
        """Every scalar metric by site, averaged over forward passes."""
        out = {}
        for site, routings in self.items():
            each = [metrics(routing) for routing in routings]
            names = each[0] if each else ()
            out[site] = {name: sum(one[name] for one in each) / len(each) for name in names}
        return out

    def update(self) -> None:
        """Adapt biases, thresholds and penalties to what was recorded; once an optimiser step."""
        for site, layer in self._layers.items():
            routings, router = self[site], layer.own_router
            if router is not None and routings:
                router.update(routings)

    def clear(self) -> None:
        """Forget the routings so far, and the memory their graphs hold."""
        for heard in self.heard.values():
            heard.last = ()


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Record]:
    """Record the routings of every MoE layer in `model` while the context is open.

    Records may be nested; each gets every routing.

    Raises:
        ValueError: the model has no MoE layer.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, AbstractRouted)
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoE layer to record; upcycle it first, or pass the "
            "model that holds the layers."
        )
    record = Record(layers)
    for site, layer in layers.items():
        layer.sinks = (*layer.sinks, record.heard[site])
    try:
        yield record
    finally:
        for site, layer in layers.items():
            layer.sinks = tuple(sink for sink in layer.sinks if sink is not record.heard[site])


def _routers_in(module: nn.Module) -> list[AbstractRouter]:
    """The routers in a module, but none that is part of another router."""
    if isinstance(module, AbstractRouter):
        return [module]
    return [router for child in module.children() for router in _routers_in(child)]


def _in_backward() -> bool:
    """Whether autograd is running: then a forward pass can only be a recomputation."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1
