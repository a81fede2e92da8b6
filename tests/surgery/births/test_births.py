"""All births: the plan's verdict is what happens, nothing is shared, and data makes them again."""

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch

import moefold
from moefold import (
    Copies,
    DropUpcycle,
    FromFineTunes,
    FromScratch,
    MoEConfig,
    Split,
    UpcycleConfig,
    VirtualGroups,
    routers,
)
from moefold.surgery.births import BIRTHS, AbstractBirth, birth_from_dict
from moefold.surgery.births.base import experts_per_token
from moefold.testing.host_surgery import Photograph

MADE: dict[str, AbstractBirth] = {
    "copies": Copies(),
    "copies with noise": Copies(copy_noise_std=0.05),
    "drop": DropUpcycle(),
    "drop per matrix": DropUpcycle(indices="per-matrix", fraction=0.25),
    "drop nothing": DropUpcycle(fraction=0.0),
    "split": Split(scale=2.0),
    "split as it is": Split(scale=False),
    "split in clusters": Split(method="clustered", scale=4.0, router_start="zero"),
    "groups of 1": VirtualGroups(scaling=1.0),
    "groups of 2": VirtualGroups(granularity=2, scaling="post-softmax"),
    "groups of 2, uniform": VirtualGroups(granularity=2, scaling=4.0, router_start="zero"),
    "group of 4": VirtualGroups(granularity=4, scaling="none"),
    "random": FromScratch(),
}
ROUTERS = {
    "renormalised": routers.config("token-choice", k=2, renormalize=True),
    "softmax": routers.config("token-choice", k=2),
    "one": routers.config("mixtral", k=1),
    "three": routers.config("mixtral", k=3),
    "all": routers.config("mixtral", k=4),
    "all, softmax": routers.config("token-choice", k=4),
    "all, each once": routers.config("custom", choice="top-experts", k=4, weight="one"),
    "capacity": routers.config("token-choice", renormalize=True, capacity_factor=0.5),
    "expert choice": routers.config("expert-choice", renormalize=True, capacity_factor=1.0),
    "expert choice of all": routers.config("expert-choice", renormalize=True, capacity_factor=4.0),
    "bias": routers.config("bias-balanced"),
    "relu": routers.config("relu"),
    "hash": routers.config("hash", by="position", k=2),
    "soft": routers.config("soft"),
}
# What must be kept, said by hand: so that a verdict that always says no would not pass.
KEPT = {
    "copies": {"renormalised", "one", "three", "all", "all, softmax", "expert choice of all"}
    | {"bias", "hash"},
    "split in clusters": {"all", "all, softmax", "expert choice of all"},  # each weight 1/4
    "split as it is": {"all, each once"},
    "groups of 2": {"renormalised", "all", "all, softmax", "expert choice of all", "bias", "hash"},
    "groups of 2, uniform": {"softmax"},  # E G^2 / T = 2 * 4 / 2, each weight 1/4
    "group of 4": {"all, each once"},
}
KEPT |= {"drop nothing": KEPT["copies"], "groups of 1": KEPT["copies"]}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("birth", MADE)
def test_the_verdict_on_birth_is_what_happens(tiny, batch, birth, name):
    model = tiny(num_hidden_layers=2).double()
    for parameter, bias in model.named_parameters():
        if parameter.endswith("bias"):
            bias.data.normal_()
    real = batch["attention_mask"].bool()
    moe = MoEConfig(num_experts=4, router=ROUTERS[name])
    with torch.no_grad():
        before = model(**batch)[0][real]
        config = UpcycleConfig(moe=moe, sites="last:1", birth=MADE[birth])
        made = moefold.upcycle(model, config, inputs=False)
        change = (model(**batch)[0][real] - before).abs().max()
    # float64 and outputs of a LayerNorm, so about 1: sums of other terms differ by rounding, or the
    # function is another and the output plainly different.
    assert made.kept_at_birth == (change < 1e-12), made.why
    assert made.kept_at_birth or change > 1e-4
    assert made.kept_at_birth == (name in KEPT.get(birth, set())), made.why


@pytest.mark.parametrize("birth", MADE)
@pytest.mark.parametrize("width", [1, 40])
def test_a_shared_expert_adds_nothing_at_birth(tiny, batch, birth, width):
    base = tiny(num_hidden_layers=2).double()
    outputs = []
    for shared in (0, width):
        model = copy.deepcopy(base)
        moe = MoEConfig(num_experts=4, router=routers.config("mixtral"), shared_width=shared)
        torch.manual_seed(3)
        config = UpcycleConfig(moe=moe, sites="last:1", birth=MADE[birth])
        made = moefold.upcycle(model, config, inputs=False)
        layer = model.encoder.layer[1].moe
        outputs.append((layer, made.kept_at_birth))
    (alone, kept), (with_shared, kept_too) = outputs
    assert kept == kept_too
    # Everything but the shared expert may be drawn otherwise: put the same experts into both.
    alone.experts.load_state_dict(with_shared.experts.state_dict())
    alone.router.load_state_dict(with_shared.router.state_dict())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert torch.equal(alone(x), with_shared(x))
    # And it learns: its second map gets a gradient.
    with_shared(x).square().sum().backward()
    assert float(with_shared.shared.down_proj.grad.abs().max()) > 0


