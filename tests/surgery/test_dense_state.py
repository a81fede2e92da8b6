"""The names of what a state dict numbers, and what is no state dict."""

import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from transformers import Trainer

from moefold.surgery.dense_state import by_name, decays, kind_of
from moefold.surgery.lineage import DenseParameter
from tests.surgery.test_lineage import bert, llama, phi3, t5

KIND = kind_of(AdamW([torch.zeros(1)]))


def facts(model: Any) -> dict[str, DenseParameter]:
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    return {
        name: DenseParameter(
            shape=tuple(p.shape), trained=p.requires_grad, in_layer_norm=id(p) in norms
        )
        for name, p in model.named_parameters()
    }


def stepped(model: Any, *groups: list[str]) -> dict:
    """A state dict whose `exp_avg` says which parameter it is of: a tenth of its place."""
    places = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    optimizer = AdamW([{"params": [model.get_parameter(n) for n in group]} for group in groups])
    for name, place in places.items():
        model.get_parameter(name).grad = torch.full_like(model.get_parameter(name), float(place))
    optimizer.step()
    return optimizer.state_dict()


class Small(nn.Module):
    """Two square maps, a norm, a table: enough to tell the orders apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.table = nn.Embedding(5, 3)
        self.rel_bias = nn.Embedding(4, 3)


EVERYTHING = [
    "first.weight",
    "first.bias",
    "norm.weight",
    "norm.bias",
    "table.weight",
    "rel_bias.weight",
]
#                 decay                              none
TRAINERS = [
    ["first.weight", "table.weight"],
    ["first.bias", "norm.weight", "norm.bias", "rel_bias.weight"],
]
#                 matrices                                              the rest
MATRICES = [
    ["first.weight", "table.weight", "rel_bias.weight"],
    ["first.bias", "norm.weight", "norm.bias"],
]


@pytest.mark.parametrize(
    "groups", [[EVERYTHING], TRAINERS, MATRICES], ids=["one group", "Trainer", "matrices first"]
)
def test_orders_in_use_are_found(groups):
    model = Small()
    found = by_name(stepped(model, *groups), facts(model), KIND)
    for place, name in enumerate(EVERYTHING):
        # The first step of Adam: exp_avg = (1 - 0.9) * gradient, up to a rounding of float32.
        expected = torch.full_like(model.get_parameter(name), 0.1 * place)
        torch.testing.assert_close(found[name]["exp_avg"], expected, rtol=1e-6, atol=0.0)


def test_only_what_was_trained_is_counted():
    model = Small()
    model.first.requires_grad_(False)
    left = [name for name in EVERYTHING if not name.startswith("first")]
    found = by_name(stepped(model, left), facts(model), KIND)
    assert set(found) == set(left)


@pytest.mark.parametrize("build", [bert, llama, phi3, t5])
def test_trainers_first_group_is_what_trainer_says(build):
    model = build()
    wanted = set(Trainer.get_decay_parameter_names(object.__new__(Trainer), model))
    found = {name for name, parameter in facts(model).items() if decays(name, parameter)}
    assert found == wanted & set(facts(model))  # theirs lists tied weights twice
    assert 0 < len(found) < len(facts(model))


def test_names_that_are_given_count():
    model = Small()
    backwards = EVERYTHING[::-1]
    found = by_name(stepped(model, backwards), facts(model), KIND, backwards)
    torch.testing.assert_close(found["rel_bias.weight"]["exp_avg"], torch.full((4, 3), 0.5))


def test_an_optimiser_that_keeps_nothing_has_nothing_to_carry():
    model = Small()
    optimizer = SGD(model.parameters(), lr=0.1)
    assert by_name(optimizer.state_dict(), facts(model), kind_of(optimizer)) == {}


def test_an_order_that_nobody_uses_is_asked_for():
    model = Small()
    match = (
        r"the state is of 6 parameters \(by group\), which fits the dense model in none of the "
        r"orders known \(trained: 6; trained, as Trainer: 2, 4; trained, matrices first: 3, 3; .* "
        r"pass names=\[...\]"
    )
    with pytest.raises(ValueError, match=match):
        by_name(stepped(model, EVERYTHING[::-1]), facts(model), KIND)


def test_two_orders_that_fit_are_not_guessed_between():
    # Trainer's groups are [b], [a], for `a` belongs to a LayerNorm; matrices and the rest [a], [b].
    parameters = {
        "a": DenseParameter(shape=(3, 3), trained=True, in_layer_norm=True),
        "b": DenseParameter(shape=(3,), trained=True, in_layer_norm=False),
    }
    groups = [{"params": [0]}, {"params": [1]}]
    for shape, name in (((3,), "b"), ((3, 3), "a")):  # here the shape of the first one decides
        moments = {"exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
        entry = {"step": torch.tensor(1.0), **moments}
        found = by_name({"state": {0: entry}, "param_groups": groups}, parameters, KIND)
        assert list(found) == [name]
    nothing = {"step": torch.tensor(1.0), "exp_avg": None, "exp_avg_sq": None}
    with pytest.raises(ValueError, match=r"fits the dense model in 2 orders .* pass names="):
        by_name({"state": {0: nothing}, "param_groups": groups}, parameters, KIND)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (EVERYTHING[:-1], r"there are 5 names for a state of 6 parameters; give one for each"),
        ([*EVERYTHING[:-1], "first.bias"], r"the names hold first.bias more than once"),
        (
            [*EVERYTHING[:-1], "rel_bias.wait"],
            r"names rel_bias.wait, which is no parameter .*; did you mean rel_bias.weight\?",
        ),
        (
            EVERYTHING[::-1],
            r"the state of rel_bias.weight is of another shape: exp_avg is \[3, 3\], not \[4, 3\]",
        ),
    ],
)
def test_names_that_do_not_match(names, match):
    model = Small()
    with pytest.raises(ValueError, match=match):
        by_name(stepped(model, EVERYTHING), facts(model), KIND, names)


def test_a_checkpoint_that_holds_more_than_the_optimiser():
    match = r"no state dict of an optimiser: it has the entries model, optimizer, not `state` and"
    with pytest.raises(ValueError, match=match):
        by_name({"model": {}, "optimizer": {}}, {}, KIND)


def test_files_that_are_none(tmp_path):
    (tmp_path / "model.safetensors").touch()
    match = (
        r"has no optimizer.pt or optimizer.bin, only model.safetensors; pass a checkpoint folder"
    )
    with pytest.raises(ValueError, match=match):
        by_name(tmp_path, {}, KIND)
    with pytest.raises(ValueError, match=r"there is no file or folder .*nowhere.pt"):
        by_name(tmp_path / "nowhere.pt", {}, KIND)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt holds a list, not the state dict of an opt"):
        by_name(str(tmp_path / "list.pt"), {}, KIND)


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def test_a_file_that_would_run_code_is_not_opened(tmp_path):
    torch.save({"state": Harmful(), "param_groups": []}, tmp_path / "optimizer.pt")
    match = r"optimizer.pt is not opened \(Weights only load failed.*tensors and numbers only"
    with pytest.raises(ValueError, match=match):
        by_name(tmp_path, {}, KIND)
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=r"optimizer.pt is not opened"):
        by_name(tmp_path, {}, KIND)
