"""Checks of what a router returns: its form, and what it may and may not depend on.

Shapes: `batch tokens dim` in; a portrait of a routing is `batch tokens maps experts slots`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from moefold.losses import losses
from moefold.metrics import load, metrics
from moefold.routers import AbstractRouter
from moefold.routing import Grouping, Routing, SoftRouting, SparseRouting
from moefold.testing.probe import (
    CLOSE,
    Batch,
    RouterCase,
    assert_close,
    combine_weight,
    group_of_token,
    output,
    portrait,
    ragged,
    route,
    same_routing,
    toy_experts,
)

SCALES = (1.0, 1.0, 4.0, 4.0)  # of the tokens that change: like the others, and loud ones


def returns_a_routing(case: RouterCase) -> str | None:
    """The value has the sizes of its input, carries its mask, and is finite."""
    router = case.router()
    for batch in case.batches():
        routing = route(router, batch)
        assert isinstance(routing, SparseRouting | SoftRouting), (
            f"forward returned {type(routing).__name__}; it must return a SparseRouting (build it "
            "with SparseRouting.from_choice) or a SoftRouting"
        )
        assert routing.num_experts == case.num_experts, (
            f"the routing is for {routing.num_experts} experts instead of {case.num_experts}"
        )
        sizes = routing.grouping.batch, routing.grouping.tokens
        assert sizes == batch.x.shape[:2], (
            f"its grouping is for [batch, tokens] = {sizes}, the input has {batch.x.shape[:2]}"
        )
        _carries_the_mask(routing, batch)
        assert torch.isfinite(combine_weight(routing)).all(), "combine weights are not finite"
    return None


def _carries_the_mask(routing: Routing, batch: Batch) -> None:
    if batch.mask is None:
        assert routing.mask is None or routing.mask.all(), (
            "the routing has a mask that hides tokens, though none was given"
        )
    else:
        assert routing.mask is not None, (
            "the routing carries no mask though one was given; pass mask=mask when building it"
        )
        assert torch.equal(routing.mask, batch.mask), "the routing carries another mask"


def rows_in_order(case: RouterCase) -> str | None:
    """Rows are sorted by expert, inside an expert by token, and counted right."""
    router = case.router()
    for batch in case.batches():
        routing = route(router, batch)
        if isinstance(routing, SoftRouting):
            return "a soft routing has no list of rows"
        counts, token = routing.rows_per_expert, routing.token_of_row
        assert counts.dtype == torch.int64, f"rows_per_expert is {counts.dtype}, not int64"
        assert (counts >= 0).all(), "rows_per_expert has a negative count"
        used = int(counts.sum())
        assert used <= len(token), (
            f"rows_per_expert sums to {used}, but there are only {len(token)} rows"
        )
        if token.is_cuda:  # the list ends in spare rows, because its length may not be waited for
            spare = routing.weight_of_row[used:]
            assert (spare == 0).all(), "spare rows must have a weight of zero"
        else:
            assert used == len(token), (
                f"rows_per_expert sums to {used}, but there are {len(token)} rows"
            )
        tokens = batch.x.shape[0] * batch.x.shape[1]
        assert ((token >= 0) & (token < tokens)).all(), "a row has a token that does not exist"
        place = (routing.expert_of_row * tokens + token)[:used]
        assert (place.diff() > 0).all(), (
            "rows are not sorted by expert and, inside an expert, by token (or a pair has two "
            "rows); SparseRouting.from_choice puts them in order"
        )
    return None


def maps_are_matrices(case: RouterCase) -> str | None:
    """Dispatch and combine are `as_matrices()`; what has no row comes back as exactly zero."""
    router = case.router()
    for batch in case.batches():
        routing = route(router, batch)
        dispatch, combine = routing.as_matrices()
        rows = routing.dispatch(batch.x)
        assert_close(rows, dispatch @ batch.x.flatten(0, 1), "dispatch against its matrix")
        assert_close(
            routing.combine(rows.cos()).flatten(0, 1),
            combine @ rows.cos(),
            "combine against its matrix",
        )
        assert (routing.combine(torch.zeros_like(rows)) == 0).all(), "combine of zeros is not zero"
        without = ~portrait(routing)[:, :, 0].flatten(2).any(-1)
        alone = routing.combine(torch.ones_like(rows))[without]
        assert (alone == 0).all(), "a token without a row does not come back as exactly zero"
    return None


def settles_on_the_same_rows(case: RouterCase) -> str | None:
    """Once the experts have spoken the rows are the same ones, and nothing is left undecided."""
    undecided = 0
    for training in (False, True):
        router = case.router(training=training)
        for batch in case.batches():
            routing = route(router, batch)
            rows = toy_experts(routing, routing.dispatch(batch.x))
            settled = routing.settled(rows)
            undecided += settled is not routing
            assert settled.settled(rows) is settled, "a settled routing can be settled again"
            if isinstance(routing, SparseRouting) and isinstance(settled, SparseRouting):
                for name in ("token_of_row", "rows_per_expert"):
                    same = torch.equal(getattr(settled, name), getattr(routing, name))
                    assert same, f"the experts' results change {name}; they may change weights only"
            assert torch.isfinite(combine_weight(settled)).all(), "settled weights are not finite"
    return None if undecided else "no result of an expert changes its routing"


def relabelling_experts(case: RouterCase) -> str | None:
    """Experts that change places together with their parameters change nothing else."""
    router, other = case.router(), case.router()
    order = torch.randperm(case.num_experts).roll(1).to(case.device)
    moved = 0
    for tensor in (*other.parameters(), *other.buffers()):
        dims = [dim for dim, size in enumerate(tensor.shape) if size == case.num_experts]
        if len(dims) > 1:
            return f"a parameter of shape {tuple(tensor.shape)} has several dims of num_experts"
        if dims:
            tensor.data = tensor.data.index_select(dims[0], order)
            moved += 1
    if not moved:
        return "no parameter has a dim of num_experts"
    for batch in case.batches():
        want = portrait(route(router, batch)).index_select(3, order)
        assert_close(portrait(route(other, batch)), want, "after relabelling the experts")
    return None


def permuting_tokens(case: RouterCase) -> str | None:
    """Tokens that change places within their group keep their routing."""
    router = case.router()
    if router.reach == "past":
        return "a router that looks at the past depends on the order"
    for batch in case.batches():
        routing = route(router, batch)
        grouping = routing.grouping
        order = torch.randperm(grouping.members).to(case.device)

        def move(tensor: Tensor, grouping: Grouping = grouping, order: Tensor = order) -> Tensor:
            return grouping.merge(grouping.split(tensor).index_select(1, order))

        got = portrait(route(router, batch.regrouped(move)))
        assert_close(got, move(portrait(routing)), "after permuting the tokens of every group")
    return None


def reach_is_honest(case: RouterCase) -> str | None:
    """Nothing beyond the declared reach changes what comes back for a token."""
    allowed = ("token", "past", "group", "batch")
    checked = 0
    for training in (False, True):
        router = case.router(training=training)
        reach = router.reach_now
        assert reach in allowed, f"reach is {reach!r}; it must be one of {', '.join(allowed)}"
        if reach == "batch":
            continue
        checked += 1
        for batch in case.batches():
            routing = route(router, batch)
            before = output(routing, batch.x)
            for scale in SCALES:
                hidden = _beyond(reach, routing.grouping, case.device)
                after = batch.with_others(hidden, scale)
                _unmoved(router, before, after, hidden, ~hidden, f"it declares reach {reach!r}")
    return None if checked else "nothing lies beyond the batch"


def causality_is_honest(case: RouterCase) -> str | None:
    """If the router says it is causal, later tokens of a sequence change no earlier one."""
    router = case.router()
    if not router.is_causal:
        return "the router says that it is not causal"
    for training in (False, True):
        router = case.router(training=training)
        if training and router.reach_in_training != router.reach and not router.is_causal_now:
            continue  # a rule for inference stands for a choice that is not
        for batch in case.batches():
            before = output(route(router, batch), batch.x)
            count, tokens = batch.x.shape[:2]
            for scale in SCALES:
                sequence, cut = int(torch.randint(count, ())), int(torch.randint(tokens, ()))
                own = torch.zeros(count, tokens, dtype=torch.bool, device=case.device)
                own[sequence] = True
                later = own & (torch.arange(tokens, device=case.device) > cut)
                after = batch.with_others(later, scale)
                _unmoved(router, before, after, later, own & ~later, "it says is_causal")
    return None


def _beyond(reach: str, grouping: Grouping, device: str) -> Tensor:
    """What a token drawn at random must not see, `[batch, tokens]`."""
    count, tokens = grouping.batch, grouping.tokens
    sequence, place = int(torch.randint(count, ())), int(torch.randint(tokens, ()))
    if reach == "group":
        group = group_of_token(grouping, device)
        return group != group[sequence, place]
    hidden = torch.ones(count, tokens, dtype=torch.bool, device=device)
    first = place if reach == "token" else 0
    hidden[sequence, first : place + 1] = False
    return hidden


def _unmoved(
    router: AbstractRouter,
    before: Tensor,
    other: Batch,
    changed: Tensor,
    watched: Tensor,
    claim: str,
) -> None:
    # Output rather than weights: a row that mixes tokens shows what it mixes.
    after = output(route(router, other), other.x)
    moved = ((before - after).abs() > CLOSE).any(-1) & watched
    if moved.any():
        sequence, place = moved.nonzero()[0].tolist()
        source = changed.nonzero().tolist()
        raise AssertionError(
            f"{claim}, but {'in training ' if router.training else ''}token {place} of sequence "
            f"{sequence} came back changed after only tokens beyond that were changed "
            f"([sequence, token] in {source[:4]}{'...' if len(source) > 4 else ''})"
        )


def padding_gets_no_row(case: RouterCase) -> str | None:
    """Padding takes part in nothing, whatever it holds, NaN included."""
    for training in (False, True):
        router = case.router(training=training)
        for batch in case.batches():
            nobody = torch.zeros(batch.x.shape[:2], dtype=torch.bool, device=case.device)
            _ignores_padding(router, replace(batch, mask=nobody))
            if batch.mask is not None:
                _ignores_padding(router, batch)
    return None


def _ignores_padding(router: AbstractRouter, batch: Batch) -> None:
    assert batch.mask is not None, "the caller gives one"
    clean = route(router, batch)
    assert (portrait(clean)[~batch.mask] == 0).all(), "a padding token has a row or a weight"
    assert (output(clean, batch.x)[~batch.mask] == 0).all(), "padding does not come back as zero"
    for name, garbage in (("1e4", 1e4), ("NaN", float("nan"))):
        x = batch.x.masked_fill(~batch.mask.unsqueeze(-1), garbage).requires_grad_()
        dirty = route(router, replace(batch, x=x))
        same_routing(dirty, clean, f"with {name} in the padding")
        y = output(dirty, x)
        assert torch.isfinite(y).all(), f"{name} in the padding reached the output"
        if not y.requires_grad:
            continue
        router.zero_grad()
        y.square().sum().backward()
        for what, gradient in _gradients(router, x):
            assert torch.isfinite(gradient).all(), f"{name} in the padding reached {what}.grad"


def _gradients(router: AbstractRouter, x: Tensor) -> list[tuple[str, Tensor]]:
    named = [("x", x), *router.named_parameters()]
    return [(name, tensor.grad) for name, tensor in named if tensor.grad is not None]


def padding_counts_nowhere(case: RouterCase) -> str | None:
    """Tokens with padding behind them have the routing and statistics they have without it."""
    router = case.router()
    if isinstance(case.group, int):
        return "groups of so many tokens fall differently with padding"
    whole = case.batch(3, 8, seed=2)
    mask = ragged(whole.x, (1.0, 0.6, 0.3))
    padded = route(router, replace(whole, mask=mask))
    for number in range(padded.grouping.groups):
        members = (group_of_token(padded.grouping, case.device) == number) & mask
        if members.any():
            short = route(router, _only(whole, members, padded.grouping))
            got = portrait(padded)[members].reshape(portrait(short).shape)
            assert_close(got, portrait(short), f"group {number} with padding against without")

    one = case.batch(1, 8, seed=4)
    mask = ragged(one.x, (0.6,))
    padded = route(router, replace(one, mask=mask))
    short = route(router, _only(one, mask, Grouping("sequence", 1, 8)))
    _same_statistics(padded, short)
    return None


def _only(batch: Batch, members: Tensor, grouping: Grouping) -> Batch:
    """The marked tokens alone, as one sequence (as one position, if positions are groups)."""
    across = grouping.group == "position"

    def take(tensor: Tensor) -> Tensor:
        return tensor[members].unsqueeze(1 if across else 0)

    return Batch(x=take(batch.x), ids=None if batch.ids is None else take(batch.ids))


def _same_statistics(padded: Routing, short: Routing) -> None:
    assert_close(load(padded), load(short), "the load counts padding")
    plain = metrics(short)
    for name, value in metrics(padded).items():
        assert abs(value - plain[name]) < 1e-6, (
            f"the metric {name!r} counts padding: {value} instead of {plain[name]}"
        )
    for name in losses.names():
        if name == "load":  # defined for noisy routings only; these have no noise
            continue
        got, want = losses.get(name)(padded), losses.get(name)(short)
        assert_close(got, want, f"the loss {name!r} counts padding")


def odd_and_empty_sizes(case: RouterCase) -> str | None:
    """No token, one token, no sequence, odd numbers of them: finite values and gradients."""
    shapes = [(1, 1), (2, 0), (0, 3), (2, 1), (1, 13), (5, 3)]
    for training in (False, True):
        for count, tokens in shapes:
            batch = case.batch(count, tokens, dtype=torch.float32)
            _finite(case, training, batch, f"{count} x {tokens} tokens")
    return None


def extreme_tokens(case: RouterCase) -> str | None:
    """All tokens alike (so that they all go to the same experts), zero, or large: still finite."""
    plain = case.batch(2, 8, dtype=torch.float32)
    kinds = {
        "identical tokens": plain.x[:1, :1].expand_as(plain.x),
        "identical large tokens": 1e3 * plain.x[:1, :1].expand_as(plain.x),
        "zeros": torch.zeros_like(plain.x),
        "large tokens": 1e3 * plain.x,
        "tiny tokens": 1e-30 * plain.x,
    }
    for training in (False, True):
        for name, x in kinds.items():
            _finite(case, training, replace(plain, x=x.clone()), name)
    return None


def _finite(case: RouterCase, training: bool, batch: Batch, what: str) -> None:
    router = case.router(training=training, dtype=torch.float32)
    x = batch.x.detach().requires_grad_()
    routing = route(router, replace(batch, x=x))
    y = output(routing, x)
    assert y.shape == x.shape, f"{what}: {tuple(x.shape)} came back as {tuple(y.shape)}"
    assert torch.isfinite(y).all(), f"{what}: the output is not finite"
    for name in losses.names():
        if name != "load" and not torch.isfinite(losses.get(name)(routing)):
            raise AssertionError(f"{what}: the loss {name!r} is not finite")
    if y.requires_grad:
        y.square().sum().backward()
        for name, gradient in _gradients(router, x):
            assert torch.isfinite(gradient).all(), f"{what}: the gradient of {name} is not finite"
