"""The contract of a layer: a router, experts and what rides on them, put together.

    moefold.testing.check_layer(moefold.MoEConfig(router=..., gated=True, shared_width=16))

Shapes: `batch tokens dim` in and out.
"""

from collections.abc import Mapping

from moefold.moe import MoEConfig
from moefold.testing import layer_training as training
from moefold.testing import layer_value as value
from moefold.testing.contract import Check, Report, run
from moefold.testing.layer_probe import LayerCase, layer_case

LAYER_CHECKS: dict[str, Check[LayerCase]] = {
    "definition": value.equals_definition,
    "copies are one MLP": value.equals_one_mlp,
    "dense ensemble": value.equals_dense_ensemble,
    "padding": value.padding,
    "any rank": value.any_rank,
    "odd and empty sizes": value.odd_and_empty_sizes,
    "checkpointing": training.checkpointing,
    "losses ride": training.losses_ride,
    "losses ride in training only": training.losses_ride_in_training_only,
    "autocast": value.autocast,
    "half precision": value.half_precision,
    "every backend": value.every_backend,
    "forward changes nothing": training.forward_changes_nothing,
    "copies and saved state": training.copies_and_saved_state,
    "config as data": training.config_as_data,
    "bad input": value.bad_input,
    "compiles": training.compiles,
}
"""Every invariant of a layer by the name that messages and exceptions use."""


def check_layer(
    config: MoEConfig,
    *,
    exceptions: Mapping[str, str] | None = None,
    dim: int = 7,
    ids: bool = False,
    compile: bool = False,
    device: str = "cpu",
) -> Report:
    """Run the whole contract of `LAYER_CHECKS` on the layer that a configuration builds.

    Args:
        config: the layer. Few experts of small width keep it quick.
        exceptions: invariants it is known not to keep, name to reason.
        dim: width of a token.
        ids: whether its router needs token ids.
        compile: also compile it, which takes seconds.
        device: where to run it.

    Returns:
        What was checked, and what was skipped with the reason.

    Raises:
        AssertionError: an invariant does not hold; names all of them, and how.
        ValueError: unknown exception, or the configuration cannot be built.
    """
    case = layer_case(config, dim=dim, ids=ids, compile=compile, device=device)
    return run(f"layer with router {config.router}", LAYER_CHECKS, case, exceptions)
