"""Running quantiles, against sorting every prefix: ties, padding, counts of nothing, decoding."""

from random import Random

import pytest
import torch
from torch import Tensor

from moefold.ops import prefix
from moefold.ops.prefix import (
    FEW,
    chosen_so_far,
    chosen_so_far_reference,
    prefix_level,
    prefix_level_reference,
)

INF = float("inf")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def drawn(random: Random, groups: int, members: int, width: int) -> tuple[Tensor, Tensor]:
    """Scores with many ties, some -inf and infinities, and counts from none to more than all."""
    generator = torch.Generator().manual_seed(random.randint(0, 10**6))
    values = torch.randn(groups, members, width, generator=generator)
    if random.random() < 0.6:
        values = (2 * values).round() / 2  # about nine distinct values, both zeros among them
    if random.random() < 0.4:
        values[torch.rand(values.shape, generator=generator) < 0.3] = -INF
    if random.random() < 0.3:
        values[torch.rand(values.shape, generator=generator) < 0.1] = INF
    share = random.random() * width
    counts = (torch.arange(1, members + 1) * share).round().long().expand(groups, members)
    counts = counts + torch.randint(-2, 3, counts.shape, generator=generator)
    return values.to(random.choice(DTYPES)), counts.clamp_min(0)


# By hand


#                    token 0   token 1   token 2   token 3
#     expert 0         .5        .9        .1        .5
#     expert 1         .3        .5        .2        .8
#
#     one pair a token, so a prefix of i tokens may take i pairs:
#
#     until token 0    best 1 of .5 .3                        level .5   takes .5
#     until token 1    best 2 of .5 .3 .9 .5                  level .5   takes .9, but not its .5:
#                                                                        that of token 0 is before
#     until token 2    best 3 of .5 .3 .9 .5 .1 .2            level .5   takes nothing
#     until token 3    best 4 of .5 .3 .9 .5 .1 .2 .5 .8      level .5   takes .8; two .5 are before
BY_HAND = torch.tensor([[[0.5, 0.3], [0.9, 0.5], [0.1, 0.2], [0.5, 0.8]]], dtype=torch.float64)


@pytest.mark.parametrize("few", [FEW, 0], ids=["each by itself", "all at once"])
def test_by_hand(few, monkeypatch):
    monkeypatch.setattr(prefix, "FEW", few)
    counts = torch.tensor([[1, 2, 3, 4]])
    assert prefix_level(BY_HAND, counts).tolist() == [[0.5] * 4]
    assert chosen_so_far(BY_HAND, counts).int().tolist() == [[[1, 0], [1, 0], [0, 0], [0, 1]]]
    # One pair less for everybody: token 0 takes nothing, token 3 takes the second best of all.
    assert prefix_level(BY_HAND, counts - 1).tolist() == [[INF, 0.9, 0.5, 0.5]]
    fewer = chosen_so_far(BY_HAND, counts - 1)
    assert fewer.int().tolist() == [[[0, 0], [1, 0], [0, 0], [0, 1]]]
    # More than there are: the level is below everything, and everything is taken but -inf.
    assert prefix_level(BY_HAND, 2 * counts + 1).tolist() == [[-INF] * 4]
    assert prefix_level(BY_HAND, 2 * counts)[0].tolist() == [0.3, 0.3, 0.1, 0.1]
    assert chosen_so_far(BY_HAND, 9 * counts).all()
    padded = BY_HAND.masked_fill(BY_HAND == 0.9, -INF)
    assert torch.equal(chosen_so_far(padded, 9 * counts), padded > -INF)


def test_a_past_of_other_tokens_by_hand():
    # The last token of the drawing comes by itself, or the last two.
    for new in (1, 2):
        counts = torch.tensor([[3, 4]])[:, -new:]
        chosen = chosen_so_far(BY_HAND[:, -new:], counts, BY_HAND[:, :-new])
        assert chosen.int().tolist() == [[[0, 0], [0, 1]][-new:]]


def test_columns_of_experts_by_hand():
    # Each expert may take every other token: 1 of 2, 2 of 4.
    #
    #     expert 0:  .5 is the best of one; .9 the best of two; .1 no; .5 no, the first .5 is before
    #     expert 1:  .3 is the best of one; .5 the best of two; .2 no; .8 the best of four
    columns = BY_HAND.transpose(1, 2).reshape(2, 4, 1)
    chosen = chosen_so_far(columns, torch.tensor([[1, 1, 2, 2]] * 2))
    assert chosen.squeeze(-1).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 1]]


# Against sorting every prefix


