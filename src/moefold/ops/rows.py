"""From chosen pairs to the list of rows, sorted by expert and then by token.

Shapes: `*tokens experts` pairs; `rows` is the length of the list. Where the number of chosen pairs
may be read it is that number; else as long as it could ever be, and what comes after the rows of
all experts is *spare*, with token 0 and weight 0.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moefold.ops import kernels
from moefold.ops.cpu import routing as compiled
from moefold.ops.rows_torch import Rows, list_reference, list_unread


def list_rows(
    chosen: Bool[Tensor, "*tokens experts"],
    weights: Float[Tensor, "*tokens experts"],
    most_rows: int,
) -> Rows:
    """List the chosen pairs with their weights.

    Args:
        chosen: which pairs have a row.
        weights: of all pairs; only those of chosen ones are read.
        most_rows: the most pairs there can ever be.
    """
    if kernels.serve(weights):
        from moefold.ops.triton.rows import list_rows as kernel

        return Rows(*kernel(chosen.flatten(0, -2), weights.flatten(0, -2), most_rows)[:3])
    compiling = torch.compiler.is_compiling()
    # For a mode too: it sees torch's operations, and the same is kept for the backward pass.
    if not compiling and compiled.serves(weights, marks=[chosen], as_operator=True):
        return compiled.list_rows(chosen, weights)
    chosen, weights = chosen.flatten(0, -2), weights.flatten(0, -2)
    if compiling or chosen.device.type in ("cuda", "meta"):
        return list_unread(chosen, weights, most_rows)
    return list_reference(chosen, weights)
