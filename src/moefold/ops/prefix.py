"""Running quantiles: what would be chosen if the text ended here, for every token at once.

Shapes: `groups members width`, the scores of `width` pairs of every member; `counts` says how many
pairs a member's prefix (the past, then members up to this one) may take. The pairs of a prefix are
numbered member by member; a pair beats another if its score is larger, or equal and its number
lower.

All pairs are ranked once, best first. The answer for a member is then a rank: the `count`-th
smallest among the ranks of its prefix, a beginning of the sequence of all ranks. A wavelet matrix
answers this for all members together (Claude, Navarro and Ordóñez, *The wavelet matrix*, 2015,
section 3): from the highest bit of the ranks to the lowest, it counts how many ranks of the
interval have a 0 there, which says whether the rank looked for has, and moves all zeros before all
ones, each in their old order, so that the next interval is again one piece. So `n` pairs take
`n log n` operations and memory for `n`, whatever the counts are.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefold.ops.select import top

FEW = 4
"""Members up to which each has its own look at the whole past: decoding."""

_LEAF_BITS = 5
# Ranks that agree in all but so many bits are looked at one by one: cheaper than a step for each.

_NARROW = 8
# Pairs of a member up to which each is compared with the past, rather than the past partitioned.


@torch.no_grad()
def prefix_level(
    values: Float[Tensor, "groups members width"], counts: Int[Tensor, "groups members"]
) -> Float[Tensor, "groups members"]:
    """The `counts[g, i]`-th largest of `values[g, : i + 1]`, for every member.

    Args:
        values: without NaN; -inf is a value as any other.
        counts: infinity is returned for a count of 0, -infinity for one that is larger than the
            number of values.
    """
    members, width = values.shape[1:]
    if values.numel() == 0:
        return torch.where(counts < 1, torch.inf, -torch.inf).to(values.dtype)
    flat = values.flatten(1)
    ends = torch.arange(1, members + 1, device=values.device) * width
    order = _best_first(flat)
    ranks = _rank_of_last(order, _ranks(order), ends, counts)
    level = flat.gather(1, order.gather(1, ranks))
    level = level.masked_fill(counts > ends, -torch.inf)
    return level.masked_fill(counts < 1, torch.inf)


@torch.no_grad()
def chosen_so_far(
    values: Float[Tensor, "groups members width"],
    counts: Int[Tensor, "groups members"],
    past: Float[Tensor, "groups earlier width"] | None = None,
) -> Bool[Tensor, "groups members width"]:
    """Mark the pairs that fewer than `counts` pairs of their member's prefix beat.

    A pair is judged once, when its member comes: later members change nothing, and a call with the
    past marks exactly what a call on past and members together marks. No member has more than
    `counts` pairs.

    Args:
        values: scores without NaN; -inf is never chosen.
        counts: how many pairs each prefix may take; none for 0.
        past: scores of earlier members.
    """
    if values.numel() == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    everything = values if past is None else torch.cat([past, values], 1)
    if values.shape[1] <= FEW:
        chosen = _one_by_one(everything, counts)
    else:
        chosen = _all_at_once(everything, counts)
    return chosen & (values > -torch.inf)


@torch.no_grad()
def prefix_level_reference(
    values: Float[Tensor, "groups members width"], counts: Int[Tensor, "groups members"]
) -> Float[Tensor, "groups members"]:
    """What `prefix_level` computes, by sorting every prefix."""
    level = torch.full(counts.shape, torch.inf, dtype=values.dtype, device=values.device)
    for group in range(values.shape[0]):
        for member in range(values.shape[1]):
            count = int(counts[group, member])
            ordered = values[group, : member + 1].flatten().sort(descending=True).values
            if count > len(ordered):
                level[group, member] = -torch.inf
            elif count > 0:
                level[group, member] = ordered[count - 1]
    return level


@torch.no_grad()
def chosen_so_far_reference(
    values: Float[Tensor, "groups members width"],
    counts: Int[Tensor, "groups members"],
    past: Float[Tensor, "groups earlier width"] | None = None,
) -> Bool[Tensor, "groups members width"]:
    """What `chosen_so_far` computes, by sorting every prefix."""
    everything = values if past is None else torch.cat([past, values], 1)
    earlier = everything.shape[1] - values.shape[1]
    chosen = torch.zeros_like(values, dtype=torch.bool)
    for group in range(values.shape[0]):
        for member in range(values.shape[1]):
            flat = everything[group, : earlier + member + 1].flatten()
            order = flat.sort(descending=True, stable=True).indices
            marked = torch.zeros_like(flat, dtype=torch.bool)
            marked[order[: int(counts[group, member])]] = True
            chosen[group, member] = marked[(earlier + member) * values.shape[2] :]
    return chosen & (values > -torch.inf)


def _all_at_once(everything: Tensor, counts: Tensor) -> Tensor:
    """The last members' choices, as many as there are counts."""
    _, total, width = everything.shape
    members = counts.shape[1]
    ends = torch.arange(total - members + 1, total + 1, device=everything.device) * width
    order = _best_first(everything.flatten(1))
    ranks = _ranks(order)
    last = _rank_of_last(order, ranks, ends, counts).masked_fill(counts < 1, -1)
    last = last.masked_fill(counts > ends, total * width).unsqueeze(-1)
    return ranks[:, (total - members) * width :].unflatten(1, (members, width)) <= last


