"""Selection in long rows: the best pairs of a whole group, the best tokens of a group's experts.

Shapes: `rows size` scores; a row is cut into `blocks` pieces, one for each program of a pass.

The last one taken is found eight bits a pass, from the highest: a pass counts, for the scores that
agree with it so far, the next eight bits; the first of the 256 buckets, from the top, that leaves
no room for a further one holds it. The next pass reads the counts at its start, so that there is no
launch between. After four passes the last one taken is known, and how many of its equals are taken;
only if that is not all of them, a fifth pass counts equals by block, so that the lowest indices
win. Counts are added by integer atomics, whose order changes nothing. Nothing is read by the host.

The slow twin is `moefold.ops.select.top`.
"""

# ruff: noqa: N803 - constants are written large in kernels
# pyright: reportPrivateImportUsage=false, reportIndexIssue=false, reportOptionalMemberAccess=false
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefold.ops.triton.pieces import on_device_of
from moefold.ops.triton.select import order_key

_BLOCK = 4096  # scores of one program: 32 for each thread of four warps
_READ = 256  # numbers of earlier blocks that are added at a time
_PASSES = 4


@triton.jit
@no_type_check
def _narrowed(
    tallies, prefixes, rooms, counts, row, rows, size, count, rows_per_count,
    PASS: tl.constexpr, HAS_COUNTS: tl.constexpr,
):  # fmt: skip
    """Before a pass: the last one's leading bits, room for scores that have them, their number."""
    prefix = tl.zeros([1], tl.uint32)
    if HAS_COUNTS:
        room = tl.load(counts + row // rows_per_count + tl.zeros([1], tl.int32))
        room = tl.minimum(room, size).to(tl.int32)
    else:
        room = tl.zeros([1], tl.int32) + count
    equals = tl.zeros([1], tl.int32) + size
    if PASS > 0:
        if PASS > 1:
            place = (PASS - 1) * rows + row + tl.zeros([1], tl.int32)
            prefix = tl.load(prefixes + place).to(tl.uint32, bitcast=True)
            room = tl.load(rooms + place)
        bucket = tl.arange(0, 256)
        number = tl.load(tallies + ((PASS - 1) * rows + row) * 256 + bucket)
        reached = tl.cumsum(number, 0)
        # Buckets count from the top: bucket 0 has the largest scores.
        found = tl.sum((reached < room).to(tl.int32), 0)
        here = bucket == found
        above = tl.sum(tl.where(here, reached - number, 0), 0)
        equals = tl.zeros([1], tl.int32) + tl.sum(tl.where(here, number, 0), 0)
        prefix = (prefix << 8) | (255 - found).to(tl.uint32)
        room = room - above
    return prefix, room, equals


@triton.jit
@no_type_check
def _keys(scores, valid, row, block, size, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr):
    """Keys of a block of a row, where they lie, and which take part."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    place = row * size + column
    x = tl.load(scores + place, mask=inside, other=0.0).to(tl.float32)
    taking_part = inside
    if HAS_VALID:
        taking_part = tl.load(valid + place, mask=inside, other=0) != 0
        x = tl.where(taking_part, x, float("-inf"))
    return order_key(x), place, inside, taking_part


@triton.jit
@no_type_check
def _tally(
    scores, valid, counts, tallies, prefixes, rooms, rows, size, blocks, count, rows_per_count,
    PASS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    prefix, room, _ = _narrowed(
        tallies, prefixes, rooms, counts, row, rows, size, count, rows_per_count, PASS, HAS_COUNTS
    )
    if PASS > 0:
        place = PASS * rows + row + tl.zeros([1], tl.int32)
        first = (block + tl.zeros([1], tl.int32)) == 0
        tl.store(prefixes + place, prefix.to(tl.int32, bitcast=True), mask=first)
        tl.store(rooms + place, room, mask=first)
    key, _, inside, _ = _keys(scores, valid, row, block, size, HAS_VALID, BLOCK)
    counted = inside
    if PASS > 0:
        counted = inside & ((key >> (32 - 8 * PASS)) == prefix)
    bucket = 255 - ((key >> (24 - 8 * PASS)) & 255).to(tl.int32)
    number = tl.histogram(bucket, 256, mask=counted)
    where = tallies + (PASS * rows + row) * 256 + tl.arange(0, 256)
    tl.atomic_add(where, number, mask=number > 0, sem="relaxed")


@triton.jit
@no_type_check
def _count_equals(
    scores, valid, counts, tallies, prefixes, rooms, spares, equals_of_block,
    rows, size, blocks, count, rows_per_count,
    HAS_VALID: tl.constexpr, HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    last, room, equals = _narrowed(
        tallies, prefixes, rooms, counts, row, rows, size, count, rows_per_count, 4, HAS_COUNTS
    )
    first = (block + tl.zeros([1], tl.int32)) == 0
    place = row + tl.zeros([1], tl.int32)
    tl.store(prefixes + place, last.to(tl.int32, bitcast=True), mask=first)
    tl.store(rooms + place, room, mask=first)
    spare = tl.maximum(equals - room, 0)
    tl.store(spares + place, spare, mask=first)
    if tl.sum(spare, 0) > 0:
        key, _, inside, _ = _keys(scores, valid, row, block, size, HAS_VALID, BLOCK)
        tied = (inside & (key == last)).to(tl.int32)
        tl.store(equals_of_block + row * blocks + block, tl.sum(tied, 0))


@triton.jit
@no_type_check
def _mark_long(
    scores, valid, prefixes, rooms, spares, equals_of_block, marked, size, blocks,
    HAS_VALID: tl.constexpr, BLOCK: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    last = tl.load(prefixes + row).to(tl.uint32, bitcast=True)
    room = tl.load(rooms + row)
    key, place, inside, taking_part = _keys(scores, valid, row, block, size, HAS_VALID, BLOCK)
    best = key > last
    tied = inside & (key == last)
    if tl.load(spares + row) > 0:
        earlier = tl.zeros([READ], tl.int32)
        for start in range(0, block, READ):
            other = start + tl.arange(0, READ)
            earlier += tl.load(equals_of_block + row * blocks + other, mask=other < block, other=0)
        here = tl.sum(earlier, 0) + tl.cumsum(tied.to(tl.int32), 0)
        tied = tied & (here <= room)
    tl.store(marked + place, (best | tied) & taking_part, mask=inside)


@torch.library.custom_op("moefold::mark_long", mutates_args=())
def mark_long(
    scores: Tensor, valid: Tensor | None, counts: Tensor | None, count: int, rows_per_count: int
) -> Tensor:
    """Mark the largest of every row, however long; see `marked_top`."""
    rows, size = scores.shape
    marked = torch.empty_like(scores, dtype=torch.bool)
    if scores.numel() == 0:
        return marked
    blocks = triton.cdiv(size, _BLOCK)
    whole = {"dtype": torch.int32, "device": scores.device}
    tallies = torch.zeros(_PASSES, rows, 256, **whole)
    # Row 0 of both is that of the first pass, where nothing is known; the end is written there.
    prefixes, rooms = torch.empty(_PASSES, rows, **whole), torch.empty(_PASSES, rows, **whole)
    spares, equals = torch.empty(rows, **whole), torch.empty(rows, blocks, **whole)
    flags = {"HAS_VALID": valid is not None, "BLOCK": _BLOCK}
    known = tallies, prefixes, rooms
    limits = rows, size, blocks, min(count, size), rows_per_count
    counted = {"HAS_COUNTS": counts is not None, **flags}
    with on_device_of(scores):
        grid = (rows * blocks,)
        for step in range(_PASSES):
            _tally[grid](scores, valid, counts, *known, *limits, PASS=step, **counted)
        _count_equals[grid](scores, valid, counts, *known, spares, equals, *limits, **counted)
        _mark_long[grid](
            scores,
            valid,
            prefixes,
            rooms,
            spares,
            equals,
            marked,
            size,
            blocks,
            READ=_READ,
            **flags,
        )
    return marked


@mark_long.register_fake
def _(scores, valid, counts, count, rows_per_count):
    return torch.empty_like(scores, dtype=torch.bool)
