"""Contract suites: all that a router, a backend, a layer or a host must keep, by one call each.

    moefold.testing.check_router(MyRouter)              an AssertionError lists what is broken
    moefold.testing.check_backend("grouped")
    moefold.testing.check_layer(moefold.MoEConfig(router="expert-choice"))
    moefold.testing.check_host(model, inputs)

Registered members are run through them by moefold's own tests; these functions are for yours.
"""

from moefold.testing.backends import BACKEND_CHECKS, check_backend
from moefold.testing.contract import Report, without_a_case
from moefold.testing.hosts import HOST_CHECKS, check_host
from moefold.testing.layers import LAYER_CHECKS, check_layer
from moefold.testing.mixers import MIX_CHECKS
from moefold.testing.routers import ROUTER_CHECKS, check_router

__all__ = [
    "BACKEND_CHECKS",
    "HOST_CHECKS",
    "LAYER_CHECKS",
    "MIX_CHECKS",
    "ROUTER_CHECKS",
    "Report",
    "check_backend",
    "check_host",
    "check_layer",
    "check_router",
    "without_a_case",
]
