"""Checks of a host: surgery is planned, exact, complete, undone, saved and copied.

Shapes: outputs are compared where tokens are real, `real dim`.
"""

import copy
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from moefold import surgery
from moefold.moe import MoEConfig
from moefold.surgery import UpcycleConfig
from moefold.surgery.hosts import find_host
from moefold.surgery.hosts.plain import PlainHost
from moefold.testing.host_probe import (
    ROUTERS,
    TOLERANCE,
    HostCase,
    config_of,
    distance,
    mixtures_in,
    spread_experts,
)

_KEEPING = config_of(ROUTERS["token"])
_KINDS = ("token", "sequence", "soft")


def plan_touches_nothing(case: HostCase) -> str | None:
    """A plan finds every site, none of them refused, and leaves the model as it was."""
    model = case.fresh()
    before = Photograph(model)
    made = surgery.plan(model, _KEEPING)
    assert case.sites, "it has no site"
    assert len(made.chosen) == len(made.sites) == len(case.sites), str(made)
    before.compare(model)
    return None


def function_is_kept_as_declared(case: HostCase) -> str | None:
    """The plan says whether the function is kept, the receipt and the output say the same."""
    dense = case.run(case.dense)
    for name in _KINDS:
        router = ROUTERS[name]
        if not case.names(router):
            continue
        model = case.fresh()
        made = surgery.upcycle(model, config_of(router, case.names(router)), inputs=case.inputs)
        receipt = made.receipt
        assert receipt is not None, made.unmeasured
        assert set(receipt.sites) == set(made.chosen), f"measured at {', '.join(receipt.sites)}"
        errors = {
            "the output": distance(case.run(model), dense),
            "the receipt's output": receipt.error,
            **{f"the receipt's {site}": one.error for site, one in receipt.sites.items()},
        }
        for what, error in errors.items():
            said = "keeps the function" if made.kept_at_birth else f"does not ({made.why})"
            assert (error < TOLERANCE) == made.kept_at_birth, (
                f"the plan says that router {name!r} {said}, but {what} is off by {error:.1e}"
            )
        if name == "token":
            assert made.kept_at_birth, made.why
            for site, one in receipt.sites.items():
                assert one.coverage == 1.0, f"{site}: coverage {one.coverage}"
                # The weights are float32 and sum to one to a rounding or two.
                assert abs(one.mass - 1) < 1e-6, f"{site}: combine mass {one.mass}"
                assert abs(one.similarity - 1) < TOLERANCE, f"{site}: similarity {one.similarity}"
    return None


@torch.no_grad()
def every_mixture_matters(case: HostCase) -> str | None:
    """Without its experts each of the mixtures would be missed: the other checks see something."""
    model = case.fresh()
    surgery.upcycle(model, _KEEPING, inputs=False)
    before = case.run(model)
    for name, moe in mixtures_in(model).items():
        kept = copy.deepcopy(moe.experts.state_dict())
        for parameter in moe.experts.parameters():
            parameter.zero_()
        change = distance(case.run(model), before)
        assert change > 1e-3, f"{name} without experts changes the output by {change:.1e} only"
        moe.experts.load_state_dict(kept)
    return None


def revert_is_exact(case: HostCase) -> str | None:
    """Objects, classes, attributes, order and every bit come back, also a second time."""
    model = case.fresh()
    before = Photograph(model)
    for router in (ROUTERS["token"], ROUTERS["soft"]):
        if case.names(router):
            surgery.upcycle(model, config_of(router, case.names(router)), inputs=False)
            assert mixtures_in(model), "upcycle made no mixture"
            surgery.revert(model)
            before.compare(model)
    return None


def revert_after_training(case: HostCase) -> str | None:
    """The MLPs come back as they were before a step of training; the rest keeps what it learnt."""
    model = case.fresh()
    before = Photograph(model)
    surgery.upcycle(model, _KEEPING, inputs=False)
    model.train()
    _train_a_step(case, model)
    model.eval()
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    stayed = [name for name in before.values if name in trained]
    assert any(not torch.equal(trained[name], before.values[name]) for name in stayed), (
        "a step of training changed nothing"
    )
    surgery.revert(model)
    after = Photograph(model)
    assert after.modules == before.modules, "other modules came back"
    assert list(after.values) == list(before.values), "the order of the state dict is another"
    for name, value in after.values.items():
        wanted = trained.get(name, before.values[name])
        assert torch.equal(value, wanted), f"{name} has other values than it must have"
    return None


