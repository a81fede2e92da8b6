"""Training: it learns, whole groups at a time, and an interruption changes nothing."""

import copy
import json
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moefold import routers
from moefold.preference import (
    ConsistentComparator,
    FitConfig,
    Groups,
    NetConfig,
    PreferenceConfig,
    PreferenceModel,
    agreement,
    fit,
    preference_loss,
)
from moefold.preference.model import mean_loss
from moefold.preference.trainer import measured, steps_of
from tests.preference.common import random_groups

DECISIVE = torch.tensor([1.0, -2.0, 0.5])


def chosen_by_rule(count: int, seed: int = 0, **parts: Any) -> Groups:
    """An expert who takes the candidate whose weighted sum of features is the highest."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (count,), generator=draw)
    candidates = torch.randn(int(lengths.sum()), 3, generator=draw)
    worth = (candidates @ DECISIVE).split(lengths.tolist())
    chosen = torch.tensor([int(one.argmax()) for one in worth])
    return Groups(candidates=candidates, lengths=lengths, chosen=chosen, **parts)


def model_of(groups: Groups, name: str = "linear", **settings: Any) -> PreferenceModel:
    torch.manual_seed(1)
    return PreferenceConfig(net=NetConfig(name, settings)).build(groups)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_it_finds_what_the_expert_goes_by():
    groups = chosen_by_rule(400)
    model = model_of(groups)
    held_out = chosen_by_rule(200, seed=1)
    before = measured(model, held_out)
    config = FitConfig(epochs=6, batch_size=16, learning_rate=0.05)
    history = fit(model, groups, config, held_out=held_out)
    learnt = next(model.parameters()).flatten()
    # The choice says nothing of the scale, so only the direction is compared.
    assert torch.cosine_similarity(learnt, DECISIVE, dim=0) > 0.995
    after = measured(model, held_out)
    assert after["agreement"] > 0.95 > before["agreement"]
    assert history.held_out is not None
    # Evaluated once an epoch, the last time at the end.
    assert history.evaluated == tuple(25 * epoch for epoch in range(1, 7))
    assert history.held_out["agreement"][-1] == after["agreement"]
    assert history.held_out["loss"][-1] == pytest.approx(after["loss"], rel=1e-6)
    assert history.steps[-1] == steps_of(len(groups), config) == 150
    assert history.loss[-1] < history.loss[0]
    assert not model.training


def test_every_group_is_seen_once_an_epoch_in_another_order():
    groups = chosen_by_rule(10)
    seen: list[int] = []

    class Watched(nn.Module):
        """Its score is its input; it notes the first feature of every candidate."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.extend(x[:, 0].long().tolist())
            return self.weight * x[:, 0]

    number = torch.arange(10).repeat_interleave(groups.lengths).float()
    numbered = replace(groups, candidates=number.unsqueeze(1))
    model = PreferenceModel(ConsistentComparator(Watched()))
    fit(model, numbered, FitConfig(epochs=3, batch_size=4))
    # Candidates lie together, so that runs of one number are groups.
    order = [n for at, n in enumerate(seen) if at == 0 or seen[at - 1] != n]
    epochs = [order[:10], order[10:20], order[20:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1]
    assert steps_of(10, FitConfig(epochs=3, batch_size=4)) == 8


def test_weights_count_across_batches(monkeypatch):
    # As many copies of a group as its weight says, or the weight: the same mean gradient.
    groups = chosen_by_rule(4)
    weighted = replace(groups, weights=torch.tensor([3.0, 1.0, 0.0, 2.0]))
    copies = groups.take([0, 0, 0, 1, 3, 3])
    whole, parts = model_of(groups), model_of(groups)
    whole(**copies.as_inputs())["loss"].backward()
    rate = 1e-3
    before = next(parts.parameters()).detach().clone()

    def plain(trainer: Any, model: Any = None) -> Any:
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=rate)
        return trainer.optimizer

    def constant(trainer: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, 1.0)
        return trainer.lr_scheduler

    monkeypatch.setattr("transformers.Trainer.create_optimizer", plain)
    monkeypatch.setattr("transformers.Trainer.create_scheduler", constant)
    config = FitConfig(epochs=1, batch_size=1)
    steps: list[int] = []
    fit(parts, weighted, config, advance=steps.append)
    assert len(steps) == 3  # the group of weight 0 is not looked at
    moved = (before - next(parts.parameters()).detach()) / rate / 3
    # Three steps of a small rate are one of their mean gradient, to first order.
    torch.testing.assert_close(moved, next(whole.parameters()).grad, rtol=2e-2, atol=1e-3)


