"""The main job: a real encoder becomes a mixture of experts and is trained beside its twin."""

from moefold.demo.run import run
from moefold.demo.settings import DemoSettings, default, full, quick

__all__ = ["DemoSettings", "default", "full", "quick", "run"]
