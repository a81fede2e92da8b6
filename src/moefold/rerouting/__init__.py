"""Rerouting: another router in a pretrained mixture of experts, without training."""

from moefold.rerouting.blocks import Block, find_blocks
from moefold.rerouting.calibrate import Calibration, calibrate
from moefold.rerouting.reroute import Rerouting, causal_routers, recipes, reroute

__all__ = [
    "Block",
    "Calibration",
    "Rerouting",
    "calibrate",
    "causal_routers",
    "find_blocks",
    "recipes",
    "reroute",
]
