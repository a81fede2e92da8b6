"""Selection with ties broken by index.

Shapes: `groups members experts` as a router sees its scores; `count` is how many to take along one
dim, one number for all or one per group.

`torch.topk` leaves the order of equal values open. Here the *value* of the last one taken is found
first, which is well defined, and then the lowest indices that reach it are taken.
"""

from importlib.util import find_spec

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefold.ops import kernels

Count = int | Int[Tensor, " groups"]

LONG = 4096
"""Scores in a row from which NumPy, where it is installed, finds the last one taken."""


def per_group(count: Int[Tensor, " groups"], like: Tensor) -> Tensor:
    """`[groups]` to `[groups, 1, ...]`, to be broadcast against `like`."""
    return count.reshape(-1, *(1 for _ in like.shape[1:]))


def top(
    scores: Float[Tensor, "groups ..."],
    count: Count,
    dim: int,
    valid: Bool[Tensor, "groups ..."] | None = None,
    most: int | None = None,
) -> Bool[Tensor, "groups ..."]:
    """Mark the `count` largest scores along `dim`; the lowest index wins a tie.

    Args:
        scores: scores without NaN.
        count: how many to take, one number or one for each group (the first dim of `scores`).
        dim: the dim along which scores compete; not the first one.
        valid: which scores take part, all if None. Never marks more than take part.
        most: no count is larger; saves sorting the rest.
    """
    size = scores.shape[dim]
    if scores.numel() == 0 or (isinstance(count, int) and count == 0):
        return torch.zeros_like(scores, dtype=torch.bool)
    if kernels.serve(scores):
        return _top_by_kernel(scores, count, dim, valid)
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    if _can_partition(scores, dim):
        count = count if isinstance(count, int) else per_group(count, scores)
        last = last_by_partition(scores, count)
    elif isinstance(count, int):
        last = scores.topk(min(count, size), dim, sorted=False).values.amin(dim, keepdim=True)
    else:
        count = per_group(count, scores)
        ordered = scores.topk(size if most is None else min(max(most, 1), size), dim).values
        last = last_taken(ordered, count, dim)
    marked = mark(scores, last, count, dim)
    return marked if valid is None else marked & valid


