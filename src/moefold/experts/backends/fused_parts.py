"""What one worker of the fused backend gets: blocks, memory for one at a time, and its sums.

Shapes: `tokens dim` sums; see `fused_blocks`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moefold.experts.backends.fused_blocks import Blocks, Scratch
from moefold.experts.backends.fused_workers import share_out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """The work of one worker.

    Attributes:
        share: which blocks.
        sums: what it adds its rows to.
        scratch: memory for one block.
    """

    share: Sequence[int]
    sums: Tensor
    scratch: Scratch


def make_parts(
    blocks: Blocks, sums: Sequence[Tensor], widths: dict[str, int], like: Tensor
) -> list[Part]:
    """Share the blocks out that torch computes, a part for each worker that gets any.

    Args:
        blocks: all of them.
        sums: of each worker.
        widths: of the memory for a block, by name, see `Scratch`.
        like: of the dtype that is computed in.
    """
    left = [i for i, block in enumerate(blocks) if not block.compiled]
    shares = share_out([blocks[i].size for i in left], len(sums))
    return [
        Part(
            share=[left[i] for i in share],
            sums=own,
            scratch=Scratch(max(blocks[left[i]].size for i in share), like, **widths),
        )
        for share, own in zip(shares, sums, strict=True)
        if share
    ]
