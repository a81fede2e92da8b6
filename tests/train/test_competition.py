"""The schedule of competitions: who competes when, how little at a time, and how it goes on."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from moefold import MoEConfig, routers
from moefold.routers import SparseRouter
from moefold.routing import SparseRouting
from moefold.train import CompetitionSchedule
from moefold.train.competition import _drawn


def model(*rates: float, router: str = "compete") -> nn.Sequential:
    return nn.Sequential(
        *(
            MoEConfig(
                num_experts=3, expert_width=4, router=routers.config(router, k=2, rate=rate)
            ).build(6)
            for rate in rates
        )
    )


def routed(router: SparseRouter, x: Tensor) -> SparseRouting:
    routing = router(x)
    assert isinstance(routing, SparseRouting)
    return routing


def now(layers: nn.Sequential) -> list[bool | None]:
    found = []
    for layer in layers:
        assert isinstance(layer.router, SparseRouter)
        found.append(layer.router.experts_compete)
    return found


def test_a_full_step_sends_a_draw_back_and_only_then_forward():
    # Rate 1, three layers, four steps of which the first is warm-up, at most two layers in a step:
    #
    #   step      0  1  2  3
    #   layer 0   .  x  x  x   wishes all and finds room
    #   layer 1   .  x  x  x
    #   layer 2   .  .  .  .   wishes all, and everything is full
    table = _drawn([1.0, 1.0, 1.0], 4, 1, 2, seed=0)
    assert table.int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]


def test_a_draw_moves_to_the_nearest_earlier_step_with_room_else_to_the_nearest_later():
    # Room for one: layer 0 takes what it draws, and what layer 1 draws there as well moves.
    back = forth = 0
    for seed in range(20):
        first, second = _drawn([0.4, 0.4], 12, 0, 1, seed=seed)
        wishes = torch.rand(24, generator=torch.Generator().manual_seed(seed)).reshape(2, 12) < 0.4
        assert first.equal(wishes[0])
        taken, want = first.clone(), torch.zeros(12, dtype=torch.bool)
        for wish in wishes[1].nonzero().flatten().tolist():  # written out, step by step
            order = [wish, *range(wish - 1, -1, -1), *range(wish + 1, 12)]
            place = next((step for step in order if not taken[step]), None)
            if place is not None:
                taken[place] = want[place] = True
                back, forth = back + (place < wish - 1), forth + (place > wish)
        assert second.equal(want)
    assert back, "no draw moved back by more than a step"
    assert forth, "no draw moved on"


def test_layers_compete_as_often_as_their_rate_says_and_never_more_than_most_at_once():
    steps, rate = 4000, 0.07
    layers = model(*[rate] * 6)
    table = CompetitionSchedule(layers, steps=steps, warmup=0.25, most=2).table
    assert not table[:, :1000].any()
    assert table.sum(0).max() == 2
    # 3000 draws of a layer: 210 with a standard deviation of sqrt(3000 * .07 * .93) = 14; no draw
    # is lost, because 6 layers want 0.42 places in a step that has 2.
    sigma = math.sqrt(3000 * rate * (1 - rate))
    assert (table.sum(1) - 3000 * rate).abs().max() < 4 * sigma
    free = CompetitionSchedule(layers, steps=steps, warmup=0.25, most=None).table
    assert free.sum(0).max() > 2
    assert table.sum(1).equal(free.sum(1))


def test_the_model_follows_step_by_step():
    layers = model(0.5, 0.5)
    schedule = CompetitionSchedule(layers, steps=5, warmup=0.2, most=1, seed=4)
    assert schedule.sites == ("0", "1")
    for step in range(5):
        assert schedule.now == step
        assert now(layers) == schedule.table[:, step].tolist()
        schedule.step()
    assert schedule.table.any()
    assert now(layers) == [False, False]
    with pytest.raises(ValueError, match=r"was drawn for 5 steps, and they are over; make it with"):
        schedule.step()
    schedule.close()
    assert now(layers) == [None, None]


def test_a_layer_that_is_due_asks_all_experts():
    layers = model(0.5).train()
    schedule = CompetitionSchedule(layers, steps=20, warmup=0.0, seed=1)
    assert 0 < schedule.table.sum() < 20
    x = torch.randn(2, 5, 6)
    router = layers[0].router
    assert isinstance(router, SparseRouter)
    for step in range(20):
        rows = routed(router, x).rows_per_expert.sum()
        assert rows == (2 * 5 * 3 if schedule.table[0, step] else 2 * 5 * 2)
        assert routed(router.eval(), x).rows_per_expert.sum() == 2 * 5 * 2, "competes in evaluation"
        router.train()
        schedule.step()


def test_the_same_seed_draws_the_same_and_a_saved_schedule_goes_on():
    one, other = model(0.3, 0.3), model(0.3, 0.3)
    schedule = CompetitionSchedule(one, steps=30, seed=7)
    torch.rand(5)  # whatever else is drawn
    twin = CompetitionSchedule(other, steps=30, seed=7)
    assert twin.table.equal(schedule.table)
    different = CompetitionSchedule(other, steps=30, seed=8)
    assert not different.table.equal(schedule.table)
    for _ in range(11):
        schedule.step()
    different.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert different.now == 11
    assert now(other) == now(one)
    different.step()
    schedule.step()
    assert now(other) == now(one)
    with pytest.raises(ValueError, match=r"\[sites, steps\] = \(2, 30\), this one is for \(2, 9\)"):
        CompetitionSchedule(one, steps=9).load_state_dict(schedule.state_dict())


def test_what_cannot_be_scheduled_is_refused():
    layers = model(0.1)
    with pytest.raises(ValueError, match=r"steps is 0; it must be a positive whole number"):
        CompetitionSchedule(layers, steps=0)
    with pytest.raises(ValueError, match=r"warmup is 1\.0; it is a share of the steps, below 1"):
        CompetitionSchedule(layers, steps=3, warmup=1.0)
    with pytest.raises(ValueError, match=r"warmup is -0\.1; it must be zero or more"):
        CompetitionSchedule(layers, steps=3, warmup=-0.1)
    with pytest.raises(ValueError, match=r"most is 0; it must be a positive whole number"):
        CompetitionSchedule(layers, steps=3, most=0)
    plain = MoEConfig(num_experts=3, expert_width=4).build(6)
    with pytest.raises(ValueError, match=r"MoE has no layer in which experts could compete; make"):
        CompetitionSchedule(plain, steps=3)
