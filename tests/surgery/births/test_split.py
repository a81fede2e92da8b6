"""Splitting: every neuron goes to one expert, and all experts together are the dense MLP."""

import pytest
import torch

import moefold
from moefold import MoEConfig, Split, UpcycleConfig, routers
from moefold.surgery.births import split
from moefold.surgery.births.split import balanced_clusters
from tests.routers.common import untyped
from tests.surgery.births.test_groups import llama

ALL = routers.config("custom", choice="top-experts", k=4, weight="one")


# width 4, two experts:  neurons 0 1 | 2 3  ->  up rows, down columns; the bias b is shared out
#
#     expert 0   scale * (down[:, p0] act(up[p0] x + b_up[p0]) + b / 2)
def test_parts_are_rows_and_columns(tiny):
    model = tiny().double()
    mlp = model.encoder.layer[1]
    for linear in (mlp.intermediate.dense, mlp.output.dense):
        linear.bias.data.normal_()
    up, up_bias = mlp.intermediate.dense.weight.clone(), mlp.intermediate.dense.bias.clone()
    down, down_bias = mlp.output.dense.weight.clone(), mlp.output.dense.bias.clone()
    router = routers.config("token-choice", k=1)
    moefold.upcycle(
        model, UpcycleConfig(moe=MoEConfig(num_experts=2, router=router), birth=Split())
    )
    experts = model.encoder.layer[1].moe.experts
    seen = []
    for one in range(2):
        # Which neuron is which is told by its bias, all of which differ.
        parts = [int((up_bias == b).nonzero()) for b in experts.up_proj_bias[one]]
        assert torch.equal(experts.up_proj[one], up[parts])
        assert torch.equal(experts.down_proj[one], down[:, parts] * 2)  # num_experts / k = 2
        assert torch.equal(experts.down_proj_bias[one], down_bias)  # 2 / 2 of it
        seen += parts
    assert sorted(seen) == list(range(24))
    assert seen != list(range(24))  # one of 24! permutations


@pytest.mark.parametrize("method", ["random", "clustered"])
@pytest.mark.parametrize("host", ["bert", "llama"])
@pytest.mark.parametrize(
    ("router", "scale", "kept"),
    [
        (ALL, True, True),  # weights of one, num_experts / k = 1
        (ALL, False, True),
        (ALL, 2.0, False),
        (routers.config("mixtral", k=4), 4.0, True),  # 1/4 each for a router of zeros
        (routers.config("mixtral", k=4), True, False),  # 1/4 each of the MLP: 4 / 4 = 1
        (routers.config("token-choice", k=4), 4.0, True),
        (routers.config("custom", choice="top-experts", k=2, weight="one"), True, False),
        (routers.config("mixtral", k=2), True, False),
        (routers.config("relu"), 4.0, False),
    ],
    ids=str,
)
def test_all_parts_once_are_the_mlp(tiny, batch, host, method, router, scale, kept):
    model = (tiny(num_hidden_layers=2) if host == "bert" else llama()).double()
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            bias.data.normal_()
    real = batch["attention_mask"].bool()
    birth = Split(method=method, scale=scale, router_start="zero")
    config = UpcycleConfig(moe=MoEConfig(num_experts=4, router=router), sites="all", birth=birth)
    with torch.no_grad():
        before = model(**batch)[0][real]
        made = moefold.upcycle(model, config)
        change = (model(**batch)[0][real] - before).abs().max()
    # float64 and outputs of about 1, summed in another order: some 1e-15.
    assert made.kept_at_birth == (change < 1e-10) == kept
    assert kept or change > 1e-3


def test_clusters_hold_what_belongs_together():
    # Four heaps far from each other, equally large, shuffled: the clusters are the heaps.
    heap = torch.arange(4).repeat_interleave(6)[torch.randperm(24)]
    rows = torch.eye(4)[heap] * 10 + torch.randn(24, 4) * 0.1
    found = balanced_clusters(rows, 4)
    assert sorted(found.flatten().tolist()) == list(range(24))
    assert all(len(set(heap[cluster].tolist())) == 1 for cluster in found)
    assert torch.equal(found, balanced_clusters(rows, 4))


