"""The config of surgery: JSON and back, and what it refuses."""

import json

import pytest
import torch

from moefold import MoEConfig, routers, upcycle
from moefold.surgery.config import Copies, UpcycleConfig
from tests.routers.common import untyped
from tests.surgery.hosts.cases import CASES

CONFIGS = {
    "defaults": UpcycleConfig(),
    "names": UpcycleConfig(sites=("a.0", "a.2"), birth=Copies(router_std=0.0, copy_noise_std=0.1)),
    "router": UpcycleConfig(
        sites="last:2",
        moe=MoEConfig(num_experts=3, router=routers.config("expert-choice", capacity_factor=1.5)),
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_json_and_back(config):
    assert UpcycleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_list_of_names_becomes_a_tuple():
    with untyped():
        assert UpcycleConfig(sites=["a", "b"]).sites == ("a", "b")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["router_std", "copy_noise_std"])
@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), "much"])
def test_copies_refuse(name, value):
    with (
        untyped(),
        pytest.raises(ValueError, match=rf"{name} is {value!r}; it must be a finite number"),
    ):
        Copies(**{name: value})


@pytest.mark.parametrize("sites", ["", ()])
def test_no_sites(sites):
    with pytest.raises(ValueError, match="sites is empty; give 'every-other'"):
        UpcycleConfig(sites=sites)


def test_unknown_settings_are_named():
    data = UpcycleConfig().to_dict() | {"site": "all"}
    with pytest.raises(ValueError, match=r"UpcycleConfig has no setting \['site'\]; it has moe,"):
        UpcycleConfig.from_dict(data)
    with pytest.raises(ValueError, match=r"Copies has no setting \['std'\]; it has router_std,"):
        Copies.from_dict({"kind": "copies", "std": 1.0})
    with pytest.raises(ValueError, match="birth of kind 'split', not 'copies'"):
        Copies.from_dict({"kind": "split"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"moe": "mixtral"},
            r"moe is 'mixtral'; it must be a moefold.MoEConfig, as in MoEConfig\(",
        ),
        ({"moe_at": {"a": "soft"}}, r"moe is 'soft'; it must be a moefold.MoEConfig"),
        (
            {"birth": "copies"},
            r"birth is 'copies'; it must be a birth with its settings, as in moef",
        ),
        ({"birth": Copies}, r"birth is <class .*Copies'>; it must be a birth with its settings"),
    ],
    ids=str,
)
def test_names_are_no_configs(settings, message):
    with untyped(), pytest.raises(ValueError, match=message):
        UpcycleConfig(**settings)


def test_inputs_go_by_name():
    model = CASES["bert"].build(None)
    with (
        untyped(),
        pytest.raises(ValueError, match=r"inputs is a Tensor; it must be True, False, "),
    ):
        upcycle(model, inputs=torch.zeros(1, 2))  # pyright: ignore[reportArgumentType]


def test_the_receipt_calls_inputs_what_it_is_told():
    case = CASES["bert"]
    receipt = upcycle(case.build(None), inputs=case.inputs(), inputs_are="two proverbs").receipt
    assert receipt is not None
    assert "measured               on two proverbs: " in str(receipt)
