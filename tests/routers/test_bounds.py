"""Bounds on both sides of the unified competition, against one pair after another.

Letters: c pairs in the budget, n real tokens of a group, E experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import ceil, floor
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from moefold.ops.select import rank, within_both, within_both_reference, within_columns
from moefold.routers.capacity import Capacity, Convention
from moefold.routers.choice import TopPairs
from moefold.routing import SparseRouting
from tests.routers.common import DIM, EXPERTS, batch, build, exact, pairs, untyped

# Few distinct values: almost every decision has to break a tie.
VALUES = (0.0, 0.25, 0.5, 0.75, 1.0)


def drawn(random: Random, *shape: int) -> Tensor:
    """Scores, with ties in two cases of three."""
    generator = torch.Generator().manual_seed(random.randint(0, 10**6))
    if random.random() < 1 / 3:
        return torch.rand(shape, generator=generator)
    return torch.tensor(VALUES)[torch.randint(len(VALUES), shape, generator=generator)]


def one_after_another(
    scores: list[list[float]],
    valid: list[bool],
    c: int,
    rows: int,
    at_least: int = 0,
    at_most: int | None = None,
) -> set[tuple[int, int]]:
    """The pairs of one group: first up to the minimum of each token, then the rest, best first."""
    n, experts = len(scores), len(scores[0])
    order = sorted(
        ((i, j) for i in range(n) if valid[i] for j in range(experts)),
        key=lambda pair: (-scores[pair[0]][pair[1]], pair),
    )
    of_token, of_expert, taken = [0] * n, [0] * experts, set()
    for most in (at_least, experts if at_most is None else at_most):
        for i, j in order:
            room = of_token[i] < most and of_expert[j] < rows and len(taken) < c
            if room and (i, j) not in taken:
                taken.add((i, j))
                of_token[i] += 1
                of_expert[j] += 1
    return taken


def best_possible(scores: Tensor, c: int, rows: int, at_most: int) -> float:
    """The largest sum of scores within the bounds, by looking at every set of pairs."""
    n, experts = scores.shape
    sets = torch.tensor(list(product((0, 1), repeat=n * experts))).reshape(-1, n, experts)
    fits = (sets.sum((1, 2)) <= c) & (sets.sum(1) <= rows).all(1) & (sets.sum(2) <= at_most).all(1)
    return float((sets[fits] * scores).sum((1, 2)).max())


# By hand


#                expert 0   expert 1   expert 2
#     token 0      .9         .6         .1
#     token 1      .8         .5         .2
#     token 2      .7         .3         .4
#
#     two pairs a token, c = 6; the six best are .9 .8 .7 .6 .5 .4
BY_HAND = torch.tensor([[[0.9, 0.6, 0.1], [0.8, 0.5, 0.2], [0.7, 0.3, 0.4]]])


def picked(**settings: Any) -> set[tuple[int, ...]]:
    """What one group of the drawing takes."""
    choice = TopPairs(**{"budget": 2.0, **settings})
    return pairs(choice(BY_HAND, None, False).chosen[0])


def test_by_hand():
    assert picked() == {(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 2)}
    # Two rows of each expert: .7 finds none, .2 comes in its place.
    two_rows = Capacity(rows=2)
    assert picked(capacity=two_rows) == {(0, 0), (1, 0), (0, 1), (1, 1), (2, 2), (1, 2)}
    # And no token more than two: .9 .8 .6 .5 fill tokens 0 and 1 and experts 0 and 1. Only token 2
    # with expert 2 is left: five pairs, one less than the budget.
    two_each = {"capacity": two_rows, "max_experts": 2}
    assert picked(**two_each) == {(0, 0), (1, 0), (0, 1), (1, 1), (2, 2)}
    # One row of each, one pair a token: .9, then .5 (.8, .7 and .6 have no room), then .4.
    one_each = {"budget": 1.0, "capacity": Capacity(rows=1), "max_experts": 1}
    assert picked(**one_each) == {(0, 0), (1, 1), (2, 2)}


def test_a_minimum_by_hand():
    # c = 4 without a minimum: .9 .8 .7 .6; with one row of each expert: .9 .6 .4 and no more.
    settings = {"budget": 4 / 3, "capacity": Capacity(rows=1)}
    assert picked(**settings) == {(0, 0), (0, 1), (2, 2)}
    # At least one each comes first: .9, then .5 for token 1 and .4 for token 2. All rows are taken.
    assert picked(**settings, min_experts=1) == {(0, 0), (1, 1), (2, 2)}
    # Two rows: .9 and .8 for tokens 0 and 1, and for token 2, for which no row of expert 0 is left,
    # .4. The fourth pair is the best of what has room, .6.
    settings = {"budget": 4 / 3, "capacity": Capacity(rows=2), "min_experts": 1}
    assert picked(**settings) == {(0, 0), (1, 0), (2, 2), (0, 1)}


def test_capacity_wins_over_a_minimum():
    # Three tokens, two experts with one row each: one token has to go without.
    choice = TopPairs(budget=1.0, min_experts=1, capacity=Capacity(rows=1))
    chosen = choice(torch.tensor([[[0.9, 0.1], [0.8, 0.3], [0.7, 0.2]]]), None, False).chosen
    assert pairs(chosen[0]) == {(0, 0), (1, 1)}


def test_greed_is_not_always_best():
    #              expert 0   expert 1
    #   token 0      .9         .8        greedy: .9 and .1; the best: .8 and .7
    #   token 1      .7         .1
    scores = torch.tensor([[[0.9, 0.8], [0.7, 0.1]]])
    choice = TopPairs(budget=1.0, max_experts=1, capacity=Capacity(rows=1))
    assert pairs(choice(scores, None, False).chosen[0]) == {(0, 0), (1, 1)}
    assert best_possible(scores[0], 2, 1, 1) == pytest.approx(1.5)


def test_equals_are_taken_by_their_index():
    choice = TopPairs(budget=1.0, max_experts=1, capacity=Capacity(rows=1))
    chosen = choice(torch.full((1, 3, 3), 0.5), None, False).chosen
    assert pairs(chosen[0]) == {(0, 0), (1, 1), (2, 2)}
    alone = TopPairs(budget=1.0, capacity=Capacity(rows=1))(torch.full((1, 3, 3), 0.5), None, False)
    assert pairs(alone.chosen[0]) == {(0, 0), (0, 1), (0, 2)}


# Against one pair after another


def test_rounds_are_the_loop():
    random = Random(0)
    for _ in range(150):
        groups, members, experts = (random.randint(1, high) for high in (3, 9, 6))
        scores = drawn(random, groups, members, experts)
        if random.random() < 0.2:
            scores[torch.rand(scores.shape) < 0.2] = -torch.inf
        open_to = torch.rand(scores.shape) < random.choice((0.4, 0.8, 1.0))
        of_member = torch.randint(0, experts + 2, (groups, members))
        of_expert = torch.randint(0, members + 2, (groups, experts))
        taken = within_both(scores, open_to, of_member, of_expert)
        assert torch.equal(taken, within_both_reference(scores, open_to, of_member, of_expert))
        # Without a bound on members there is one round less to think about, and no rounds.
        free = torch.full_like(of_member, experts)
        columns = within_columns(scores, open_to, of_expert)
        assert torch.equal(columns, within_both_reference(scores, open_to, free, of_expert))


def test_as_many_rounds_as_it_takes():
    # A staircase: each pair has room only if the one before it has closed the one between them, so
    # nothing but the first pair is certain at once.
    #
    #     9  8  .  .
    #     .  7  6  .        one row each, one pair each: 9, not 8; 7, not 6; 5, not 4; 3
    #     .  .  5  4
    #     .  .  .  3
    size = 12
    scores, open_to = torch.zeros(1, size, size), torch.zeros(1, size, size, dtype=torch.bool)
    for i in range(size):
        for j in range(i, min(i + 2, size)):
            scores[0, i, j], open_to[0, i, j] = 100 - i - j, True
    one = torch.ones(1, size, dtype=torch.long)
    assert torch.equal(within_both(scores, open_to, one, one)[0], torch.eye(size).bool())


def settings_drawn(random: Random, experts: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Bounds that go together, most of them tight."""
    while True:
        at_least = random.randint(0, 2)
        budget = random.choice((0.4, 1.0, 1.5, 2.0, 2.25, 3.0))
        at_most = random.choice((None, 1, 2, 3, experts))
        if at_least <= budget <= min(at_most or experts, experts):
            yield {
                "budget": budget,
                "min_experts": at_least,
                "max_experts": at_most,
                "rows": random.randint(1, tokens),
            }


