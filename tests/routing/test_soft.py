"""The soft routing: every row mixes tokens, every token mixes rows."""

import pytest
import torch
from torch import Tensor

from moefold.ops.soft import TorchMaps
from moefold.routing import Group, Grouping, SoftRouting

# The maps and their matrices add the same products in another order: a few float64 roundings.
SUM_ORDER = 1e-14


def random_routing(
    group: Group, batch: int = 2, tokens: int = 6, mask: Tensor | None = None
) -> SoftRouting:
    """Three experts with two slots each; distributions over real tokens and over slots."""
    grouping = Grouping(group, batch, tokens)
    shape = grouping.groups, grouping.members, 3, 2
    real = torch.ones(batch, tokens, dtype=torch.bool) if mask is None else mask
    real = grouping.split(real)[:, :, None, None]
    dispatch = torch.rand(shape, dtype=torch.float64) * real
    dispatch = dispatch / dispatch.sum(1, keepdim=True).clamp_min(1e-300)
    combine = torch.rand(shape, dtype=torch.float64)
    combine = combine / combine.sum((2, 3), keepdim=True) * real
    return SoftRouting(
        dispatch_weight=dispatch.requires_grad_(),
        combine_weight=combine.requires_grad_(),
        grouping=grouping,
        mask=mask,
    )


def test_two_tokens_two_experts_by_hand():
    # One sequence of tokens 1 and 3, two experts with one slot each.
    #
    #     dispatch   expert 0  expert 1        combine   expert 0  expert 1
    #     token 1       .5        .25          token 1      .9        .1
    #     token 3       .5        .75          token 3      .2        .8
    #
    # Rows: .5 * 1 + .5 * 3 = 2 and .25 * 1 + .75 * 3 = 2.5; experts multiply by 10 and by 100.
    # Back: .9 * 20 + .1 * 250 = 43 and .2 * 20 + .8 * 250 = 204.
    routing = SoftRouting(
        dispatch_weight=torch.tensor([[0.5, 0.25], [0.5, 0.75]])[None, ..., None],
        combine_weight=torch.tensor([[0.9, 0.1], [0.2, 0.8]])[None, ..., None],
        grouping=Grouping("sequence", 1, 2),
    )
    rows = routing.dispatch(torch.tensor([[[1.0], [3.0]]]))
    assert rows.tolist() == [[2.0], [2.5]]
    back = routing.combine(rows * torch.tensor([[10.0], [100.0]]))
    assert back.flatten().tolist() == pytest.approx([43.0, 204.0], rel=1e-6)  # float32 rounding


def test_rows_are_sorted_by_expert_then_by_group():
    # Two sequences of one token (1 and 2), two experts, two slots; a slot's dispatch weight is
    # 10 * expert + slot + 1, so that a row's value says whose it is.
    weight = torch.tensor([[1.0, 2.0], [11.0, 12.0]]).expand(2, 1, 2, 2)
    routing = SoftRouting(
        dispatch_weight=weight, combine_weight=weight, grouping=Grouping("sequence", 2, 1)
    )
    rows = routing.dispatch(torch.tensor([[[1.0]], [[2.0]]]))
    #                 expert 0                | expert 1
    #                 sequence 0 | sequence 1 | sequence 0 | sequence 1
    assert rows.flatten().tolist() == [1, 2, 2, 4, 11, 12, 22, 24]
    assert routing.rows_per_expert.tolist() == [4, 4]
    assert routing.expert_of_row.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("group", ["sequence", "batch", "position", 3, 4], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all real", "masked"])
def test_dispatch_and_combine_are_their_matrices(group, masked):
    mask = torch.rand(2, 6) < 0.6 if masked else None
    routing = random_routing(group, mask=mask)
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    to_rows, to_tokens = routing.as_matrices()
    rows = torch.randn(to_rows.shape[0], 5, dtype=torch.float64, requires_grad=True)
    assert len(rows) == int(routing.rows_per_expert.sum())

    fast = [routing.dispatch(x), routing.combine(rows)]
    slow = [to_rows @ x.reshape(-1, 5), (to_tokens @ rows).reshape(2, 6, 5)]
    inputs = [x, rows, routing.dispatch_weight, routing.combine_weight]
    back = [torch.randn_like(y) for y in fast]
    of_fast = torch.autograd.grad(fast, inputs, back)
    of_slow = list(torch.autograd.grad(slow, inputs, back))
    if mask is not None:
        # The matrix would teach the dispatch weight of padding from what padding holds.
        of_slow[2] = of_slow[2] * routing.grouping.split(mask)[:, :, None, None]
    for left, right in zip([*fast, *of_fast], [*slow, *of_slow], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=SUM_ORDER)


@pytest.mark.parametrize("group", ["sequence", "batch", "position", 3], ids=str)
def test_groups_do_not_mix(group):
    # Changing one token changes rows of its own group only, and those rows reach no other group.
    routing = random_routing(group)
    grouping = routing.grouping
    of_token = grouping.merge(
        torch.arange(grouping.groups).unsqueeze(1).expand(-1, grouping.members)
    )
    to_rows, to_tokens = routing.as_matrices()
    reaches = (to_tokens @ to_rows) != 0
    same = of_token.flatten()[:, None] == of_token.flatten()[None, :]
    assert torch.equal(reaches, same)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e300], ids=str)
