"""Experts: stacked parameters, and the backends that compute them on rows sorted by expert.

Shapes: `rows dim` in and out, see `experts.backends.base`.
"""

from moefold.experts.backends import (
    AbstractBackend,
    AbstractMixer,
    ExpertWeights,
    Verdict,
    backends,
    choose_backend,
    explain_backends,
)
from moefold.experts.experts import Experts

__all__ = [
    "AbstractBackend",
    "AbstractMixer",
    "ExpertWeights",
    "Experts",
    "Verdict",
    "backends",
    "choose_backend",
    "explain_backends",
]