def test_clusters_are_balanced_where_heaps_are_not():
    rows = torch.cat([torch.zeros(9, 2), torch.ones(3, 2) * 5]) + torch.randn(12, 2) * 0.01
    found = balanced_clusters(rows, 3)
    assert sorted(found.flatten().tolist()) == list(range(12))
    # The small heap with one more row, and the two halves of the rest.
    assert sum({9, 10, 11} <= set(cluster.tolist()) for cluster in found) == 1


def test_clusters_are_nearer_than_random_parts():
    rows = torch.randn(64, 8)

    def spread(parts: torch.Tensor) -> float:
        members = rows[parts]
        return float((members - members.mean(1, keepdim=True)).square().sum())

    random = [spread(torch.randperm(64).reshape(4, 16)) for _ in range(20)]
    assert spread(balanced_clusters(rows, 4)) < min(random)


def test_rounds_make_clusters_better(monkeypatch):
    rows = torch.randn(64, 8)

    def spread() -> float:
        members = rows[balanced_clusters(rows, 4)]
        return float((members - members.mean(1, keepdim=True)).square().sum())

    settled = spread()
    monkeypatch.setattr(split, "_ROUNDS", 1)
    assert settled < spread()


# Two clusters for four rows: all are nearest to the first, which takes the two nearest.
#
#     distance to cluster 0   1 2 3 4      1   9 9 8 8
def test_a_full_cluster_takes_no_more():
    distances = torch.tensor([[1.0, 9.0], [2.0, 9.0], [3.0, 8.0], [4.0, 8.0]])
    assert split._assign(distances).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("router", "scale", "why"),
    [
        (routers.config("mixtral", k=2), True, "a token takes 2.00 of the 4 parts"),
        (routers.config("mixtral", k=4), 2.0, "the parts count 0.50 ... 0.50 times, not once"),
        (routers.config("soft"), 2.0, "experts see mixtures of tokens"),
    ],
    ids=str,
)
def test_why_it_is_another_function(tiny, router, scale, why):
    birth = Split(scale=scale, router_start="zero")
    moe = MoEConfig(num_experts=4, router=router)
    assert moefold.plan(tiny(), UpcycleConfig(moe=moe, birth=birth)).why == why


def test_rows_that_are_all_alike_have_clusters_too():
    found = balanced_clusters(torch.ones(8, 3, dtype=torch.bfloat16), 4)
    assert sorted(found.flatten().tolist()) == list(range(8))


def test_clusters_start_the_same_way_whatever_was_drawn(tiny):
    def split() -> torch.Tensor:
        torch.manual_seed(1)
        model = tiny()
        torch.manual_seed(int(torch.randint(1000, ()).item()) + len(made))
        config = UpcycleConfig(
            moe=MoEConfig(num_experts=4), sites="last:1", birth=Split(method="clustered")
        )
        moefold.upcycle(model, config, inputs=False)
        return model.encoder.layer[3].moe.experts.up_proj

    made: list[torch.Tensor] = []
    made += [split()]
    made += [split()]
    assert torch.equal(*made)


def test_a_width_that_does_not_divide(tiny):
    config = UpcycleConfig(moe=MoEConfig(num_experts=5), birth=Split())
    with pytest.raises(
        ValueError,
        match=r"layer.1: the MLP is 24 wide, which num_experts=5 does not divide; .* 3, 4, 6",
    ):
        moefold.plan(tiny(), config)


def test_a_scale_that_nothing_says(tiny):
    moe = MoEConfig(num_experts=4, router=routers.config("expert-choice"))
    with pytest.raises(ValueError, match=r"router 'expert-choice' has no k; say Split\(scale="):
        moefold.plan(tiny(), UpcycleConfig(moe=moe, birth=Split()))
    moefold.plan(tiny(), UpcycleConfig(moe=moe, birth=Split(scale=2.0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "cluster"}, "method is 'cluster'; .* Did you mean 'clustered'"),
        ({"scale": -1.0}, r"scale is -1.0; it must be a positive finite number"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, message):
    with untyped(), pytest.raises(ValueError, match=message):
        Split(**settings)


def test_another_width_is_refused(tiny):
    config = UpcycleConfig(moe=MoEConfig(num_experts=4, expert_width=24), birth=Split())
    with pytest.raises(ValueError, match=r"width 24 in 4 parts makes experts of width 6; leave"):
        moefold.plan(tiny(), config)