def test_every_bound_is_the_loop():
    random = Random(1)
    for _ in range(250):
        groups, tokens, experts = (random.randint(1, high) for high in (3, 8, 5))
        if experts < 2:
            continue
        settings = next(settings_drawn(random, experts, tokens))
        rows = settings.pop("rows")
        choice = TopPairs(**settings, capacity=Capacity(rows=rows))
        scores = drawn(random, groups, tokens, experts)
        valid = None
        if random.random() < 0.6:
            valid = torch.rand(groups, tokens) < 0.7
        chosen, wanted, most_rows = choice(scores, valid, False)
        assert int(chosen.sum()) <= most_rows
        free = TopPairs(**settings)(scores, valid, False)
        assert wanted is not None
        assert torch.equal(wanted, free.chosen)
        assert free.wanted is None
        for g in range(groups):
            real = [True] * tokens if valid is None else valid[g].tolist()
            n = sum(real)
            c = min(floor(Fraction(settings["budget"]) * n + Fraction(1, 2)), n * experts)
            expected = one_after_another(
                scores[g].tolist(),
                real,
                c,
                rows,
                settings["min_experts"],
                settings["max_experts"],
            )
            assert pairs(chosen[g]) == expected


def test_a_bound_that_never_binds_changes_nothing():
    random = Random(2)
    for _ in range(40):
        scores = drawn(random, 2, 7, 4)
        for at_least, at_most in ((0, None), (1, None), (0, 3), (1, 3)):
            free = TopPairs(budget=1.5, min_experts=at_least, max_experts=at_most)
            roomy = replace(free, capacity=Capacity(rows=7))
            expected = free(scores, None, False).chosen
            assert torch.equal(roomy(scores, None, False).chosen, expected)


