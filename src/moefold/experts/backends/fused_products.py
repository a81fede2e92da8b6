"""Matrix products of the fused backend, block by block: every run of a block with its own matrix.

Shapes: `rows` of a block in, see `fused_blocks`; a matrix, or a stack of them, for every run.
"""

from typing import final

import torch
from torch import Tensor

from moefold.experts.backends.fused_blocks import Block, Blocks


@final
class Linears:
    """The linear layers of all experts, block by block.

    Args:
        blocks: the blocks.
        matrices: `[experts, in, out]`.
        biases: `[experts, out]` or None.
    """

    def __init__(self, blocks: Blocks, matrices: Tensor, biases: Tensor | None = None) -> None:
        self._matrices = blocks.by_run(matrices)
        self._biases = None if biases is None else blocks.by_run(biases.unsqueeze(1))

    def __call__(self, block: Block, x: Tensor, out: Tensor) -> None:
        """Write the layers of a block's experts at x."""
        factors = zip(block.own(self._matrices), block.by_run(x), block.by_run(out), strict=True)
        if self._biases is None:
            for matrix, rows, made in factors:
                _product(rows, in_dtype_of(matrix, x), made)
            return
        for bias, (matrix, rows, made) in zip(block.own(self._biases), factors, strict=True):
            # One operation, so that a low-precision sum is rounded once, as in functional.linear.
            add = torch.addmm if rows.ndim == 2 else torch.baddbmm
            add(in_dtype_of(bias, x), rows, in_dtype_of(matrix, x), out=made)


@final
class Sums:
    """Sums over each expert's rows of the products of two numbers of a row, block by block.

    Args:
        blocks: the blocks.
        into: `[experts, left, right]`, where they are written.
    """

    def __init__(self, blocks: Blocks, into: Tensor) -> None:
        self._into = blocks.by_run(into)

    def __call__(self, block: Block, left: Tensor, right: Tensor) -> None:
        """Write the sums over a block: of its `[rows, left]` and its `[rows, right]`."""
        factors = zip(block.own(self._into), block.by_run(left), block.by_run(right), strict=True)
        for into, one, other in factors:
            _product(one.mT, other, into)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write `left @ right`, of matrices or of batches of them, in the dtype of `out`."""
    same = out.dtype == left.dtype
    # With out=, autocast cannot change the dtype when a backward pass runs inside of it.
    made = out if same else out.new_empty(out.shape, dtype=left.dtype)
    (torch.mm if left.ndim == 2 else torch.bmm)(left, right, out=made)
    if not same:
        out.copy_(made)


def in_dtype_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Cast, where that is needed."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)
