"""Births: how a mixture gets its first weights from the host's, as data that is saved with it."""

from moefold.surgery.births.base import (
    BIRTHS,
    ROUTER_STARTS,
    AbstractBirth,
    birth_from_dict,
    born,
)
from moefold.surgery.births.copies import Copies

BIRTHS.register("copies", Copies, summary="every expert is the dense MLP, with noise if asked for")

__all__ = ["BIRTHS", "ROUTER_STARTS", "AbstractBirth", "Copies", "birth_from_dict", "born"]
