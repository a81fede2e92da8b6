"""Blocks of rows, and memory for one of them at a time; what the fused backend loops over.

Shapes: `rows` are sorted by expert. A block is the rows of one expert, or of several that follow
each other and have equally many (as all have under expert choice), whose products are then one
batched product.

    rows_per_expert   4 | 4 | 0 | 3 | 4        blocks   experts 0 and 1 | expert 3 | expert 4
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from moefold.ops.grouped import padded, too_few_rows

MERGED_ROWS = 1024
"""A block of several experts has no more rows: so many, and what is made of them, fit in cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The rows of one expert, or of several that follow each other and have equally many.

    Attributes:
        first: the first of its experts.
        experts: how many they are.
        count: rows of all of them.
        size: the same with the rows that pad it, see `ops.grouped.padded`.
    """

    first: int
    experts: int
    count: int
    size: int

    def each(self, rows: Tensor) -> Tensor:
        """Rows of the block as a factor: `[rows, width]`, or `[experts, rows of each, width]`."""
        return rows if self.experts == 1 else rows.unflatten(0, (self.experts, -1))

    def of(self, stack: Tensor) -> Tensor:
        """What a stack by expert holds for the block, to go with `each`."""
        if self.experts == 1:
            return stack[self.first]
        return stack.narrow(0, self.first, self.experts)


@final
class Blocks:
    """All blocks in order, and views of tensors by block.

    An operation from Python takes some microseconds, which adds up over dozens of experts: views
    are made all at once, and of experts with rows only where these are few.
    """

    def __init__(self, rows_per_expert: Tensor, rows: int, like: Tensor) -> None:
        counts = rows_per_expert.tolist()
        if sum(counts) > rows:
            raise ValueError(too_few_rows(sum(counts), rows))
        self._experts, self._rows = len(counts), rows
        self._blocks: list[Block] = []
        for expert, count in enumerate(counts):
            if count:
                self._append(expert, count, padded(count, like))

    def _append(self, expert: int, count: int, size: int) -> None:
        last = self._blocks[-1] if self._blocks else None
        joins = (
            last is not None
            and last.first + last.experts == expert
            and last.count == last.size == last.experts * count
            and size == count
            and last.size + size <= MERGED_ROWS
        )
        if last is None or not joins:
            self._blocks.append(Block(first=expert, experts=1, count=count, size=size))
            return
        self._blocks[-1] = Block(
            first=last.first,
            experts=last.experts + 1,
            count=last.count + count,
            size=last.size + size,
        )

    def __iter__(self):
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def largest(self) -> int:
        """Rows of the largest block."""
        return max((block.size for block in self._blocks), default=0)

    @property
    def size(self) -> int:
        """Rows of all blocks, with those that pad them."""
        return sum(block.size for block in self._blocks)

    @property
    def is_padded(self) -> bool:
        """Whether any block has rows that pad it."""
        return any(block.size > block.count for block in self._blocks)

    def own(self, of_row: Tensor) -> Sequence[Tensor]:
        """Something of every row, by block; the spare rows come last."""
        counts = [block.count for block in self._blocks]
        return of_row.split([*counts, self._rows - sum(counts)])

    def padded(self, of_padded: Tensor) -> Sequence[Tensor]:
        """Something of every row of the padded blocks, by block; what is not needed comes last."""
        return of_padded.split([*(b.size for b in self._blocks), of_padded.shape[0] - self.size])

    def of(self, stack: Tensor) -> Sequence[Tensor]:
        """Something of every expert, by block."""
        if len(self._blocks) == stack.shape[0]:
            return stack.unbind(0)
        return [block.of(stack) for block in self._blocks]

    def zero_idle(self, *stacks: Tensor) -> None:
        """Write zeros for the experts without rows."""
        ends = [(0, 0), *((b.first, b.first + b.experts) for b in self._blocks)]
        for (_, before), (after, _) in pairwise([*ends, (self._experts, 0)]):
            if after > before:
                for stack in stacks:
                    stack[before:after].zero_()


def room(rows: int, experts: int, like: Tensor) -> int:
    """Return the most rows that all padded blocks can have together: see `padded`."""
    return rows if padded(1, like) == 1 else rows + rows // 32 + 16 * experts


@final
class Scratch:
    """Memory for one block at a time by name, made at its first use for the largest block."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self._rows, self._like = rows, like
        self._views: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, rows: int, width: int) -> Tensor:
        """`[rows, width]`, with whatever was there."""
        found = self._views.get((name, rows))
        if found is None:
            whole = self._views.get((name, self._rows))
            if whole is None:
                whole = self._like.new_empty(self._rows, width)
                self._views[name, self._rows] = whole
            self._views[name, rows] = found = whole.narrow(0, 0, rows)
        return found

    def gathered(self, name: str, source: Tensor, tokens: Tensor, size: int) -> Tensor:
        """The tokens of a block's rows, with zeros for the rows that pad it."""
        block = self(name, size, source.shape[1])
        count = tokens.shape[0]
        part = block if count == size else block[:count]
        if source.dtype == block.dtype:
            torch.index_select(source, 0, tokens, out=part)
        else:
            part.copy_(source.index_select(0, tokens))
        if count < size:
            block[count:].zero_()
        return block
