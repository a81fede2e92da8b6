"""Hidden rows of a block, and all that the backward pass makes of them number by number.

Shapes: `rows width` of a block, see `fused_blocks`; `first` is the width, or twice that if gated.
See `fused_ops` for the formulas. By torch's operations, one after another, or by compiled code
(`ops.cpu.experts`) in one pass over the rows.
"""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from moefold.experts.backends.fused_blocks import Blocks, Scratch
from moefold.ops.cpu import experts

_aten = torch.ops.aten

# name: (act(x, out), its derivative at x times grad, into out). Without autograd: these run inside
# of an operator.
WRITTEN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "gelu": (
        lambda x, out: _aten.gelu.out(x, out=out),
        lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, grad_input=out),
    ),
    "gelu_tanh": (
        lambda x, out: _aten.gelu.out(x, approximate="tanh", out=out),
        lambda grad, x, out: _aten.gelu_backward.grad_input(
            grad, x, approximate="tanh", grad_input=out
        ),
    ),
    "relu": (
        lambda x, out: _aten.relu.out(x, out=out),
        lambda grad, x, out: _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
    ),
    "silu": (
        lambda x, out: _aten.silu.out(x, out=out),
        lambda grad, x, out: _aten.silu_backward.grad_input(grad, x, grad_input=out),
    ),
}
"""Activations whose derivative is written here."""


@final
class Half:
    """One half of the first product, as the backward pass gets it, block by block.

    It may be kept in fewer bytes than are computed in: then it is computed elsewhere.

    Args:
        name: `pre` or `value`; what its scratch memory is called.
        blocks: the blocks.
        kept: of all their rows, padded; None if nobody keeps it.
        like: of the dtype that is computed in.
    """

    def __init__(self, name: str, blocks: Blocks, kept: Tensor | None, like: Tensor) -> None:
        self._name, self._blocks = name, blocks
        kept_blocks = None if kept is None else blocks.padded(kept)
        in_place = kept is not None and kept.dtype == like.dtype
        self._places = kept_blocks if in_place else None
        self._copies = None if in_place else kept_blocks

    def widths(self, width: int) -> dict[str, int]:
        """What it uses of the scratch memory, by name."""
        return {self._name: width} if self._places is None else {}

    def memory(self, i: int, scratch: Scratch) -> Tensor:
        """Where it is computed for a block."""
        if self._places is None:
            return scratch(self._name, self._blocks[i].size)
        return self._places[i]

    def keep(self, i: int, made: Tensor) -> None:
        """Keep what was computed for a block."""
        if self._copies is not None:
            self._copies[i].copy_(made)

    def read(self, i: int, scratch: Scratch) -> Tensor:
        """What was kept of a block."""
        memory = self.memory(i, scratch)
        if self._copies is not None:
            memory.copy_(self._copies[i])
        return memory


@final
class Hidden:
    """Hidden rows from both halves of the first product.

    Args:
        activation: a name of `WRITTEN`.
        compiled: whether compiled code computes them; that is for float32 without padding.
    """

    def __init__(self, activation: str, *, compiled: bool) -> None:
        self._name, self._compiled = activation, compiled

    def __call__(self, pre: Tensor, value: Tensor | None, out: Tensor) -> None:
        """Write `act(pre) * value`, or `act(pre)` if there is no value."""
        if self._compiled:
            experts.activate(self._name, pre, value, out)
            return
        WRITTEN[self._name][0](pre, out=out)
        if value is not None:
            out.mul_(value)

    def widths(self, width: int, *, gated: bool, for_weight: bool) -> dict[str, int]:
        """What of the scratch memory `differentiate` uses, by name."""
        if self._compiled:
            return {}
        return ({"activated": width} if gated else {}) | ({"products": width} if for_weight else {})

    def differentiate(
        self,
        pre: Tensor,
        value: Tensor | None,
        hidden: Tensor,
        scratch: Scratch,
        *,
        weight: Tensor | None,
        of_hidden: Tensor | None,
        of_first: Tensor | None,
        of_weight: Tensor | None,
    ) -> None:
        """Write hidden rows, each times its weight, and gradients.

        Args:
            pre: the gate's half of the first product.
            value: the other half, if gated.
            hidden: where hidden rows go.
            scratch: memory, see `widths`.
            weight: `[rows, 1]`, 0 where rows pad the block; None for 1.
            of_hidden: the gradient at hidden rows of weight 1, overwritten; None where nothing
                that depends on it is wanted.
            of_first: `[rows, first]`, where that of the first product goes; `of_hidden` itself if
                there is no value. None if it is not wanted.
            of_weight: `[rows that do not pad]`, where that of the weights goes; None likewise.
        """
        if self._compiled:
            experts.differentiate(
                self._name,
                pre,
                value,
                hidden,
                weights=weight,
                of_hidden=of_hidden,
                of_first=of_first,
                of_weights=of_weight,
            )
            return
        (activate, derivative), (size, width) = WRITTEN[self._name], pre.shape
        activated = hidden
        if value is None:
            activate(pre, out=hidden)
        else:
            activated = activate(pre, out=scratch("activated", size))
            torch.mul(activated, value, out=hidden)
        if of_weight is not None:
            assert of_hidden is not None
            both = torch.mul(of_hidden, hidden, out=scratch("products", size))
            both = both[: of_weight.shape[0]]
            torch.sum(both, 1, dtype=of_weight.dtype, out=of_weight)
        if weight is not None:
            hidden.mul_(weight)
        if of_first is None:
            return
        assert of_hidden is not None
        if weight is not None:
            of_hidden.mul_(weight)
        if value is not None:
            torch.mul(of_hidden, activated, out=of_first[:, width:])
            of_hidden.mul_(value)
        derivative(of_hidden, pre, out=of_first[:, :width])