def test_the_loss_of_a_model_is_that_of_its_comparator(monkeypatch):
    groups = chosen_by_rule(7)
    model = model_of(groups, "mlp", hidden=4)
    for name in ("pair-logistic", "listwise"):
        model.loss, model.loss_settings = name, {"centring": 0.1}
        found = model(**groups.as_inputs())
        wanted = preference_loss(model.comparator, groups, name, centring=0.1)
        torch.testing.assert_close(found["loss"], wanted, rtol=0, atol=0)
        gradient = torch.autograd.grad(found["loss"], list(model.parameters()))
        other = torch.autograd.grad(wanted, list(model.parameters()))
        # Scores are made once here and twice there; float32 sums differ in the last bits.
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["scores"], model.values(groups))
    # From values that are known, from all groups at once, and from parts: the same mean.
    monkeypatch.setattr("moefold.preference.model.AT_ONCE", 9)
    weighted = replace(groups, weights=torch.tensor([0, 1, 2, 3, 0.5, 1, 1]))
    whole = float(model(**weighted.as_inputs())["loss"].detach())
    assert mean_loss(model, weighted) == pytest.approx(whole, rel=1e-6)
    assert mean_loss(model, weighted, model.values(groups)) == pytest.approx(whole, rel=1e-6)
    assert "loss" not in model(candidates=groups.candidates, lengths=groups.lengths)


class StopError(Exception):
    """What pulls the plug."""


def interrupt_at(step: int) -> Any:
    def advance(done: int) -> None:
        if done == step:
            raise StopError

    return advance


