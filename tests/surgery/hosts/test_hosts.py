"""Every form that is registered keeps the contract of a host, on a model of its real class.

A tiny random checkpoint is saved by the real class and opened by `from_pretrained`; see `cases`.
"""

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

import moefold
from moefold import MoEConfig, UpcycleConfig
from moefold.surgery.hosts import FORMS, find_host
from moefold.surgery.hosts.forms import known_layers, name_of
from moefold.testing import without_a_case
from moefold.testing.hosts import HOST_CHECKS, check_host, pad_left, pad_right, usual_mask
from tests.surgery.hosts.cases import CASES, Case

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=str)
OF_TRANSFORMERS = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.of_transformers], ids=str
)
PADDINGS = {"right": pad_right, "left": pad_left}


@EVERY
def test_every_registered_form_keeps_the_contract(case: Case):
    report = check_host(
        case.opened(),
        case.inputs(),
        paddings={side: PADDINGS[side] for side in case.sides},
        mask_of=usual_mask if case.sides else lambda *_: None,
        exceptions=case.exceptions,
    )
    skipped = set(case.exceptions)
    if not case.sides:
        skipped |= {"padding further", "padding is in no routing"}
    model = case.build()
    if not any(site.causal for site in find_host(model).sites(model)):
        skipped.add("causality")
    assert set(report.skipped) == skipped
    assert set(report.ran) == set(HOST_CHECKS) - skipped


def test_no_form_is_without_a_case():
    assert not without_a_case(FORMS.names(), CASES)


@EVERY
def test_the_model_of_a_case_has_layers_of_its_form(case: Case):
    layers = known_layers(case.build())
    assert {name_of(form) for _, _, form in layers} == {case.form}
    assert len(layers) == case.layers


def upcycled(model: nn.Module) -> PreTrainedModel:
    assert isinstance(model, PreTrainedModel)
    moefold.upcycle(model, UpcycleConfig(moe=MoEConfig(num_experts=3), sites="all"), inputs=False)
    return model


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@OF_TRANSFORMERS
def test_auto_classes_open_the_folder_with_and_without_a_head(case: Case, tmp_path):
    assert case.head is not None
    name, auto_name = case.head
    model = upcycled(case.build(name))
    moefold.save(model, tmp_path / "moe")
    auto = getattr(transformers, auto_name)
    opened = auto.from_pretrained(tmp_path / "moe", dtype=torch.float64)
    assert type(opened).__name__ == f"Moefold{name}"
    assert_same_weights(opened, model)
    assert_same_weights(moefold.load(tmp_path / "moe"), model)


@OF_TRANSFORMERS
def test_auto_model_opens_a_body(case: Case, tmp_path):
    model = upcycled(case.build())
    moefold.save(model, tmp_path / "moe")
    opened = transformers.AutoModel.from_pretrained(tmp_path / "moe", dtype=torch.float64)
    assert type(opened).__name__ == f"Moefold{type(model).__name__}"
    assert_same_weights(opened, model)