def test_padding_may_hold_anything(junk):
    mask = torch.tensor([[True, True, False, True, False, False]] * 2)
    mask[1] = False  # a sequence without any real token
    routing = random_routing("sequence", mask=mask)
    clean = torch.randn(2, 6, 5, dtype=torch.float64)
    x = torch.where(mask.unsqueeze(-1), clean, junk).requires_grad_()
    rows = routing.dispatch(x)
    assert torch.equal(rows, routing.dispatch(torch.where(mask.unsqueeze(-1), clean, 0.0)))
    # Rows of one expert: two of sequence 0, then two of sequence 1, which hold nothing.
    assert not rows.reshape(3, 2, 2, 5)[:, 1].any()
    out = routing.combine(rows + 1)
    assert not out[~mask].any()
    out.sum().backward()
    for tensor in (x, routing.dispatch_weight):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
    assert x.grad is not None
    assert not x.grad[~mask].any()
    assert x.grad[mask].all()


def test_rows_keep_their_dtype():
    # float32 weights of a bfloat16 layer: 0.5 * 3 + 0.5 * 1 = 2 is exact there.
    half = torch.full((1, 2, 1, 1), 0.5)
    routing = SoftRouting(
        dispatch_weight=half, combine_weight=half, grouping=Grouping("sequence", 1, 2)
    )
    rows = routing.dispatch(torch.tensor([[[3.0], [1.0]]], dtype=torch.bfloat16))
    assert rows.dtype == torch.bfloat16
    assert rows.item() == 2.0
    assert routing.combine(rows).dtype == torch.bfloat16
    assert routing.combine(rows).flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("batch", "tokens"), [(2, 0), (0, 3)], ids=["no tokens", "no sequences"])
def test_nothing_mixes_into_nothing(batch, tokens):
    routing = random_routing("sequence", batch, tokens)
    rows = routing.dispatch(torch.randn(batch, tokens, 5, dtype=torch.float64))
    assert torch.equal(rows, torch.zeros(3 * batch * 2, 5, dtype=torch.float64))
    assert routing.combine(rows).shape == (batch, tokens, 5)


@pytest.mark.parametrize("group", ["sequence", "batch", "position", 4], ids=str)
def test_logits_make_the_weights_and_the_maps_of_them(group):
    mask = torch.tensor([[True, True, False, True], [True, True, True, False]])
    grouping = Grouping(group, 2, 4)
    logits = torch.randn(grouping.groups, grouping.members, 3, 2, dtype=torch.float64)
    made = SoftRouting(grouping=grouping, mask=mask, logits=logits, maps=TorchMaps())
    shares = logits.exp() * grouping.split(mask)[:, :, None, None]
    given = SoftRouting(
        grouping=grouping,
        mask=mask,
        dispatch_weight=shares / shares.sum(1, keepdim=True).clamp_min(1e-300),
        combine_weight=shares / shares.sum((2, 3), keepdim=True).clamp_min(1e-300),
    )
    assert (made.num_experts, made.slots) == (given.num_experts, given.slots) == (3, 2)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    for find in (
        lambda r: r.dispatch_weight,
        lambda r: r.combine_weight,
        lambda r: r.dispatch(x),
        lambda r: r.combine(given.dispatch(x)),
    ):
        torch.testing.assert_close(find(made), find(given), rtol=0, atol=SUM_ORDER)


def test_a_routing_needs_weights_or_what_makes_them():
    half, grouping = torch.full((1, 2, 1, 1), 0.5), Grouping("sequence", 1, 2)
    with pytest.raises(ValueError, match="dispatch_weight together with combine_weight"):
        SoftRouting(grouping=grouping, dispatch_weight=half)
    with pytest.raises(ValueError, match="no weights, and not both logits and maps"):
        SoftRouting(grouping=grouping, logits=half)