# How good it is


def test_one_kind_of_bound_is_solved_exactly():
    random = Random(3)
    for _ in range(30):
        scores = drawn(random, 1, 4, 3).double()
        c, rows = random.choice((2, 4, 6, 8)), random.randint(1, 3)
        choice = TopPairs(budget=c / 4, capacity=Capacity(rows=rows))
        total = float(scores[choice(scores, None, False).chosen].sum())
        assert total == pytest.approx(best_possible(scores[0], c, rows, 3), abs=1e-12)


def test_both_kinds_reach_at_least_half():
    random = Random(4)
    for _ in range(40):
        scores = drawn(random, 1, 4, 3).double()
        c, rows, at_most = random.choice((2, 4, 8)), random.randint(1, 2), random.randint(2, 3)
        choice = TopPairs(budget=c / 4, max_experts=at_most, capacity=Capacity(rows=rows))
        total = float(scores[choice(scores, None, False).chosen].sum())
        # The sums are of at most 8 numbers below 1: rounding is far below 1e-12.
        assert total >= best_possible(scores[0], c, rows, at_most) / 2 - 1e-12


# In the router


@pytest.mark.parametrize("budget", [1.0, 1.5, 2.2])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("bounds", [{}, {"max_experts": 3}], ids=["experts", "both"])
def test_a_factor_is_one_of_the_fair_share(budget, factor, bounds):
    # The fair share of n tokens is budget * n / E: 1.5 * 6 / 4 = 2.25, and half of it 1.125. Both
    # are rounded up, so that a factor of 1 always has room for the whole budget. Exact arithmetic
    # on what is written: 2.2 * 5 / 4 is 2.75.
    router = build("unified", budget=budget, capacity_factor=factor, **bounds)
    fraction = Fraction(str(budget)) * Fraction(str(factor)) / EXPERTS
    given = batch(3, 7)
    assert given.mask is not None
    for mask in (None, given.mask):
        routing = router(given.x, mask)
        real = [7] * 3 if mask is None else mask.sum(1).tolist()
        loads = routing.chosen.sum(1)
        for n, load in zip(real, loads.tolist(), strict=True):
            rows = ceil(fraction * n)
            assert max(load) <= rows
            if not bounds:
                spent = min(floor(Fraction(str(budget)) * n + Fraction(1, 2)), rows * EXPERTS)
                assert sum(load) == spent


def test_the_fair_share_is_filled_where_all_want_one_expert():
    # Every token prefers expert 0; the factor of 1 deals them out evenly: 3 of 6 tokens each.
    router = exact("unified", 2, budget=1.0, alpha=0.0, capacity_factor=1.0)
    x = torch.stack([torch.linspace(1, 2, 6), torch.zeros(6)], -1).double().unsqueeze(0)
    routing = router(x)
    assert isinstance(routing, SparseRouting)
    assert routing.rows_per_expert.tolist() == [3, 3]
    assert routing.wanted is not None
    assert routing.wanted.sum((0, 1)).tolist() == [6, 0]


