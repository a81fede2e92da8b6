"""When experts are asked whether they are alike: what pairs collect, what is due, what is left."""

import pytest
import torch
from torch import nn

from moefold import MoE, MoEConfig, routers
from moefold.routing import SparseRouting
from moefold.train import SimilaritySchedule
from moefold.train.similarity import shared_tokens


def layer(*, experts: int = 3, **settings) -> MoE:
    torch.manual_seed(0)
    router = routers.config("mixtral", k=min(2, experts))
    return MoEConfig(num_experts=experts, expert_width=4, router=router, **settings).build(6)


def test_shared_tokens_by_hand():
    #   token     0     1     2     3 (padding)
    #   experts   0 1   0 1   1 2
    chosen = [[[1, 1, 0], [1, 1, 0], [0, 1, 1], [0, 0, 0]]]
    mask = torch.tensor([[True, True, True, False]])
    marks = torch.tensor(chosen, dtype=torch.bool)
    routing = SparseRouting.from_choice(marks, torch.ones(1, 4, 3), mask=mask)
    want = torch.tensor([[0, 2, 0], [0, 0, 1], [0, 0, 0]]) / 3
    assert torch.equal(shared_tokens(routing), want)
    nobody = SparseRouting.from_choice(marks[:, :0], torch.ones(1, 0, 3))
    assert torch.equal(shared_tokens(nobody), torch.zeros(3, 3))
    soft = routers.build("soft", dim=6, num_experts=3)(torch.randn(1, 4, 6))
    assert torch.equal(shared_tokens(soft), torch.zeros(3, 3))


def test_a_pair_is_looked_at_when_it_has_collected_enough():
    # Two experts and k = 2: each pass, all tokens are shared, the pair collects 1. Two passes a
    # step collect 2, 4, and 6 > 5: then it is due, and begins anew.
    moe = layer(experts=2, losses={"balance": 0.1}).train()
    schedule = SimilaritySchedule(moe, frequency=5.0, coefficient=0.7)
    due = []
    for _ in range(7):
        due.append("cka" in moe.losses)
        for _ in range(2):
            moe(torch.randn(2, 4, 6)).sum().backward()
        schedule.step()
    assert due == [False, False, False, True, False, False, True]
    assert schedule.collected[""][0, 1] == 2
    assert moe.losses == {"balance": 0.1}
    moe(torch.randn(2, 4, 6))
    schedule.step()
    for _ in range(3):
        moe(torch.randn(2, 4, 6))
    schedule.step()
    assert schedule.due == {"": True}
    assert moe.losses == {"balance": 0.1, "cka": 0.7}
    schedule.close()
    assert moe.losses == {"balance": 0.1}
    assert moe.sinks == ()


def test_layers_are_due_each_by_itself():
    model = nn.Sequential(layer(experts=2), layer(experts=1), layer(experts=3)).train()
    schedule = SimilaritySchedule(model, frequency=1.5, loss="diversity")
    assert set(schedule.due) == {"0", "2"}
    # The first layer's pair collects 1 a pass; the third layer's three pairs share 1 among them.
    for _ in range(2):
        model(torch.randn(1, 30, 6))
        schedule.step()
    assert schedule.due == {"0": True, "2": False}
    assert sum(schedule.collected["2"].flatten().tolist()) == pytest.approx(2, abs=1e-6)
    schedule.close()


def test_what_cannot_be_scheduled_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no MoE layer with two experts; upcycle it"):
        SimilaritySchedule(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"frequency is -1; it must be zero or more"):
        SimilaritySchedule(layer(), frequency=-1)
    with pytest.raises(ValueError, match=r"coefficient is -1; it must be zero or more"):
        SimilaritySchedule(layer(), coefficient=-1)
    with pytest.raises(ValueError, match=r"unknown output loss 'balance'; .*Registered: cka"):
        SimilaritySchedule(layer(), loss="balance")
