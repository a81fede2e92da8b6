"""How large a tile is, how deep the loop of a product goes at once, and by how many warps.

Shapes: a product gives tiles of `rows columns` numbers and reads `depth` terms of each at a time.

Not timed: chosen by what the matrix units and the memory beside them hold. A tile of 128 x 128
float32 sums is 64 registers of each of 256 threads; a stage of two operands of 128 x 64 in bfloat16
is 32 KiB, so that three of them fit into the 99 KiB that a program may have on every device from
Ampere on, and two programs onto a Hopper multiprocessor. Compiled for compute capabilities 8.0 and
9.0, with experts of 1536 by 256, no kernel spills more than 16 bytes of registers a thread.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# The smallest operand of the matrix units. The interpreter takes as long for a large block as for a
# small one; a test that wants many tiles makes them smaller.
SMALLEST = 16
INTERPRETED = 64
# So many tiles go through all columns together, see `pieces.place`.
GROUP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Sizes of one family of kernels; powers of two from 16 on.

    Attributes:
        rows: rows of a tile.
        columns: columns of a tile.
        depth: terms of a sum that are read at a time.
        warps: groups of 32 threads that share a tile.
        stages: how many blocks of terms are under way from memory at the same time.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def of_rows(like: Tensor, rows: int, experts: int) -> Blocks:
    """Return the blocks of products over rows: `first`, `second` and `hidden`.

    A tile has rows of one expert only. With few rows for each, lower tiles waste less.
    """
    if like.device.type == "cpu":
        height = SMALLEST if rows <= SMALLEST * experts else INTERPRETED // 2
        return Blocks(rows=height, columns=INTERPRETED, depth=INTERPRETED, warps=1, stages=1)
    each = -(-rows // experts)
    height = min(128, max(SMALLEST, 1 << (each - 1).bit_length() if each > 1 else 1))
    depth = 128 // like.element_size()
    warps = 8 if height == 128 else 4
    columns = 256 // like.element_size()
    return Blocks(rows=height, columns=columns, depth=depth, warps=warps, stages=3)


def of_halves(blocks: Blocks) -> Blocks:
    """Return blocks for a kernel with two sums per tile: half as many columns of each."""
    return Blocks(
        rows=blocks.rows,
        columns=max(SMALLEST, blocks.columns // 2),
        depth=blocks.depth,
        warps=blocks.warps,
        stages=blocks.stages,
    )


def of_weights(like: Tensor) -> Blocks:
    """Return the blocks of sums over rows: `weights`, where `depth` counts rows."""
    if like.device.type == "cpu":
        return Blocks(rows=INTERPRETED, columns=INTERPRETED, depth=INTERPRETED, warps=1, stages=1)
    depth = 128 // like.element_size()
    return Blocks(rows=128, columns=128, depth=depth, warps=8, stages=3)


def precision_of(like: Tensor) -> str:
    """Return how a product multiplies: "tf32", "ieee", or "interpreted".

    float32 follows `torch.backends.cuda.matmul`, which `torch.set_float32_matmul_precision` sets.
    """
    if like.device.type == "cpu":
        return "interpreted"
    if like.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def launch(blocks: Blocks, like: Tensor) -> dict[str, int | str]:
    """Return what every product is launched with: its blocks, and how numbers like these multiply.

    `GROUP` is for `pieces.place`.
    """
    return {
        "PRECISION": precision_of(like),
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "DEPTH": blocks.depth,
        "GROUP": GROUP,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
