"""Blocks of rows, and memory for one of them at a time; what the fused backend loops over.

Shapes: `rows` are sorted by expert. A *run* is the rows of one expert, or of several that follow
each other and have equally many (as all have under expert choice), whose products are then one
batched product. A *block* is as many runs as fit in cache: what is done to every row alike, gather,
activation and sum, is done once for all of them.

    rows_per_expert   4 | 4 | 0 | 3 | 900 | 4
    runs              4   4 |     3 | 900 | 4
    blocks            4   4       3 | 900 | 4
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import final

from torch import Tensor

from moefold.ops.cpu import experts
from moefold.ops.grouped import padded

BLOCK_ROWS = 1024
"""A block of several experts has no more rows: more save no time."""

BLOCK_NUMBERS = 1 << 21
"""Nor has its widest matrix more numbers: the memory for one block stays below a dense layer's."""

BLOCKS_EACH = 4
"""A block of several experts has no more rows than make about so many blocks for each worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The rows of one expert, or of several that follow each other and have equally many.

    Attributes:
        first: the first of its experts.
        experts: how many they are.
        size: rows of all of them, with those that pad them, see `ops.grouped.padded`.
    """

    first: int
    experts: int
    size: int

    def each(self, rows: Tensor) -> Tensor:
        """Its rows as a factor: `[rows, width]`, or `[experts, rows of each, width]`."""
        return rows if self.experts == 1 else rows.unflatten(0, (self.experts, -1))

    def of(self, stack: Tensor) -> Tensor:
        """What a stack by expert holds for the run, to go with `each`."""
        if self.experts == 1:
            return stack[self.first]
        return stack.narrow(0, self.first, self.experts)


@dataclass(slots=True, kw_only=True)
class Block:
    """Runs that follow each other; if there is padding, a single one.

    Attributes:
        runs: what it consists of.
        first_run: place of its first run among those of all blocks.
        count: rows of all of them.
        size: the same with the rows that pad it.
        compiled: whether it is left to compiled code, see `ops.cpu.experts`.
    """

    first_run: int
    compiled: bool = False
    runs: list[Run] = field(default_factory=list)
    count: int = 0
    size: int = 0

    @property
    def end_run(self) -> int:
        """Place of the first run after its own."""
        return self.first_run + len(self.runs)

    def has_room(self, size: int, count: int, most: int) -> bool:
        """Whether the rows of one more expert may join."""
        return self.count == self.size and size == count and self.size + size <= most

    def take(self, expert: int, count: int, size: int) -> None:
        """Add the rows of one more expert."""
        self.count, self.size = self.count + count, self.size + size
        if self.runs:
            last = self.runs[-1]
            if last.first + last.experts == expert and last.size == last.experts * size:
                longer = last.experts + 1
                self.runs[-1] = Run(first=last.first, experts=longer, size=longer * size)
                return
        self.runs.append(Run(first=expert, experts=1, size=size))

    def split(self, of_row: Tensor) -> Sequence[Tensor]:
        """Of something of every row, what belongs to each run."""
        return (of_row,) if len(self.runs) == 1 else of_row.split([r.size for r in self.runs])

    def by_run(self, rows: Tensor) -> Sequence[Tensor]:
        """The rows of every run as a factor, see `Run.each`."""
        return [run.each(part) for run, part in zip(self.runs, self.split(rows), strict=True)]

    def own(self, of_run: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of something of every run of all blocks, that of its own runs."""
        return of_run[self.first_run : self.end_run]


@final
class Blocks:
    """All blocks in order, and views of tensors by block or by run.

    An operation from Python takes some microseconds, which adds up over dozens of experts: views
    are made all at once, and of experts with rows only where these are few.

    Args:
        counts: how many rows each expert has.
        rows: how many there are, spare ones too.
        widest: numbers in a row of the widest matrix that is made of a block.
        like: of the dtype that is computed in.
        workers: among how many the blocks will be shared out.
        compiled: whether experts whose rows suit compiled code are left to it.
    """

    def __init__(
        self,
        counts: Sequence[int],
        rows: int,
        widest: int,
        like: Tensor,
        *,
        workers: int = 1,
        compiled: bool = False,
    ) -> None:
        self._experts, self._rows = len(counts), rows
        most = min(BLOCK_ROWS, BLOCK_NUMBERS // widest)
        if workers > 1:
            most = min(most, max(sum(counts) // (BLOCKS_EACH * workers), 1))
        self._blocks: list[Block] = []
        block = None
        for expert, count in enumerate(counts):
            if not count:
                continue
            size, suits = padded(count, like), compiled and experts.suits(count)
            fits = block and block.compiled == suits and block.has_room(size, count, most)
            if block is None or not fits:
                block = Block(first_run=block.end_run if block else 0, compiled=suits)
                self._blocks.append(block)
            block.take(expert, count, size)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, i: int) -> Block:
        return self._blocks[i]

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

    def by_run(self, stack: Tensor) -> Sequence[Tensor]:
        """Something of every expert, by run of all blocks."""
        if self._blocks and self._blocks[-1].end_run == stack.shape[0]:
            return stack.unbind(0)
        return [run.of(stack) for block in self._blocks for run in block.runs]

    def zero_idle(self, *stacks: Tensor) -> None:
        """Write zeros for the experts without rows."""
        runs = (run for block in self._blocks for run in block.runs)
        ends = [(0, 0), *((run.first, run.first + run.experts) for run in runs)]
        for (_, before), (after, _) in pairwise([*ends, (self._experts, 0)]):
            if after > before:
                for stack in stacks:
                    stack[before:after].zero_()


def room(rows: int, experts: int, like: Tensor) -> int:
    """Return the most rows that all padded blocks can have together: see `padded`."""
    return rows if padded(1, like) == 1 else rows + rows // 32 + 16 * experts


@final
class Scratch:
    """Memory for one block at a time, by name.

    Args:
        rows: of the largest block.
        like: of the dtype that is computed in.
        **widths: of what there is room for, by name.
    """

    def __init__(self, rows: int, like: Tensor, **widths: int) -> None:
        self._whole = {name: like.new_empty(rows, width) for name, width in widths.items()}
        self._views: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, rows: int) -> Tensor:
        """`[rows, width]`, with whatever was there."""
        found = self._views.get((name, rows))
        if found is None:
            self._views[name, rows] = found = self._whole[name].narrow(0, 0, rows)
        return found