@pytest.mark.parametrize("birth", MADE)
def test_weights_are_the_mixtures_own(tiny, birth):
    # Training the mixture must not train the dense MLP that waits to come back.
    model = tiny(num_hidden_layers=2)
    before = Photograph(model)
    config = UpcycleConfig(
        moe=MoEConfig(num_experts=4, router=routers.config("mixtral")), birth=MADE[birth]
    )
    moefold.upcycle(model, config)
    with torch.no_grad():
        for parameter in model.encoder.layer[1].moe.parameters():
            parameter.fill_(7.0)
    moefold.revert(model)
    before.compare(model)


@pytest.mark.parametrize("birth", MADE)
def test_frozen_experts(tiny, birth):
    model = tiny(num_hidden_layers=2).requires_grad_(False)
    config = UpcycleConfig(
        moe=MoEConfig(num_experts=4, router=routers.config("mixtral")), birth=MADE[birth]
    )
    moefold.upcycle(model, config)
    moe = model.encoder.layer[1].moe
    assert all(p.requires_grad == (birth == "random") for p in moe.experts.parameters())
    assert all(p.requires_grad for p in moe.router.parameters())


@pytest.mark.parametrize("birth", MADE)
def test_a_saved_mixture_comes_back_and_becomes_dense_again(tiny, birth, tmp_path):
    model = tiny(num_hidden_layers=2)
    dense = copy.deepcopy(model)
    config = UpcycleConfig(
        moe=MoEConfig(num_experts=4, router=routers.config("mixtral")), birth=MADE[birth]
    )
    moefold.upcycle(model, config)
    moefold.save(model, tmp_path / "out")
    loaded = moefold.load(tmp_path / "out")
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    moefold.revert(loaded, dense)
    assert all(map(torch.equal, loaded.state_dict().values(), dense.state_dict().values()))


@pytest.mark.parametrize("birth", MADE)
def test_shapes_without_values(tiny, birth):
    model = tiny(num_hidden_layers=2).to("meta")
    config = UpcycleConfig(
        moe=MoEConfig(num_experts=4, router=routers.config("mixtral")), birth=MADE[birth]
    )
    made = moefold.upcycle(model, config)
    assert sum(p.numel() for p in model.parameters()) == made.after.parameters
    assert all(p.is_meta for p in model.parameters())


def test_every_birth_is_registered_and_tried():
    tried = {type(birth).kind for birth in MADE.values()} | {FromFineTunes.kind}
    assert tried == set(BIRTHS.names())


BUILT = [*MADE.values(), FromFineTunes(models=("a", "b"), router="hidden", prompts=("x", ((1,),)))]


@pytest.mark.parametrize("birth", BUILT, ids=lambda b: type(b).__name__)
def test_json_and_back(birth):
    data = json.loads(json.dumps(birth.to_dict()))
    assert birth_from_dict(data) == birth
    assert BIRTHS.get(data["kind"]) is type(birth)
    config = UpcycleConfig(birth=birth)
    assert UpcycleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_random_experts_may_be_of_any_width(tiny, batch):
    model = tiny(num_hidden_layers=2)
    moe = MoEConfig(num_experts=4, expert_width=5, router=routers.config("mixtral"))
    made = moefold.upcycle(model, UpcycleConfig(moe=moe, birth=FromScratch()))
    experts = model.encoder.layer[1].moe.experts
    assert experts.up_proj.shape == (4, 5, 16)
    assert made.why == "the experts are random"
    # As nn.Linear: uniform within 1 / sqrt(what is summed over); 320 numbers come near the edge.
    for stack, edge in ((experts.up_proj, 16**-0.5), (experts.down_proj, 5**-0.5)):
        assert 0.9 * edge < float(stack.detach().abs().max()) <= edge
    assert bool(model(**batch)[0].isfinite().all())


@pytest.mark.parametrize(
    ("router", "number"),
    [
        (routers.config("token-choice"), 2),
        (routers.config("switch"), None),
        (routers.config("unified", budget=1.5), 1.5),
        (routers.config("seq-topk", k=3), 3),
        (routers.config("custom", choice="top-experts", k=4), 4),
        (routers.config("expert-choice"), None),
        (routers.config("soft"), None),
    ],
    ids=str,
)
def test_experts_per_token(router, number):
    assert experts_per_token(router) == number


def test_settings_of_the_router_are_shared():
    for birth in MADE.values():
        other = dataclasses.replace(birth, router_start="orthogonal", router_std=0.5)
        router: Any = routers.build("mixtral", dim=32, num_experts=4)
        other.start_router(router)
        # Rows as long as normal ones on average: 0.5 * sqrt(32), in float32.
        lengths = router.weight.detach().norm(dim=1)
        torch.testing.assert_close(lengths, torch.full((4,), 0.5 * 32**0.5), rtol=1e-5, atol=0)
