"""Births: how a mixture gets its first weights from the host's, as data that is saved with it."""

from moefold.surgery.births.base import (
    BIRTHS,
    ROUTER_STARTS,
    AbstractBirth,
    birth_from_dict,
    born,
)
from moefold.surgery.births.copies import Copies
from moefold.surgery.births.drop import DropUpcycle
from moefold.surgery.births.fine_tunes import FromFineTunes
from moefold.surgery.births.groups import VirtualGroups
from moefold.surgery.births.scratch import FromScratch
from moefold.surgery.births.split import Split

BIRTHS.register("copies", Copies, summary="every expert is the dense MLP, with noise if asked for")
BIRTHS.register(
    "drop-upcycle", DropUpcycle, summary="copies, a part of whose neurons is drawn anew"
)
BIRTHS.register("split", Split, summary="every expert is a part of the dense MLP")
BIRTHS.register(
    "virtual-groups", VirtualGroups, summary="parts of the dense MLP, chosen in complete groups"
)
BIRTHS.register("fine-tunes", FromFineTunes, summary="every expert is the MLP of another fine-tune")
BIRTHS.register("random", FromScratch, summary="every expert is random: the baseline")

__all__ = [
    "BIRTHS",
    "ROUTER_STARTS",
    "AbstractBirth",
    "Copies",
    "DropUpcycle",
    "FromFineTunes",
    "FromScratch",
    "Split",
    "VirtualGroups",
    "birth_from_dict",
    "born",
]