class Noisy(nn.Module):
    """A scorer with dropout, which draws a number in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def noisy() -> PreferenceModel:
    torch.manual_seed(2)
    return PreferenceModel(ConsistentComparator(Noisy()))


@pytest.mark.parametrize("step", [3, 14, 29])
def test_an_interrupted_run_ends_where_it_would_have(step, tmp_path):
    groups, held_out = chosen_by_rule(40), chosen_by_rule(10, seed=1)
    config = FitConfig(epochs=3, batch_size=4, save_every=5, evaluate_every=7)
    whole = noisy()
    history = fit(whole, groups, config, held_out=held_out)
    cut = noisy()
    with pytest.raises(StopError):
        fit(cut, groups, config, held_out=held_out, folder=tmp_path, advance=interrupt_at(step))
    steps: list[int] = []
    again = noisy()
    resumed = fit(
        again,
        groups,
        config,
        held_out=held_out,
        folder=tmp_path,
        resume=True,
        advance=steps.append,
    )
    assert steps[0] == step - step % 5 + 1  # after the last checkpoint, not from the beginning
    assert steps[-1] == 30
    assert same_weights(whole, again)
    assert resumed == history


def test_what_routers_adapt_goes_on_as_well(tmp_path):
    groups = chosen_by_rule(40)
    settings: Any = {
        "num_experts": 3,
        "hidden": 4,
        "router": routers.config("bias-balanced", k=1),
    }
    config = FitConfig(epochs=2, batch_size=4, save_every=5)
    start = model_of(groups, "mixture", **settings)
    whole = model_of(groups, "mixture", **settings)
    assert same_weights(start, whole)
    fit(whole, groups, config)
    # The router's biases move without a gradient, after every step.
    name = "comparator.scorer.router.state"
    assert not torch.equal(whole.get_buffer(name), start.get_buffer(name))
    cut, again = (model_of(groups, "mixture", **settings) for _ in range(2))
    with pytest.raises(StopError):
        fit(cut, groups, config, folder=tmp_path, advance=interrupt_at(13))
    fit(again, groups, config, folder=tmp_path, resume=True)
    assert same_weights(whole, again)


def test_checkpoints_are_safetensors_and_json(tmp_path):
    groups = chosen_by_rule(12)
    model = model_of(groups)
    fit(model, groups, FitConfig(epochs=2, batch_size=4, save_every=2), folder=tmp_path)
    folders = sorted(place.name for place in tmp_path.iterdir())
    assert folders == ["checkpoint-4", "checkpoint-6"]
    names = {file.name for file in (tmp_path / "checkpoint-6").iterdir()}
    assert names == {"model.safetensors", "moefold_training.safetensors", "trainer_state.json"}
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert torch.equal(saved["comparator.scorer.out.weight"], next(model.parameters()))
    # A run that is over stays over: no step is taken.
    steps: list[int] = []
    config = FitConfig(epochs=2, batch_size=4, save_every=2)
    over = model_of(groups)
    fit(over, groups, config, folder=tmp_path, resume=True, advance=steps.append)
    assert steps == []
    assert same_weights(over, model)


def test_half_a_checkpoint_is_none(tmp_path):
    groups = chosen_by_rule(40)
    config = FitConfig(epochs=3, batch_size=4, save_every=5)
    whole, again = noisy(), noisy()
    fit(whole, groups, config, folder=tmp_path)
    (tmp_path / "checkpoint-30" / "moefold_training.safetensors").unlink()
    steps: list[int] = []
    fit(again, groups, config, folder=tmp_path, resume=True, advance=steps.append)
    assert steps == [26, 27, 28, 29, 30]
    assert same_weights(whole, again)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    groups = chosen_by_rule(12)
    config = FitConfig(epochs=2, batch_size=4, save_every=2)
    fit(model_of(groups), groups, config, folder=tmp_path)
    words = "checkpoint-6 is of a run with other groups, another model or other settings"
    others = {
        "groups": (model_of(groups), chosen_by_rule(12, seed=1), config),
        "model": (model_of(groups, "mlp", hidden=4), groups, config),
        "settings": (model_of(groups), groups, replace(config, learning_rate=0.5)),
    }
    for model, data, how in others.values():
        with pytest.raises(ValueError, match=words):
            fit(model, data, how, folder=tmp_path, resume=True)
    # From the beginning, it is nobody's business what lies there; and it is gone.
    other = replace(config, learning_rate=0.5)
    with pytest.raises(StopError):
        fit(model_of(groups), groups, other, folder=tmp_path, advance=interrupt_at(3))
    assert [place.name for place in tmp_path.iterdir()] == ["checkpoint-2"]
    steps: list[int] = []
    fit(model_of(groups), groups, other, folder=tmp_path, resume=True, advance=steps.append)
    assert steps == [3, 4, 5, 6]
    state = tmp_path / "checkpoint-6" / "moefold_training.safetensors"
    state.write_bytes(state.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"training\.safetensors is damaged \(.*; remove .*-6 to"):
        fit(model_of(groups), groups, config, folder=tmp_path, resume=True)


def _seed_all() -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 - the global one is meant
    torch.manual_seed(3)


def test_random_numbers_of_the_caller_are_left_alone():
    groups = chosen_by_rule(6)
    _seed_all()
    wanted = random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002
    model = model_of(groups)
    _seed_all()
    fit(model, groups, FitConfig(epochs=1))
    assert wanted == (random.random(), np.random.rand(), float(torch.rand(())))  # noqa: NPY002


def test_bad_input_is_explained():
    groups = chosen_by_rule(6)
    bare = Groups(candidates=groups.candidates, lengths=groups.lengths)
    with pytest.raises(ValueError, match="train has no choice, ranks or utilities"):
        fit(model_of(groups), bare)
    with pytest.raises(ValueError, match="held_out has no choice, ranks or utilities"):
        fit(model_of(groups), groups, held_out=bare)
    with pytest.raises(ValueError, match="train has no groups; give at least one"):
        fit(model_of(groups), groups.take([]))
    with pytest.raises(ValueError, match="train has weights that are all 0; give some group a wei"):
        fit(model_of(groups), replace(groups, weights=torch.zeros(6)))
    frozen = model_of(groups)
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters that are trained"):
        fit(frozen, groups)
    wild = model_of(groups)
    huge = replace(groups, candidates=torch.as_tensor(groups.candidates) * 1e38)
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) after \d steps; lower the lear"):
        fit(wild, huge, FitConfig(epochs=1, batch_size=2, learning_rate=1e3, warmup=0))
    for name in ("epochs", "batch_size", "learning_rate", "save_every"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be positive"):
            FitConfig(**{name: 0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"warmup is 1\.0 and weight_decay 0\.0"):
        FitConfig(warmup=1.0)


def test_values_do_not_depend_on_how_many_are_valued_together(monkeypatch):
    groups = chosen_by_rule(30)
    model = model_of(groups, "mlp", hidden=4)
    whole = model.values(groups)
    monkeypatch.setattr("moefold.preference.model.AT_ONCE", 9)
    parts: list[int] = []
    torch.testing.assert_close(model.values(groups, advance=parts.append), whole)
    assert len(parts) > 5
    assert sum(parts) == 30
    one = Groups(candidates=torch.randn(40, 3), lengths=torch.tensor([40]))
    assert len(model.values(one)) == 40  # a group larger than a part is one


def test_standardized_features_have_no_scale():
    groups = chosen_by_rule(60)
    assert isinstance(groups.candidates, torch.Tensor)
    # Units and offsets of the features are nothing that a net should have to learn.
    other = replace(groups, candidates=groups.candidates * torch.tensor([1e3, 1e-3, 1.0]) + 7)
    config = PreferenceConfig(net=NetConfig("mlp", {"hidden": 4}), standardize=True)
    values = []
    for data in (groups, other):
        torch.manual_seed(0)
        model = config.build(data)
        fit(model, data, FitConfig(epochs=2, batch_size=8))
        values.append(model.values(data))
    # 7 and features of 1e-3 leave four digits in float32.
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=5e-3)
    still = replace(groups, candidates=torch.ones_like(groups.candidates))
    assert config.build(still).values(still).isfinite().all()


def test_chances_are_those_of_the_pairs():
    groups = chosen_by_rule(9)
    model = model_of(groups)
    model.temperature = 2.0
    chances, values = model.probabilities(groups), model.values(groups)
    for p, s in zip(
        chances.split(groups.lengths.tolist()), values.split(groups.lengths.tolist()), strict=True
    ):
        torch.testing.assert_close(p.sum(), torch.tensor(1.0))
        torch.testing.assert_close(p[0] / (p[0] + p[1]), ((s[0] - s[1]) / 2).sigmoid())
    mirror = PreferenceConfig(net=NetConfig("mirror"), comparator="antisymmetric").build(groups)
    with pytest.raises(ValueError, match="AntisymmetricComparator tells chances of pairs only"):
        mirror.probabilities(groups)
    assert float(agreement(mirror.values(groups), groups).mean()) <= 1


def test_configs_are_checked_and_are_plain_data():
    config = PreferenceConfig(
        net=NetConfig("mixture", {"num_experts": 3, "router": routers.config("token-choice", k=2)}),
        loss="listwise",
        loss_settings={"centring": 0.5},
        standardize=True,
        features=5,
    )
    assert PreferenceConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    with pytest.raises(ValueError, match="comparator is 'fair'; allowed: 'consistent', 'antisym"):
        PreferenceConfig(comparator="fair")
    with pytest.raises(ValueError, match="the net 'mlp' does not go with a comparator that is fre"):
        PreferenceConfig(comparator="free")
    with pytest.raises(ValueError, match="unknown preference loss 'listwize'; did you mean"):
        PreferenceConfig(loss="listwize")
    groups = chosen_by_rule(3)
    with pytest.raises(ValueError, match="features is 5, but the groups have 3"):
        config.build(groups)
    texts = Groups.of([["a", "b"]], chosen=[0])
    with pytest.raises(ValueError, match="candidates are texts; the net 'mlp' takes a vector"):
        PreferenceConfig().build(texts)


def test_a_relative_path_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    groups = chosen_by_rule(6)
    fit(model_of(groups), groups, FitConfig(epochs=1, batch_size=3), folder="run")
    assert (Path("run") / "checkpoint-2").is_dir()


def test_what_gives_a_loss_is_trained_and_what_chooses_is_measured():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = PreferenceConfig(net=NetConfig("mlp")).build(random_groups(4))

        def forward(self, **parts: Any) -> dict[str, Any]:
            return {"loss": 2 * self.model(**parts)["loss"]}

    groups = random_groups(20)
    wrapped = Wrapped()
    before = float(wrapped(**groups.as_inputs())["loss"].detach())
    fit(wrapped, groups, FitConfig(epochs=5, batch_size=5, learning_rate=0.02))
    assert float(wrapped(**groups.as_inputs())["loss"].detach()) < 0.9 * before
    with pytest.raises(ValueError, match="what a PreferenceModel chooses, and a Wrapped is none"):
        fit(wrapped, groups, held_out=groups)