@pytest.mark.parametrize("width", [1, 2, 5, 9, 16])
def test_every_prefix_is_sorted(width):
    random = Random(width)
    for _ in range(40):
        members, earlier = random.randint(1, 25), random.randint(0, 20)
        values, counts = drawn(random, random.randint(1, 3), members + earlier, width)
        level = prefix_level(values, counts)
        assert torch.equal(level, prefix_level_reference(values, counts))
        expected = chosen_so_far_reference(values, counts)
        assert torch.equal(chosen_so_far(values, counts), expected)
        for new in {members, min(members, FEW), 1}:
            past, now = values[:, :-new], values[:, -new:]
            chosen = chosen_so_far(now, counts[:, -new:], past)
            assert torch.equal(chosen, expected[:, -new:])
            slow = chosen_so_far_reference(now, counts[:, -new:], past)
            assert torch.equal(slow, expected[:, -new:])


@pytest.mark.parametrize("leaf_bits", [0, 1, 3])
def test_smaller_leaves_change_nothing(leaf_bits, monkeypatch):
    # With leaves of 32 ranks, short sequences hardly descend; here every bit is a step.
    monkeypatch.setattr(prefix, "_LEAF_BITS", leaf_bits)
    random = Random(leaf_bits)
    for _ in range(40):
        width = random.randint(1, 6)
        values, counts = drawn(random, random.randint(1, 3), random.randint(FEW + 1, 30), width)
        expected = chosen_so_far_reference(values, counts)
        assert torch.equal(chosen_so_far(values, counts), expected)
        assert torch.equal(prefix_level(values, counts), prefix_level_reference(values, counts))


def test_both_ways_to_decode_agree(monkeypatch):
    random = Random(0)
    for _ in range(40):
        values, counts = drawn(random, 2, random.randint(1, 20), random.randint(1, 12))
        everything, count = values, counts[:, -min(FEW, counts.shape[1]) :]
        found = []
        for narrow in (0, 100):
            monkeypatch.setattr(prefix, "_NARROW", narrow)
            found.append(prefix._one_by_one(everything, count))
        assert torch.equal(*found)


def test_the_two_sorts_agree():
    # Floats as integers against torch.sort: both zeros, infinities, the smallest numbers there are.
    special = [0.0, -0.0, INF, -INF, 1e-45, -1e-45, 1e-38, -1e-38, 1.0, -1.0, 3.4e38, -3.4e38]
    values = torch.tensor(special)[torch.randint(len(special), (3, 500))]
    for rows in (values, values[:1]):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected = torch.sort(rows.to(dtype), dim=1, descending=True, stable=True).indices
            assert torch.equal(prefix._best_first(rows.to(dtype)), expected)


# Properties


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_at_a_time_is_all_at_once(dtype):
    torch.manual_seed(0)
    scores = torch.rand(2, 70, 9).to(dtype)
    counts = (1.5 * torch.arange(1, 71)).long().expand(2, -1)
    full = chosen_so_far(scores, counts)
    steps = [
        chosen_so_far(scores[:, i : i + 1], counts[:, i : i + 1], scores[:, :i]) for i in range(70)
    ]
    assert torch.equal(torch.cat(steps, 1), full)
    # A change of what comes later changes nothing.
    other = torch.cat([scores[:, :40], scores[:, 40:].flip(2)], 1)
    assert torch.equal(chosen_so_far(other, counts)[:, :40], full[:, :40])


def test_as_many_as_asked_for_on_average():
    # Scores in no particular order: the chance of a pair of token i to be among the best 2 i of
    # 8 i is 1/4, so the expectation is 2 a token. 4096 tokens have each a variance below that of
    # 8 independent draws, 8 * 1/4 * 3/4 = 1.5, so the mean has a deviation of at most
    # sqrt(1.5 / 4096) = 0.019; five of them are 0.1.
    torch.manual_seed(0)
    scores = torch.rand(1, 4096, 8)
    counts = (2 * torch.arange(1, 4097)).unsqueeze(0)
    assert chosen_so_far(scores, counts).sum().item() / 4096 == pytest.approx(2, abs=0.1)


def test_what_is_padding_is_never_chosen_and_beats_nobody():
    scores = torch.rand(1, 12, 4)
    padded = torch.cat([torch.full((1, 7, 4), -INF), scores], 1)
    counts = (2 * torch.arange(1, 13)).unsqueeze(0)
    shifted = torch.cat([torch.full((1, 7), 3), counts], 1)
    chosen = chosen_so_far(padded, shifted)
    assert not chosen[:, :7].any()
    assert torch.equal(chosen[:, 7:], chosen_so_far(scores, counts))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_nothing_of_nothing(shape):
    values, counts = torch.zeros(shape), torch.ones(shape[:2], dtype=torch.long)
    assert not chosen_so_far(values, counts).any()
    assert torch.equal(prefix_level(values, counts), prefix_level_reference(values, counts))


def test_no_gradient_passes():
    values = torch.rand(1, 9, 3, requires_grad=True)
    counts = torch.arange(1, 10).unsqueeze(0)
    assert not prefix_level(values, counts).requires_grad
    assert not chosen_so_far(values, counts).requires_grad
