"""When compiled code may stand in for operations of torch: what it reads must be all there is.

Shapes: tensors of any `shape`.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def has_a_mode() -> bool:
    """Whether a mode wants to see every operator, of which it may be shown one of our own."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_forward_mode() -> bool:
    """Whether derivatives are computed along with results."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether what is computed is to become something else: a graph, a derivative, a batch."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch._C._get_tracing_state() is not None
        or is_forward_mode()
    )


def hides_its_memory(tensor: Tensor) -> bool:
    """Whether its memory does not hold its numbers.

    The dispatcher writes a lazy tensor out, and knows what a subclass is made of, or a batch of
    gradients.
    """
    lazy = tensor.is_neg() or tensor._is_zerotensor()  # pyright: ignore[reportAttributeAccessIssue]
    is_its_own = type(tensor) in (Tensor, nn.Parameter) and torch._C._has_storage(tensor)
    return lazy or not is_its_own
