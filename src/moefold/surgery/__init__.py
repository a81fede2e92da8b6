"""Surgery: some MLPs of a dense model, the host, become mixtures of experts.

config = moefold.UpcycleConfig(sites="every-other")
print(moefold.plan(model, config))       # nothing is touched
moefold.upcycle(model, config)           # in place, all or nothing
moefold.save(model, "folder")            # JSON and safetensors
model = moefold.load("folder")
moefold.revert(model)                    # the object that was upcycled, not a loaded one
"""

from moefold.surgery.births import Copies
from moefold.surgery.config import UpcycleConfig
from moefold.surgery.encoder import pretrained_encoder
from moefold.surgery.hosts import Form, describe_layer
from moefold.surgery.plan import Plan, plan
from moefold.surgery.receipt import Receipt
from moefold.surgery.saved import load, save
from moefold.surgery.upcycle import revert, upcycle

__all__ = [
    "Copies",
    "Form",
    "Plan",
    "Receipt",
    "UpcycleConfig",
    "describe_layer",
    "load",
    "plan",
    "pretrained_encoder",
    "revert",
    "save",
    "upcycle",
]