def all_or_nothing(case: HostCase) -> str | None:
    """A plan that fails, or a failure in the middle of surgery, leaves the model untouched."""
    model = case.fresh()
    before = Photograph(model)
    too_wide = UpcycleConfig(moe=MoEConfig(expert_width=case.sites[0].width + 1), sites="all")
    for config in (too_wide, UpcycleConfig(sites=r"nowhere\.at\.all")):
        _must_fail(ValueError, lambda config=config: surgery.upcycle(model, config))
        before.compare(model)
    host = type(find_host(model))
    install, sign, done = host.install, host.sign, []

    def install_half(self: Any, model: Any, site: Any, moe: Any, changes: Any) -> None:
        install(self, model, site, moe, changes)
        done.append(site.name)
        if len(done) == len(case.sites):
            changes.set_attribute(site.layer, "half", True)
            raise _StopError

    def sign_and_fail(self: Any, *given: Any) -> None:
        sign(self, *given)
        raise _StopError

    for name, failing in (("install", install_half), ("sign", sign_and_fail)):
        with mock.patch.object(host, name, failing):
            _must_fail(_StopError, lambda: surgery.upcycle(model, _KEEPING, inputs=False))
        before.compare(model)
    surgery.upcycle(model, _KEEPING, inputs=False)  # nothing stands in the way of the next try
    return None


def second_surgery(case: HostCase) -> str | None:
    """An upcycled model is not operated on again."""
    model = case.fresh()
    surgery.upcycle(model, config_of(ROUTERS["token"], (case.sites[0].name,)), inputs=False)
    before = Photograph(model)
    for call in (surgery.plan, surgery.upcycle):
        message = _must_fail(ValueError, lambda call=call: call(model, _KEEPING))
        assert "already upcycled at" in message, message
        before.compare(model)
    return None


def saved_form(case: HostCase) -> str | None:
    """What is loaded has every bit of what was saved; saving it again writes the same weights."""
    for name in ("token", "soft"):  # of the two kinds of routing
        router = ROUTERS[name]
        if not case.names(router):
            continue
        model = case.fresh()
        surgery.upcycle(model, config_of(router, case.names(router)), inputs=False)
        spread_experts(model)
        with tempfile.TemporaryDirectory() as folder:
            one, two = Path(folder, "one"), Path(folder, "two")
            surgery.save(model, one)
            loaded = _load(case, one)
            _same_weights(loaded, model)
            change = distance(case.run(loaded), case.run(model))
            assert change < TOLERANCE, f"loaded with router {name!r} it is off by {change:.1e}"
            surgery.save(loaded, two)
            again = _load(case, two)
            _same_weights(again, model)
            for file in sorted(one.rglob("*.safetensors")):
                other = two / file.relative_to(one)
                assert file.read_bytes() == other.read_bytes(), f"{file.name} is written otherwise"
    return None


def copies(case: HostCase) -> str | None:
    """Deep copies and pickles compute the same, share nothing, and can be reverted."""
    model = case.fresh()
    surgery.upcycle(model, _KEEPING, inputs=False)
    spread_experts(model)
    output = case.run(model)
    for how, twin in (
        ("a deep copy", copy.deepcopy(model)),
        ("a pickle", pickle.loads(pickle.dumps(model))),
    ):
        _same_weights(twin, model)
        change = distance(case.run(twin), output)
        assert change < TOLERANCE, f"{how} is off by {change:.1e}"
        surgery.revert(twin)
        _same_weights(twin, case.dense)
        assert not mixtures_in(twin), f"{how} is not reverted"
    assert torch.equal(case.run(model), output), "reverting a copy changed the original"
    return None


class Photograph:
    """Everything surgery could change in a model.

    Attributes:
        modules: name, object, class and plain attributes of every module.
        values: the state dict, in its order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [
            (name, id(module), type(module), _attributes(module))
            for name, module in model.named_modules()
        ]
        self.parameters = [
            (name, id(parameter), parameter.requires_grad)
            for name, parameter in model.named_parameters()
        ]
        self.values = {name: value.clone() for name, value in model.state_dict().items()}

    def compare(self, model: nn.Module) -> None:
        """Raise unless the model still looks like that."""
        now = Photograph(model)
        for mine, theirs in zip(self.modules, now.modules, strict=False):
            assert mine == theirs, f"{mine[0] or 'the model'} is not what it was: {mine}, {theirs}"
        assert len(self.modules) == len(now.modules), "there are more modules, or fewer"
        assert self.parameters == now.parameters, "the parameters are others"
        assert list(self.values) == list(now.values), "the order of the state dict is another"
        for name, value in self.values.items():
            assert torch.equal(value, now.values[name]), f"{name} has other values"


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Plain attributes by the objects they are; of dictionaries of hooks and children, the keys."""
    return {
        name: tuple(value) if isinstance(value, dict) else id(value)
        for name, value in module.__dict__.items()
        if not isinstance(value, bool | int | float | str)
    } | {
        name: value
        for name, value in module.__dict__.items()
        if isinstance(value, bool | int | float | str)
    }


class _StopError(Exception):
    """What is raised in the middle of surgery."""


def _must_fail(kind: type[Exception], call: Callable[[], object]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


def _train_a_step(case: HostCase, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    case.answer(model, case.inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _load(case: HostCase, folder: Path) -> nn.Module:
    into = case.fresh() if isinstance(find_host(case.dense), PlainHost) else None
    return surgery.load(folder, into=into)


def _same_weights(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs), f"other weights: {sorted(set(mine) ^ set(theirs))}"
    for name, value in mine.items():
        same = value.dtype == theirs[name].dtype and torch.equal(value, theirs[name])
        assert same, f"{name} has other values"
