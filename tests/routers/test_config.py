"""A router as data: its name and settings, saved, restored and refused."""

import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from moefold import routers
from moefold.routers import AbstractRouter, RouterConfig, SparseRouter
from moefold.routing import SparseRouting
from tests.routers.common import DIM, EXPERTS, NAMES, batch, maps, route

# A value that is not the default, for every setting there is.
OTHER = {
    "alpha": 0.1,
    "budget": 1.25,
    "by": "position",
    "capacity": 1,
    "capacity_factor": 0.5,
    "combine": "softmax",
    "convention": "flaxformer",
    "epsilon": 0.05,
    "expert_groups": 2,
    "expert_score": "token-softmax",
    "factor": 3.0,
    "gamma": 0.01,
    "group": "batch",
    "inference": "token-choice",
    "iterations": 1,
    "jitter": 0.5,
    "k": 1,
    "learning_rate": 1.0,
    "max_experts": 2,
    "min_experts": 1,
    "momentum": 0.5,
    "noise_std": 4.0,
    "priority": "gate",
    "rate": 0.5,
    "renormalize": True,
    "rule": "error",
    "scale": 2.5,
    "seed": 3,
    "slots": 3,
    "start": 0.5,
    "temperature": 1.0,
    "top_groups": 2,
    "width": 3,
}
# What has to be said beside it, on both sides, for it to matter.
BESIDE = {
    "convention": {"capacity_factor": 1.0},
    "priority": {"capacity_factor": 0.5},
    "epsilon": {"capacity": 1},
    "expert_groups": {"k": 1},
    "gamma": {"capacity": 3},
    "iterations": {"capacity": 1},
    "learning_rate": {"capacity": 1},
    "min_experts": {"budget": 1.0, "alpha": 1.0},
    "top_groups": {"k": 1, "expert_groups": 2},
}
EVERY = [(name, setting) for name in NAMES for setting in routers.known_settings(name) or ()]


def behaviour(name: str, settings: dict[str, Any]) -> list[Tensor]:
    """Everything a setting can change: maps, what is adapted in a step or two, and inference."""
    torch.manual_seed(0)
    router = routers.build(name, dim=DIM, num_experts=EXPERTS, **settings).double()
    if isinstance(router, SparseRouter):
        with torch.no_grad():
            router.weight.mul_(3)
    torch.manual_seed(1)
    given = batch()
    seen = []
    for _ in range(2):
        routing = route(router, given)
        seen += [*maps(routing), getattr(routing, "l1_strength", None)]
        router.update([routing])
        seen += router.buffers()
    seen += maps(route(router.eval(), given))
    return [value for value in seen if value is not None]


@pytest.mark.parametrize(("name", "setting"), EVERY, ids=lambda value: value)
def test_every_setting_changes_something(name, setting):
    beside = dict(BESIDE.get(setting, {}))
    if setting == "group" and name == "token-choice":
        beside = {"capacity": 1}  # dropless token choice has no groups
    if setting == "k" and name == "hash":
        beside = {"k": 2}  # 1 is its default
    one = behaviour(name, beside)
    other = {**beside, setting: OTHER[setting]}
    if setting == "renormalize" and name in ("bias-balanced", "compete"):
        other = {setting: False}  # True is its default
    two = behaviour(name, other)
    assert len(one) == len(two)
    same = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, two, strict=True)]
    assert not all(same)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_changes_anything(name):
    # The test above would pass for any setting if two equal routers differed.
    one, two = behaviour(name, {}), behaviour(name, {})
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def settings_of(name: str) -> dict[str, Any]:
    """One setting that is not the default."""
    known = routers.known_settings(name)
    return {"score": "sigmoid"} if known is None else {known[0]: OTHER[known[0]]}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_json_and_pickle(name):
    settings = settings_of(name)
    config = routers.config(name, **settings)
    assert config.to_dict() == {"name": name, "settings": settings}
    for again in (
        RouterConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
        pickle.loads(pickle.dumps(config)),
    ):
        assert again == config
        assert again != routers.config(name)


