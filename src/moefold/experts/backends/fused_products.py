"""Matrix products of the fused backend, block by block: every run of a block with its own matrix.

Shapes: `rows` of a block in, see `fused_blocks`; a matrix, or a stack of them, for every run.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import final

import torch
from torch import Tensor

from moefold.experts.backends.fused_blocks import Block, Blocks, Scratch


def gathered(block: Block, source: Tensor, tokens: Tensor, made: Tensor) -> Tensor:
    """The tokens of a block's rows in order, with zeros for the rows that pad the block.

    Args:
        block: the block.
        source: all tokens.
        tokens: of the block's rows.
        made: where they are written.
    """
    count, size = block.count, block.size
    part = made if count == size else made[:count]
    if source.dtype == made.dtype:
        torch.index_select(source, 0, tokens, out=part)
    else:
        part.copy_(source.index_select(0, tokens))
    if count < size:
        made[count:].zero_()
    return made


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
        self._biases = None if biases is None else blocks.by_run(biases.contiguous())

    def __call__(self, block: Block, x: Tensor, out: Tensor) -> None:
        """Write the layers of a block's experts at x."""
        of_run = zip(self._of(block, x), block.by_run(x), block.by_run(out), strict=True)
        for (matrix, bias), rows, made in of_run:
            if bias is None:
                _product(rows, matrix, made)
                continue
            # One operation, so that a low-precision sum is rounded once, as in functional.linear.
            add = torch.addmm if rows.ndim == 2 else torch.baddbmm
            add(bias.unsqueeze(-2), rows, matrix, out=made)

    def add_to(
        self,
        sums: Tensor,
        tokens: Tensor,
        block: Block,
        x: Tensor,
        weights: Tensor | None,
        scratch: Scratch,
    ) -> None:
        """Add the layers of a block's experts at x, each times its weight, to their tokens."""
        made = scratch("out", block.size)
        self(block, x, made)
        made = made if block.size == block.count else made[: block.count]
        if made.dtype != sums.dtype:
            made = made.to(sums.dtype) if weights is None else made * weights[:, None]
        elif weights is not None:
            made.mul_(weights[:, None])
        sums.index_add_(0, tokens, made)

    def _of(self, block: Block, like: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Matrix and bias of every run of a block, in the dtype that is computed in."""
        biases = repeat(None) if self._biases is None else block.own(self._biases)
        for matrix, bias in zip(block.own(self._matrices), biases, strict=False):
            yield in_dtype_of(matrix, like), None if bias is None else in_dtype_of(bias, like)


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
        of_run = zip(block.own(self._into), block.by_run(left), block.by_run(right), strict=True)
        for into, one, other in of_run:
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
