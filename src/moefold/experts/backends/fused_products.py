"""Matrix products of the fused backend, block by block: every run of a block with its own matrix.

Shapes: `rows` of a block in, see `fused_blocks`; a matrix, or a stack of them, for every run.

Blocks that are to be multiplied by compiled code (see `ops.cpu.products`) need no gathered rows,
and their results are added to the tokens by the product itself; otherwise torch does each.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import final

import torch
from torch import Tensor

from moefold.experts.backends.fused_blocks import Block, Blocks, Scratch
from moefold.ops.cpu import products


@final
class Picked:
    """The tokens of a block's rows: gathered, or for compiled code left where they lie.

    Args:
        block: the block.
        source: all tokens.
        tokens: of the block's rows.
        scratch: where they are gathered.
        name: of the memory there.
    """

    def __init__(
        self, block: Block, source: Tensor, tokens: Tensor, scratch: Scratch, name: str
    ) -> None:
        self._block, self._source, self._tokens = block, source, tokens
        self._scratch, self._name = scratch, name
        self._rows: Tensor | None = None

    def rows(self) -> Tensor:
        """All of them in order, with zeros for the rows that pad the block."""
        if self._rows is None:
            self._rows = self._gathered()
        return self._rows

    def factors(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """For compiled code, by run: rows, or tokens and an index of the rows among them."""
        source, block = self._source, self._block
        readable = source.dtype == torch.float32 and source.stride(1) == 1
        if self._rows is not None or not readable:
            return _factors(block, self.rows())
        return zip(repeat(source), block.split(self._tokens), strict=False)

    def _gathered(self) -> Tensor:
        source, count, size = self._source, self._block.count, self._block.size
        made = self._scratch(self._name, size)
        part = made if count == size else made[:count]
        if source.dtype == made.dtype:
            torch.index_select(source, 0, self._tokens, out=part)
        else:
            part.copy_(source.index_select(0, self._tokens))
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
        self._are_vectors = matrices.shape[2] == 1

    def __call__(self, block: Block, x: Tensor | Picked, out: Tensor, scratch: Scratch) -> None:
        """Write the layers of a block's experts at x."""
        if block.compiled and not self._are_vectors:
            assert scratch.room is not None
            of_run = zip(self._of(block, out), _factors(block, x), block.by_run(out), strict=True)
            for (matrix, bias), (left, index), made in of_run:
                products.product(left, matrix, made, scratch.room, bias=bias, left_index=index)
            return
        x = x.rows() if isinstance(x, Picked) else x
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
        if block.compiled:
            assert scratch.room is not None
            of_weights = repeat(None) if weights is None else block.split(weights)
            places = zip(block.split(tokens), of_weights, strict=False)
            of_run = zip(self._of(block, x), block.by_run(x), places, strict=True)
            for (matrix, bias), rows, (index, weight) in of_run:
                products.product(
                    rows,
                    matrix,
                    sums,
                    scratch.room,
                    bias=bias,
                    scale=weight,
                    add=True,
                    out_index=index,
                )
            return
        made = scratch("out", block.size)
        self(block, x, made, scratch)
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
        self._for_compiled = into.dtype == torch.float32 and into.shape[1] > 1

    def __call__(
        self, block: Block, left: Tensor | Picked, right: Tensor | Picked, scratch: Scratch
    ) -> None:
        """Write the sums over a block: of its `[rows, left]` and its `[rows, right]`."""
        intos = block.own(self._into)
        if block.compiled and self._for_compiled:
            assert scratch.room is not None
            of_run = zip(intos, _factors(block, left), _factors(block, right), strict=True)
            for into, (one, of_one), (other, of_other) in of_run:
                products.sums(
                    one, other, into, scratch.room, left_index=of_one, right_index=of_other
                )
            return
        left, right = (x.rows() if isinstance(x, Picked) else x for x in (left, right))
        for into, one, other in zip(intos, block.by_run(left), block.by_run(right), strict=True):
            _product(one.mT, other, into)


def _factors(block: Block, x: Tensor | Picked) -> Iterator[tuple[Tensor, Tensor | None]]:
    """For compiled code, by run: rows, or tokens and an index of the rows among them."""
    return x.factors() if isinstance(x, Picked) else zip(block.by_run(x), repeat(None))


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
