"""What one worker of the fused backend gets: blocks, memory for one at a time, and sums of its own.

Shapes: `tokens dim` sums; see `fused_blocks`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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
    blocks: Blocks, workers: int, sums: Tensor, widths: dict[str, int], like: Tensor
) -> list[Part]:
    """Share the blocks out, a part for each worker that gets any, or one without blocks.

    Args:
        blocks: all of them.
        workers: how many there are at most.
        sums: zeros, of the first part; the others get their own.
        widths: of the memory for a block, by name, see `Scratch`.
        like: of the dtype that is computed in.
    """
    shares = share_out([block.size for block in blocks], workers)
    shares = [share for share in shares if share] or shares[:1]
    return [
        Part(
            share=share,
            sums=torch.zeros_like(sums) if i else sums,
            scratch=Scratch(
                max((blocks[j].size for j in share), default=0),
                like,
                compiled=any(blocks[j].compiled for j in share),
                **widths,
            ),
        )
        for i, share in enumerate(shares)
    ]


def total(parts: Sequence[Part]) -> Tensor:
    """The sums of all parts, added in their order."""
    first, *others = parts
    for other in others:
        first.sums.add_(other.sums)
    return first.sums