def _top_by_kernel(scores: Tensor, count: Count, dim: int, valid: Tensor | None) -> Tensor:
    """The same by a kernel, along rows: in one program each, or by radix where they are long."""
    from moefold.ops.triton.radix import mark_long
    from moefold.ops.triton.select import SHORT, mark_short

    along = scores.detach().movedim(dim, -1)
    rows = along.reshape(-1, along.shape[-1]).contiguous()
    if valid is not None:
        valid = valid.movedim(dim, -1).reshape(rows.shape).contiguous()
    counts, number = (None, count) if isinstance(count, int) else (count.contiguous(), 0)
    of_group = max(rows.shape[0] // max(scores.shape[0], 1), 1)
    mark_rows = mark_short if rows.shape[1] <= SHORT else mark_long
    return mark_rows(rows, valid, counts, number, of_group).reshape(along.shape).movedim(-1, dim)


def _can_partition(scores: Tensor, dim: int) -> bool:
    """Whether NumPy finds the last one taken sooner: long rows on the CPU that may be read."""
    return (
        scores.ndim == 2
        and dim == 1
        and scores.shape[1] >= LONG
        and scores.device.type == "cpu"
        and scores.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and find_spec("numpy") is not None
    )


@torch.no_grad()
def last_by_partition(
    scores: Float[Tensor, "groups size"], count: int | Int[Tensor, "groups 1"]
) -> Float[Tensor, "groups 1"]:
    """The `count`-th largest value of every row (the largest where count is 0), by partition.

    NumPy's partition uses the vector units of the processor: a fifth of the time of `torch.topk`
    on a row of 262,144. The value is the same, whichever of its equals stands in that place.
    """
    import numpy

    rows = scores.detach().numpy()
    size = rows.shape[1]
    counts = [count] * len(rows) if isinstance(count, int) else count.flatten().tolist()
    places = [size - min(max(number, 1), size) for number in counts]
    if len(set(places)) == 1:
        found = numpy.partition(rows, places[0], axis=1)[:, places[0]]
    else:
        found = [
            numpy.partition(row, place)[place] for row, place in zip(rows, places, strict=True)
        ]
    return scores.new_tensor(numpy.asarray(found)).unsqueeze(1)


def last_taken(ordered: Tensor, count: Tensor, dim: int) -> Tensor:
    """The `count`-th value of descending values along `dim` (the first one where count is 0)."""
    shape = list(ordered.shape)
    shape[dim] = 1
    return ordered.gather(dim, (count - 1).clamp(0, ordered.shape[dim] - 1).expand(shape))


def mark(scores: Tensor, last: Tensor, count: int | Tensor, dim: int) -> Tensor:
    """Mark what is above `last`, and as many of what equals it as `count` leaves room for."""
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():
        # Nearly always there is room for all that equal it, and counting them one by one, which
        # takes longer than to find `last`, can be left out.
        reached = scores >= last
        if bool((reached.sum(dim, keepdim=True) == count).all()):
            return reached
    return mark_in_order(scores, last, count, dim)


def mark_in_order(scores: Tensor, last: Tensor, count: int | Tensor, dim: int) -> Tensor:
    """The same without a look at the data: what equals `last` is counted by index."""
    above = scores > last
    tied = scores == last
    room = count - above.sum(dim, keepdim=True)
    return above | (tied & (tied.cumsum(dim) <= room))


def rank(scores: Float[Tensor, "*rest experts"]) -> Int[Tensor, "*rest experts"]:
    """Place of every score in its row, 0 for the largest; the lowest index wins a tie."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, places)


def within_capacity(
    wanted: Bool[Tensor, "groups members experts"],
    scores: Float[Tensor, "groups members experts"],
    capacity: Count,
    most_choices: int,
    by_gate: bool,
) -> Bool[Tensor, "groups members experts"]:
    """Keep the wanted pairs that find room in their expert's buffer.

    All first choices are placed before all second choices; inside one rank tokens are placed by
    index, or by their best score if `by_gate` (Batch Prioritised Routing: Riquelme et al.,
    *Scaling Vision with Sparse Mixture of Experts*, 2021, section 4.1).

    Args:
        wanted: the pairs asked for; at most `most_choices` for each token.
        scores: what the choice was made by; it orders the choices of a token.
        capacity: rows of one expert in one group.
        most_choices: the most experts one token may ask for.
        by_gate: place tokens by their best score instead of by index.
    """
    place = rank(scores.masked_fill(~wanted, -torch.inf))
    if by_gate:
        best = scores.masked_fill(~wanted, -torch.inf).amax(-1)
        order = torch.sort(best, dim=1, descending=True, stable=True).indices.unsqueeze(-1)
        order = order.expand_as(place)
        place, asked = place.gather(1, order), wanted.gather(1, order)
    else:
        order, asked = None, wanted
    choices = torch.arange(most_choices, device=scores.device).reshape(1, -1, 1, 1)
    arriving = (place.unsqueeze(1) == choices) & asked.unsqueeze(1)
    queue = arriving.flatten(1, 2)  # [groups, choices * members, experts]: first choices first
    room = capacity if isinstance(capacity, int) else per_group(capacity, queue)
    kept = (queue & (queue.cumsum(1) <= room)).reshape(arriving.shape).any(1)
    return kept if order is None else torch.zeros_like(kept).scatter(1, order, kept)


def within_columns(
    scores: Float[Tensor, "groups members experts"],
    open_to: Bool[Tensor, "groups members experts"],
    room: Int[Tensor, "groups experts"],
) -> Bool[Tensor, "groups members experts"]:
    """Keep the best open pairs of every expert, as many as its own room."""
    return open_to & (_place_of_open(open_to, _order(scores, 1), 1) < room.unsqueeze(1))


@torch.no_grad()
def within_both(
    scores: Float[Tensor, "groups members experts"],
    open_to: Bool[Tensor, "groups members experts"],
    of_member: Int[Tensor, "groups members"],
    of_expert: Int[Tensor, "groups experts"],
) -> Bool[Tensor, "groups members experts"]:
    """Take the open pairs greedily, the best first, each if its member and its expert have room.

    Pairs are ordered by score; the lowest flat index wins a tie. The number of rounds depends on
    the scores, so the device is waited for in each, and the function cannot be compiled.

    Args:
        scores: scores without NaN.
        open_to: which pairs take part.
        of_member: most pairs of each member.
        of_expert: most pairs of each expert.
    """
    # In a round, each open pair is taken that is within the room left to its member, counted among
    # the member's open pairs, and likewise within that of its expert. Then pairs are closed whose
    # member or expert is full. This ends with what one pair after another would have taken, G:
    #
    # - All that is taken is in G. Suppose the pair p is the first that is not. When p's turn came
    #   in G, its member (or its expert: the same) was full, of pairs of G that are better than p.
    #   Which of the member's better pairs are in G? Those taken in earlier rounds, and open ones;
    #   none that was closed, for its expert is full of taken pairs, which are all of G that it can
    #   hold (and its member is not full: p is open). So the better open pairs are at least as many
    #   as the room that is left, and p was not within it.
    # - Nothing else is in G: what is not taken was closed, by a member or an expert that is full of
    #   taken pairs, so of pairs of G.
    # - A round takes something: the best open pair is the best of its member and of its expert.
    in_row, in_column = _order(scores, 2), _order(scores, 1)
    taken = torch.zeros_like(open_to)
    of_member, of_expert = of_member.unsqueeze(2), of_expert.unsqueeze(1)
    while True:
        open_to = open_to & (of_member > 0) & (of_expert > 0)
        if not bool(open_to.any()):
            return taken
        now = open_to & (_place_of_open(open_to, in_row, 2) < of_member)
        now &= _place_of_open(open_to, in_column, 1) < of_expert
        taken, open_to = taken | now, open_to & ~now
        of_member = of_member - now.sum(2, keepdim=True)
        of_expert = of_expert - now.sum(1, keepdim=True)


@torch.no_grad()
def within_both_reference(
    scores: Float[Tensor, "groups members experts"],
    open_to: Bool[Tensor, "groups members experts"],
    of_member: Int[Tensor, "groups members"],
    of_expert: Int[Tensor, "groups experts"],
) -> Bool[Tensor, "groups members experts"]:
    """What `within_both` computes, one pair after another."""
    experts = scores.shape[2]
    taken = torch.zeros_like(open_to)
    for group in range(scores.shape[0]):
        members_room, experts_room = of_member[group].tolist(), of_expert[group].tolist()
        flat = scores[group].flatten()
        for pair in flat.sort(descending=True, stable=True).indices.tolist():
            member, expert = divmod(pair, experts)
            has_room = members_room[member] > 0 and experts_room[expert] > 0
            if has_room and bool(open_to[group, member, expert]):
                taken[group, member, expert] = True
                members_room[member] -= 1
                experts_room[expert] -= 1
    return taken


def _order(scores: Tensor, dim: int) -> Tensor:
    """Indices along a dim, largest score first, the lowest index first among equals."""
    return torch.sort(scores, dim=dim, descending=True, stable=True).indices


def _place_of_open(open_to: Tensor, order: Tensor, dim: int) -> Tensor:
    """How many open pairs come before each pair in the order."""
    asked = open_to.gather(dim, order)
    before = asked.cumsum(dim) - asked.long()
    return torch.empty_like(before).scatter(dim, order, before)
