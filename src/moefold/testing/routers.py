"""The contract of a router, checked by one call.

    moefold.testing.check_router("expert-choice", settings={"capacity_factor": 1.5})
    moefold.testing.check_router(MyRouter)

Shapes: `batch tokens dim` in, a routing out. Sizes are small, odd and unlike each other.
"""

from collections.abc import Callable, Mapping
from typing import Any

from moefold.routers import AbstractRouter, RouterConfig
from moefold.testing import router_training as training
from moefold.testing import router_value as value
from moefold.testing.contract import Check, Report, from_seed, run
from moefold.testing.probe import RouterCase

ROUTER_CHECKS: dict[str, Check[RouterCase]] = {
    "returns a routing": value.returns_a_routing,
    "rows in order": value.rows_in_order,
    "maps are matrices": value.maps_are_matrices,
    "settles on the same rows": value.settles_on_the_same_rows,
    "relabelling experts": value.relabelling_experts,
    "permuting tokens": value.permuting_tokens,
    "reach is honest": value.reach_is_honest,
    "causality is honest": value.causality_is_honest,
    "padding gets no row": value.padding_gets_no_row,
    "padding counts nowhere": value.padding_counts_nowhere,
    "odd and empty sizes": value.odd_and_empty_sizes,
    "extreme tokens": value.extreme_tokens,
    "gradient reaches parameters": training.gradient_reaches_parameters,
    "gradient is the derivative": training.gradient_is_the_derivative,
    "forward changes nothing": training.forward_changes_nothing,
    "deterministic": training.deterministic,
    "same in training": training.same_in_training,
    "checkpointing": training.checkpointing,
    "update": training.update,
    "saved state": training.saved_state,
    "half precision": training.half_precision,
    "bad input": training.bad_input,
    "compiles": training.compiles,
}
"""Every invariant of a router by the name that messages and exceptions use."""


def check_router(
    router: str | RouterConfig | Callable[..., AbstractRouter],
    *,
    settings: Mapping[str, Any] | None = None,
    exceptions: Mapping[str, str] | None = None,
    dim: int = 7,
    num_experts: int = 5,
    ids: bool = False,
    compile: bool = False,
    device: str = "cpu",
) -> Report:
    """Run the whole contract of `ROUTER_CHECKS` on a router.

    Args:
        router: a registered name, a configuration, or a factory `(dim, num_experts) -> router`
            (a class derived from `AbstractRouter` is one).
        settings: given to the factory besides.
        exceptions: invariants that the router is known not to keep, name to reason. What it looks
            at should be declared by `reach` instead.
        dim: width of a token.
        num_experts: number of experts.
        ids: whether the router needs token ids.
        compile: also compile the router, which takes seconds.
        device: where to run it.

    Returns:
        What was checked, and what was skipped with the reason.

    Raises:
        AssertionError: an invariant does not hold; names all of them, and how.
        ValueError: unknown router, setting or exception.
    """
    settings = dict(settings or {})
    if isinstance(router, RouterConfig):
        router = RouterConfig(router.name, {**router.settings, **settings})
    elif isinstance(router, str):
        router = RouterConfig(router, settings)

    def make(dim: int, num_experts: int) -> AbstractRouter:
        if isinstance(router, RouterConfig):
            return router.build(dim, num_experts)
        return router(dim, num_experts, **settings)

    with from_seed(0):
        made = make(dim, num_experts)  # settings that do not fit raise here, by themselves
    if not isinstance(made, AbstractRouter):
        raise ValueError(
            f"the factory made a {type(made).__name__}; a router derives from "
            "moefold.routers.AbstractRouter and calls super().__init__(dim, num_experts)."
        )
    case = RouterCase(
        make=make,
        dim=dim,
        num_experts=num_experts,
        group=made.group,
        ids=ids,
        compile=compile,
        device=device,
    )
    subject = str(router) if isinstance(router, RouterConfig) else type(made).__name__
    return run(f"router {subject}", ROUTER_CHECKS, case, exceptions)
