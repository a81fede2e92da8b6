"""The contract of a host, checked by one call.

    moefold.testing.check_host(model, {"input_ids": ids, "attention_mask": mask})

The model is copied to float64 and left as it is. Give it weights of some size (a standard deviation
of 0.3, say, at a width of 16): every MLP must matter to what it returns.

Shapes: a mask is `batch tokens`, True or 1 for real tokens.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from moefold.testing import host_inputs, host_surgery
from moefold.testing.contract import Check, Report, run
from moefold.testing.host_probe import (
    HostCase,
    MaskOf,
    Padding,
    host_case,
    pad_left,
    pad_right,
    usual_mask,
)

HOST_CHECKS: dict[str, Check[HostCase]] = {
    "plan touches nothing": host_surgery.plan_touches_nothing,
    "function is kept as declared": host_surgery.function_is_kept_as_declared,
    "every mixture matters": host_surgery.every_mixture_matters,
    "revert is exact": host_surgery.revert_is_exact,
    "revert after training": host_surgery.revert_after_training,
    "all or nothing": host_surgery.all_or_nothing,
    "second surgery": host_surgery.second_surgery,
    "saved form": host_surgery.saved_form,
    "copies": host_surgery.copies,
    "causality": host_inputs.causality,
    "padding is in no routing": host_inputs.padding_is_in_no_routing,
    "padding further": host_inputs.padding_further,
    "checkpointing": host_inputs.checkpointing,
}
"""Every invariant of a host by the name that messages and exceptions use."""


def check_host(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    paddings: Mapping[str, Padding] | None = None,
    mask_of: MaskOf = usual_mask,
    exceptions: Mapping[str, str] | None = None,
) -> Report:
    """Run the whole contract of `HOST_CHECKS` on a dense model.

    Args:
        model: a small dense model that some host claims; it is not changed.
        inputs: arguments of its forward pass, floating-point ones in float64; with padding in
            them, if it takes a mask.
        paddings: ways to pad the inputs further, name to a function of inputs and a number; None
            for `pad_right` where there is a mask.
        mask_of: the mask that a site must see, by the site's name and the inputs; for the name ""
            that of the output. None: all tokens are real.
        exceptions: invariants that the host is known not to keep, name to reason.

    Returns:
        What was checked, and what was skipped with the reason.

    Raises:
        AssertionError: an invariant does not hold; names all of them, and how.
        ValueError: unknown exception, or no host claims the model.
    """
    case = host_case(model, inputs, paddings, mask_of)
    return run(f"host {type(model).__name__}", HOST_CHECKS, case, exceptions)


__all__ = ["HOST_CHECKS", "MaskOf", "Padding", "check_host", "pad_left", "pad_right", "usual_mask"]