@pytest.mark.parametrize("name", NAMES)
def test_build_and_config_make_the_same_router(name):
    settings = settings_of(name)
    torch.manual_seed(0)
    one = routers.build(name, dim=DIM, num_experts=EXPERTS, **settings)
    torch.manual_seed(0)
    two = routers.config(name, **settings).build(DIM, EXPERTS)
    assert (one.dim, one.num_experts) == (two.dim, two.num_experts) == (DIM, EXPERTS)
    assert (one.reach, one.group, one.losses) == (two.reach, two.group, two.losses)
    left, right = one.state_dict(), two.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_linear_routers_start_as_v_moe_does():
    # LeCun normal: standard deviation 1 / sqrt(dim). 64 * 256 draws estimate it to 1 / sqrt(2 * n),
    # 0.6 %; five times that is allowed.
    router = routers.build("token-choice", dim=256, num_experts=64)
    assert isinstance(router, SparseRouter)
    assert router.weight.shape == (64, 256)
    assert router.weight.std().item() * 16 == pytest.approx(1, rel=0.03)
    assert router.weight.mean().item() == pytest.approx(0, abs=5 / 16 / 128)


def test_a_config_cannot_be_changed_from_outside():
    given = {"k": 2}
    config = RouterConfig("token-choice", given)
    given["k"] = 3
    assert config.settings["k"] == 2
    with pytest.raises(TypeError, match="does not support item assignment"):
        config.settings["k"] = 3  # pyright: ignore[reportIndexIssue]
    config.to_dict()["settings"]["k"] = 3
    assert config.settings["k"] == 2


def test_a_config_reads_like_its_call():
    assert str(routers.config("switch")) == "switch()"
    config = routers.config("token-choice", k=2, priority="gate")
    assert str(config) == "token-choice(k=2, priority='gate')"


def test_every_router_says_what_it_is_in_a_line():
    described = routers.names()
    assert len(set(described.values())) == len(described)
    for name, summary in described.items():
        assert summary.endswith("."), name
        assert "\n" not in summary, name


# Refusals


def test_an_unknown_router_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'token-choise'.*[Dd]id you mean 'token-choice'"):
        routers.config("token-choise")


@pytest.mark.parametrize(
    ("name", "setting", "nearest"),
    [
        ("token-choice", "capacity_facter", "capacity_factor"),
        ("unified", "alphas", "alpha"),
        ("soft", "slot", "slots"),
        ("hash", "seeds", "seed"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest(name, setting, nearest):
    given: dict[str, Any] = {setting: 1}
    message = rf"router '{name}' has no setting '{setting}'. Did you mean '{nearest}'\? It has: "
    with pytest.raises(ValueError, match=message):
        routers.config(name, **given)
    with pytest.raises(ValueError, match=message):
        routers.build(name, dim=4, num_experts=4, **given)


def test_a_setting_of_another_router_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"'mixtral' has no setting 'slots'. It has: k, jitter\.$"):
        routers.config("mixtral", slots=2)


# A router of one's own


class EveryExpert(AbstractRouter):
    """All experts for all tokens."""

    def __init__(self, dim: int, num_experts: int, *, share: float = 1.0) -> None:
        super().__init__(dim, num_experts)
        self.share = share

    def forward(self, x: Tensor, mask: Tensor | None = None, ids: Tensor | None = None):
        self.check(x, mask)
        chosen = torch.ones(*x.shape[:2], self.num_experts, dtype=torch.bool)
        return SparseRouting.from_choice(chosen, chosen * self.share)


@pytest.fixture
def every_expert(monkeypatch: pytest.MonkeyPatch) -> str:
    for store in ("_targets", "_summaries"):
        monkeypatch.setattr(routers.routers, store, dict(getattr(routers.routers, store)))
    routers.register("every-expert", EveryExpert, summary="All experts for all tokens.")
    return "every-expert"


def test_a_registered_router_is_built_by_name(every_expert):
    assert routers.names()[every_expert] == "All experts for all tokens."
    router = routers.build(every_expert, dim=2, num_experts=3, share=0.5)
    routing = router(torch.zeros(1, 2, 2))
    assert routing.weights.tolist() == [[[0.5] * 3] * 2]
    with pytest.raises(ValueError, match=r"no setting 'shares'\. Did you mean 'share'"):
        routers.config(every_expert, shares=2)
