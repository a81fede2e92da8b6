"""Which tile of rows belongs to which expert, and which rows belong to which token.

Computed where the counts are, from shapes and a few sums: the host waits for nothing and therefore
knows neither how many tiles an expert has nor how many rows are spare. It launches as many programs
as there can be tiles, and those past the last one do nothing.

Shapes: `experts` counts of `rows` rows; `bounds` is experts + 2: where the rows of every expert
begin, where the spare rows begin, and where those end.

    rows:    expert 0 . . . . . . | expert 2 . . . | spare . .        tiles of 4 rows
    tiles:   0        | 1         | 2              | 3                expert_of_tile  0 0 2 3 4 4
    bounds:  rows 0 6 6 10 12, tiles 0 2 2 3 4                        4: no such tile
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional


class Schedule(NamedTuple):
    """Tiles of rows, each of one expert; spare rows belong to expert number `experts`.

    Attributes:
        expert_of_tile: int32; beyond `experts` for tiles that do not exist.
        row_bounds: int32; the rows of expert e are those from bound e up to bound e + 1.
        tile_bounds: int32; the same for its tiles.
    """

    expert_of_tile: Int[Tensor, " tiles"]
    row_bounds: Int[Tensor, " bounds"]
    tile_bounds: Int[Tensor, " bounds"]


class RowsOfTokens(NamedTuple):
    """The rows of every token; spare rows are in none.

    Attributes:
        order: int32; the rows of token 0, then those of token 1, and so on.
        bounds: int32; those of token t are from bound t up to bound t + 1.
    """

    order: Int[Tensor, " rows"]
    bounds: Int[Tensor, " token_bounds"]


def row_bounds(rows_per_expert: Int[Tensor, " experts"], rows: int) -> Int[Tensor, " bounds"]:
    """Return where the rows of every expert begin; last the first spare row, and `rows`.

    Counts that say more than there are rows, which a device cannot report, end at the last row.
    """
    ends = rows_per_expert.cumsum(0, dtype=torch.int32).clamp_max(rows)
    return functional.pad(functional.pad(ends, (1, 0)), (0, 1), value=rows)


def schedule(rows_per_expert: Int[Tensor, " experts"], rows: int, block: int) -> Schedule:
    """Cut the rows of every expert into tiles of at most `block` rows."""
    bounds = row_bounds(rows_per_expert, rows)
    tiles = (bounds.diff() + block - 1) // block
    ends = tiles.cumsum(0, dtype=torch.int32)
    # Every expert, and the spare rows, may have one tile that is not full.
    most = rows // block + bounds.shape[0] - 1
    numbers = torch.arange(most, dtype=torch.int32, device=bounds.device)
    expert = torch.searchsorted(ends, numbers, right=True, out_int32=True)
    return Schedule(expert, bounds, functional.pad(ends, (1, 0)))


def rows_of_tokens(
    token_of_row: Int[Tensor, " rows"],
    rows_per_expert: Int[Tensor, " experts"],
    tokens: int,
) -> RowsOfTokens:
    """List the rows of every token in ascending order, so that their sum is always the same."""
    rows, device = token_of_row.shape[0], token_of_row.device
    spare = torch.arange(rows, device=device) >= rows_per_expert.sum()
    token = token_of_row.masked_fill(spare, tokens).to(torch.int32)
    token, order = token.sort(stable=True)
    each = torch.arange(tokens + 1, dtype=torch.int32, device=device)
    bounds = torch.searchsorted(token, each, out_int32=True)
    return RowsOfTokens(order.to(torch.int32), bounds)
