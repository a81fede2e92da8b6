"""Rerouting: another router in a pretrained mixture of experts, without training."""

from moefold.rerouting.blocks import Block, find_blocks
from moefold.rerouting.calibrate import Calibration, calibrate
from moefold.rerouting.reroute import (
    Rerouting,
    recipes,
    reroute,
    rerouting_of,
)
from moefold.rerouting.saved import load, load_rerouted, save, save_rerouted

__all__ = [
    "Block",
    "Calibration",
    "Rerouting",
    "calibrate",
    "find_blocks",
    "load",
    "load_rerouted",
    "recipes",
    "reroute",
    "rerouting_of",
    "save",
    "save_rerouted",
]