def test_the_published_conventions_apply():
    # 8 tokens, budget 1.5, 4 experts: the fair share is 3; vmoe rounds it up to 4, and flaxformer
    # takes 8 / 4 = 2 without the budget, but never less than 4.
    alike = torch.zeros(1, 8, EXPERTS)
    alike[..., 0] = 1.0
    expected: list[tuple[Convention, int]] = [("moefold", 3), ("vmoe", 4), ("flaxformer", 4)]
    for convention, rows in expected:
        choice = TopPairs(budget=1.5, capacity=Capacity(factor=1.0, convention=convention))
        assert int(choice(alike, None, False).chosen.sum((0, 1))[0]) == rows


def test_padding_takes_no_room():
    torch.manual_seed(0)
    for bounds in ({}, {"max_experts": 2}, {"min_experts": 1}):
        choice = TopPairs(budget=1.5, capacity=Capacity(factor=1.0), **bounds)
        scores = torch.rand(2, 6, 4)
        padded = torch.cat([torch.full((2, 3, 4), 2.0), scores], 1)
        valid = torch.arange(9).expand(2, 9) >= 3
        chosen = choice(padded, valid, False).chosen
        assert not chosen[:, :3].any()
        assert torch.equal(chosen[:, 3:], choice(scores, None, False).chosen)


def test_names_of_experts_do_not_matter():
    # Without ties, which are broken by index.
    torch.manual_seed(1)
    scores, order = torch.rand(2, 9, 5), torch.randperm(5)
    assert int(rank(scores.flatten(1)).max()) == 44
    for bounds in ({}, {"max_experts": 3}, {"min_experts": 1, "max_experts": 3}):
        choice = TopPairs(budget=2.0, capacity=Capacity(rows=4), **bounds)
        chosen = choice(scores, None, False).chosen
        assert torch.equal(choice(scores[..., order], None, False).chosen, chosen[..., order])


def test_no_tokens():
    for bounds in ({}, {"min_experts": 1, "max_experts": 2}):
        choice = TopPairs(budget=2.0, capacity=Capacity(rows=4), **bounds)
        assert choice(torch.zeros(1, 0, 4), None, False).chosen.shape == (1, 0, 4)
        nobody = torch.zeros(1, 3, dtype=torch.bool)
        assert not choice(torch.rand(1, 3, 4), nobody, False).chosen.any()


def test_the_custom_router_has_the_bound_too():
    custom = build("custom", score="softmax", choice="top-pairs", budget=2.0, capacity=2)
    unified = build("unified", alpha=0.0, budget=2.0, capacity=2)
    unified.load_state_dict(custom.state_dict())
    x = torch.randn(2, 8, DIM, dtype=torch.float64)
    assert torch.equal(custom(x).chosen, unified(x).chosen)
    assert int(custom(x).chosen.sum(1).max()) == 2


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity": 0}, r"capacity is 0; it must be a positive whole number"),
        ({"capacity_factor": -1.0}, r"capacity_factor is -1\.0; it must be a positive finite"),
        (
            {"capacity": 3, "capacity_factor": 1.0},
            r"capacity is 3 and capacity_factor is 1\.0; give one of them",
        ),
        ({"convention": "vmoes"}, r"convention is 'vmoes'; allowed: 'moefold', 'vmoe'"),
    ],
)
def test_impossible_bounds(settings, message):
    with untyped(), pytest.raises(ValueError, match=message):
        build("unified", **settings)


# Compiling


def test_both_kinds_do_not_compile(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    capacity, scores = Capacity(factor=1.0), torch.rand(2, 6, 4)
    TopPairs(budget=2.0, capacity=capacity)(scores, None, False)
    for bounds in ({"min_experts": 1}, {"max_experts": 3}):
        choice = TopPairs(budget=2.0, capacity=capacity, **bounds)
        with pytest.raises(ValueError, match=r"settled in rounds.* cannot be compiled; leave one"):
            choice(scores, None, False)


@pytest.mark.compile
def test_a_bound_on_experts_compiles_and_both_say_that_they_do_not():
    torch.manual_seed(0)
    scores, valid = torch.rand(2, 12, 4), torch.rand(2, 12) < 0.8

    def compiled(choice: TopPairs) -> Callable[[Tensor, Tensor], Tensor]:
        torch.compiler.reset()
        call = lambda s, v: choice(s, v, False).chosen  # noqa: E731
        return torch.compile(call, fullgraph=True, backend="aot_eager")

    alone = TopPairs(budget=2.0, capacity=Capacity(factor=1.0))
    assert torch.equal(compiled(alone)(scores, valid), alone(scores, valid, False).chosen)
    both = replace(alone, max_experts=3)
    with pytest.raises(Exception, match=r"settled in rounds.* cannot be compiled; leave one"):
        compiled(both)(scores, valid)
    torch.compiler.reset()
