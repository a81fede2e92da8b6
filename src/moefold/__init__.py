"""moefold folds experts into the model people already have.

One idea carries the library: a router returns a *routing*, two linear maps, tokens to rows and rows
to tokens. Experts only ever see rows.

    moefold.MoEConfig(num_experts=8, router="expert-choice").build(dim=384)    a layer
    moefold.routers.names()                                                    every router
    moefold.record_routing(model)                                              who chose whom
    moefold.plan / upcycle / revert / save / load                              surgery on a model
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moefold import losses, metrics, routers, routing
from moefold.auto_classes import register_when_possible
from moefold.experts import Experts
from moefold.moe import MoE, MoEConfig, name_sites, set_loss_scale
from moefold.record import Record, record_routing

if TYPE_CHECKING:
    from moefold import preference, testing
    from moefold.inspect.leakage import leakage
    from moefold.rerouting import calibrate, load, reroute, save
    from moefold.surgery import (
        Copies,
        DropUpcycle,
        Form,
        FromFineTunes,
        FromScratch,
        Plan,
        Receipt,
        Split,
        UpcycleConfig,
        VirtualGroups,
        carry_optimizer,
        describe_layer,
        export,
        lineage,
        lora_targets,
        plan,
        revert,
        upcycle,
        upcycle_folder,
    )

register_when_possible()

# Reached when first asked for: surgery and testing know other people's models.
_LATER = {
    "Copies": "moefold.surgery",
    "DropUpcycle": "moefold.surgery",
    "Form": "moefold.surgery",
    "FromFineTunes": "moefold.surgery",
    "FromScratch": "moefold.surgery",
    "Plan": "moefold.surgery",
    "Receipt": "moefold.surgery",
    "Split": "moefold.surgery",
    "UpcycleConfig": "moefold.surgery",
    "VirtualGroups": "moefold.surgery",
    "calibrate": "moefold.rerouting",
    "carry_optimizer": "moefold.surgery",
    "describe_layer": "moefold.surgery",
    "export": "moefold.surgery",
    "leakage": "moefold.inspect.leakage",
    "lineage": "moefold.surgery",
    "load": "moefold.rerouting",
    "lora_targets": "moefold.surgery",
    "plan": "moefold.surgery",
    "reroute": "moefold.rerouting",
    "revert": "moefold.surgery",
    "save": "moefold.rerouting",
    "upcycle": "moefold.surgery",
    "upcycle_folder": "moefold.surgery",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name in ("preference", "testing"):
        return import_module(f"moefold.{name}")
    raise AttributeError(f"module 'moefold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Copies",
    "DropUpcycle",
    "Experts",
    "Form",
    "FromFineTunes",
    "FromScratch",
    "MoE",
    "MoEConfig",
    "Plan",
    "Receipt",
    "Record",
    "Split",
    "UpcycleConfig",
    "VirtualGroups",
    "calibrate",
    "carry_optimizer",
    "describe_layer",
    "export",
    "leakage",
    "lineage",
    "load",
    "lora_targets",
    "losses",
    "metrics",
    "name_sites",
    "plan",
    "preference",
    "record_routing",
    "reroute",
    "revert",
    "routers",
    "routing",
    "save",
    "set_loss_scale",
    "testing",
    "upcycle",
    "upcycle_folder",
]
