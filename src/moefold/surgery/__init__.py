"""Surgery: some MLPs of a dense model, the host, become mixtures of experts.

config = moefold.UpcycleConfig(sites="every-other")
print(moefold.plan(model, config))       # nothing is touched
moefold.upcycle(model, config)           # in place, all or nothing
moefold.save(model, "folder")            # JSON and safetensors
model = moefold.load("folder")
moefold.revert(model, dense)             # one that was upcycled just now needs no `dense`
"""

from moefold.surgery.births import (
    Copies,
    DropUpcycle,
    FromFineTunes,
    FromScratch,
    Split,
    VirtualGroups,
)
from moefold.surgery.config import UpcycleConfig
from moefold.surgery.encoder import pretrained_encoder
from moefold.surgery.export import export
from moefold.surgery.hosts import Form, describe_layer
from moefold.surgery.lineage import lineage
from moefold.surgery.lora import lora_targets
from moefold.surgery.optimizer import Carried, carry_optimizer
from moefold.surgery.plan import Plan, plan
from moefold.surgery.receipt import Receipt
from moefold.surgery.saved import load, save
from moefold.surgery.schedule import inverse_square_root, warn_if_cooled_down
from moefold.surgery.stream import upcycle_folder
from moefold.surgery.upcycle import revert, upcycle

__all__ = [
    "Carried",
    "Copies",
    "DropUpcycle",
    "Form",
    "FromFineTunes",
    "FromScratch",
    "Plan",
    "Receipt",
    "Split",
    "UpcycleConfig",
    "VirtualGroups",
    "carry_optimizer",
    "describe_layer",
    "export",
    "inverse_square_root",
    "lineage",
    "load",
    "lora_targets",
    "plan",
    "pretrained_encoder",
    "revert",
    "save",
    "upcycle",
    "upcycle_folder",
    "warn_if_cooled_down",
]