def _one_by_one(everything: Tensor, counts: Tensor) -> Tensor:
    """The same, each member with a look at its whole prefix."""
    _, total, width = everything.shape
    members = counts.shape[1]
    partition = (
        width > _NARROW and everything.device.type == "cpu" and not torch.compiler.is_compiling()
    )
    found = []
    for member in range(members):
        prefix = everything[:, : total - members + member + 1].flatten(1)
        count = counts[:, member]
        if partition:
            found.append(top(prefix, count, 1)[:, -width:])
            continue
        before, own = prefix[:, :-width].unsqueeze(1), prefix[:, -width:]
        beaten_by = (before >= own.unsqueeze(2)).sum(2)  # among equals the earlier one wins
        here = torch.arange(width, device=prefix.device)
        ahead = own.unsqueeze(1) > own.unsqueeze(2)
        tied = (own.unsqueeze(1) == own.unsqueeze(2)) & (here < here.unsqueeze(1))
        beaten_by = beaten_by + (ahead | tied).sum(2)
        found.append(beaten_by < count.unsqueeze(1))
    return torch.stack(found, 1)


def _best_first(flat: Tensor) -> Tensor:
    """Indices of every row, largest first, the lowest index first among equals."""
    if flat.device.type != "cpu" or flat.dtype == torch.float64:
        return torch.sort(flat, dim=1, descending=True, stable=True).indices
    # PyTorch sorts a long list of integers by radix, in a sixth of the time. The bits of a float,
    # the lower ones flipped where it is negative, are an integer of the same order; adding zero
    # makes the two zeros one. The group goes before them, to sort all groups in one list.
    bits = (flat.float() + 0.0).view(torch.int32)
    key = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    groups, size = flat.shape
    if groups == 1:
        return torch.sort(key.flatten(), stable=True).indices.unsqueeze(0)
    group = torch.arange(groups).unsqueeze(1)
    order = torch.sort((key + (group << 32)).flatten(), stable=True).indices
    return order.unflatten(0, (groups, size)) - group * size


def _ranks(order: Tensor) -> Tensor:
    """The inverse of the order: the rank of every pair, in half the memory of an index."""
    places = torch.arange(order.shape[1], dtype=torch.int32, device=order.device)
    return torch.empty_like(order, dtype=torch.int32).scatter(1, order, places.expand_as(order))


def _rank_of_last(
    order: Int[Tensor, "groups pairs"],
    ranks: Int[Tensor, "groups pairs"],
    ends: Int[Tensor, " members"],
    counts: Int[Tensor, "groups members"],
) -> Int[Tensor, "groups members"]:
    """The `counts`-th smallest of `ranks[:, :end]` for every end; counts beyond it are clamped."""
    pairs = ranks.shape[1]
    want = torch.minimum(counts.long().clamp_min(1), ends)
    left, right = torch.zeros_like(want), ends.expand_as(want)
    found = torch.zeros_like(want)
    row = torch.arange(pairs, dtype=ranks.dtype, device=ranks.device)
    sequence = ranks
    leaf_bits = min(_LEAF_BITS, (2 * (pairs // len(ends))).bit_length())
    bit = max((pairs - 1).bit_length(), leaf_bits)
    while bit > leaf_bits:
        bit -= 1
        # Every rank below `pairs` is there once, so the number of zeros is known.
        zeros = (pairs >> (bit + 1) << bit) + min(pairs & ((2 << bit) - 1), 1 << bit)
        is_one = (sequence >> bit) & 1
        ones_until = is_one.cumsum(1, dtype=ranks.dtype)
        ones_before = torch.nn.functional.pad(ones_until, (1, 0))
        ones_left, ones_right = ones_before.gather(1, left), ones_before.gather(1, right)
        zeros_inside = (right - ones_right) - (left - ones_left)
        goes_up = want > zeros_inside
        want = torch.where(goes_up, want - zeros_inside, want)
        left = torch.where(goes_up, zeros + ones_left, left - ones_left)
        right = torch.where(goes_up, zeros + ones_right, right - ones_right)
        found = found + (goes_up.long() << bit)
        if bit > leaf_bits:
            to = torch.where(is_one > 0, ones_until + (zeros - 1), row - ones_until)
            sequence = torch.empty_like(sequence).scatter(1, to.long(), sequence)
    leaf = found.unsqueeze(-1) + torch.arange(1 << leaf_bits, device=ranks.device)
    pair = order.gather(1, leaf.clamp_max(pairs - 1).flatten(1)).reshape(leaf.shape)
    inside = pair < ends.unsqueeze(-1)  # past the last rank the last is repeated: after all others
    return found + (inside.cumsum(-1) < want.unsqueeze(-1)).sum(-1)
