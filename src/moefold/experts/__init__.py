"""Experts: stacked MLPs, and the backends that compute them on rows.

Shapes: `rows dim` in and out.
"""

from moefold.experts.backends import backends, choose_backend, explain_backends
from moefold.experts.experts import Experts

__all__ = ["Experts", "backends", "choose_backend", "explain_backends"]
