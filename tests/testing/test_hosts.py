"""The suite of hosts fails where it should: for every check, a way to break just that."""

import copy
import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moefold.record
from moefold import surgery
from moefold.moe import MoE
from moefold.routers import RouterConfig
from moefold.surgery import Copies
from moefold.surgery.hosts import Changes
from moefold.surgery.hosts import layer as layers
from moefold.surgery.hosts.transformer import TransformersHost
from moefold.testing import host_inputs
from moefold.testing.contract import run
from moefold.testing.host_probe import HostCase, host_case, pad_left, pad_right, usual_mask
from moefold.testing.hosts import HOST_CHECKS, check_host
from tests.surgery.hosts.cases import CASES

Patch = pytest.MonkeyPatch


def case_of(form: str, **changes: Any) -> HostCase:
    case = CASES[form]
    return host_case(case.build(**changes), case.inputs(), None, usual_mask)


def wrap(patch: Patch, owner: Any, name: str, make: Callable) -> None:
    """Replace a function by what `make` makes of it."""
    patch.setattr(owner, name, make(getattr(owner, name)))


def look_with_sticky_fingers(patch: Patch) -> None:
    def make(sites):
        def touching(self, model):
            model.seen = True
            return sites(self, model)

        return touching

    wrap(patch, TransformersHost, "sites", make)


def copy_badly(patch: Patch) -> None:
    def make(fill):
        @torch.no_grad()
        def filled(self, moe, *given):
            fill(self, moe, *given)
            next(moe.experts.parameters()).mul_(1.001)

        return filled

    wrap(patch, Copies, "fill", make)


def promise_too_little(patch: Patch) -> None:
    patch.setattr(Copies, "keeps", lambda *_: (False, "so it says"))


def mix_nothing(patch: Patch) -> None:
    wrap(patch, MoE, "forward", lambda forward: lambda *given: 0 * forward(*given))


def forget_a_change(patch: Patch) -> None:
    def make(undo):
        def forgetful(self):
            self.log.pop(0)
            undo(self)

        return forgetful

    wrap(patch, Changes, "undo", make)


def give_back_trained_weights(patch: Patch) -> None:
    def make(revert):
        @torch.no_grad()
        def trained(model):
            revert(model)
            model.get_submodule("encoder.layer.1.output.dense").weight.add_(1e-3)

        return trained

    wrap(patch, surgery, "revert", make)


def undo_nothing(patch: Patch) -> None:
    patch.setattr(Changes, "undo", lambda self: None)


def operate_twice(patch: Patch) -> None:
    module = importlib.import_module("moefold.surgery.plan")  # of which a function has the name
    patch.setattr(module, "refuse_second_surgery", lambda model: None)


def load_other_bits(patch: Patch) -> None:
    def make(load):
        @torch.no_grad()
        def altered(folder, **given):
            model = load(folder, **given)
            next(model.parameters()).mul_(1 + 1e-15)
            return model

        return altered

    wrap(patch, surgery, "load", make)


def share_changes(patch: Patch) -> None:
    patch.setattr(Changes, "__deepcopy__", lambda self, memo: self, raising=False)


def let_routers_see_the_future(patch: Patch) -> None:
    def make(build):
        return lambda self, dim, experts, causal=False: build(self, dim, experts)

    wrap(patch, RouterConfig, "build", make)


def withhold_the_mask(patch: Patch) -> None:
    patch.setattr(layers, "real_tokens", lambda *_: None)


def call_everything_padding_real(patch: Patch) -> None:
    def make(real_tokens):
        def wrong(*given):
            real = real_tokens(*given)
            return real.roll(1, 0)

        return wrong

    wrap(patch, layers, "real_tokens", make)


def checkpoint_nothing(patch: Patch) -> None:
    patch.setattr(host_inputs, "_checkpoint", lambda model: True)


def record_repetitions(patch: Patch) -> None:
    patch.setattr(moefold.record, "_in_backward", lambda: False)


BROKEN = [
    (look_with_sticky_fingers, "plan touches nothing", "the model is not what it was"),
    (copy_badly, "function is kept as declared", "keeps the function, but the output is off by"),
    (promise_too_little, "function is kept as declared", "does not (so it says), but the output"),
    (mix_nothing, "every mixture matters", "layer.0.moe without experts changes the output by 0.0"),
    (forget_a_change, "revert is exact", "is not what it was"),
    (give_back_trained_weights, "revert after training", "layer.1.output.dense.weight has other"),
    (undo_nothing, "all or nothing", "is not what it was"),
    (operate_twice, "second surgery", "cannot upcycle encoder.layer.0 has no intermediate.dense"),
    (load_other_bits, "saved form", "word_embeddings.weight has other values"),
    (share_changes, "copies", "other weights"),
    (let_routers_see_the_future, "causality", "sees later tokens and was not refused"),
    (withhold_the_mask, "padding is in no routing", "layer.0: no mask reaches the router"),
    (call_everything_padding_real, "padding is in no routing", "another mask reaches the router"),
    (withhold_the_mask, "padding further", "more tokens of padding (right) change real tokens by"),
    (checkpoint_nothing, "checkpointing", "did not run once forward and once backward"),
    (record_repetitions, "checkpointing", "a routing was recorded twice"),
]


@pytest.mark.parametrize(
    ("breaks", "check", "says"), BROKEN, ids=[f"{b[1]}-{b[0].__name__}" for b in BROKEN]
)
def test_a_broken_host_is_caught(
    breaks: Callable[[Patch], None], check: str, says: str, monkeypatch: Patch
):
    case = case_of("bert", is_decoder=check == "causality")
    run("host", {check: HOST_CHECKS[check]}, case)  # whole, it passes
    breaks(monkeypatch)
    with pytest.raises(AssertionError, match=re.escape(says)) as caught:
        run("host", {check: HOST_CHECKS[check]}, case)
    assert f"\n  {check}: " in str(caught.value)


def test_every_check_has_been_seen_to_fail():
    assert {check for _, check, _ in BROKEN} == set(HOST_CHECKS)


def test_an_mlp_that_does_not_matter_is_noticed():
    model = CASES["bert"].build()
    with torch.no_grad():
        for parameter in model.get_submodule("encoder.layer.1.output.dense").parameters():
            parameter.mul_(1e-6)
    with pytest.raises(AssertionError, match=r"layer.1.moe without experts changes the output by"):
        check_host(model, CASES["bert"].inputs())


def test_the_model_itself_is_left_alone():
    model = CASES["vit"].build().float().train()
    before = copy.deepcopy(model.state_dict())
    report = check_host(model, CASES["vit"].inputs())
    assert {"causality", "padding further", "padding is in no routing"} == set(report.skipped)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_no_host_claims_is_refused():
    with pytest.raises(ValueError, match=r"no host for a torch.nn.modules.linear.Linear"):
        check_host(nn.Linear(2, 2), {})


def test_padding_by_hand():
    # 11. / 1..
    given = {
        "input_ids": torch.tensor([[5, 6, 1], [7, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "pixels": torch.zeros(2, 3),
    }
    right, left = pad_right(given, 1), pad_left(given, 1)
    assert right["input_ids"].tolist() == [[5, 6, 1, 5], [7, 1, 1, 5]]
    assert right["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert left["input_ids"].tolist() == [[5, 1, 5, 6], [5, 1, 1, 7]]
    assert left["attention_mask"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert left["position_ids"].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert right["pixels"] is left["pixels"] is given["pixels"]


def test_whose_mask_is_whose():
    given = {"attention_mask": torch.ones(1, 2), "input_ids": torch.ones(1, 2)}
    decodes = {
        **given,
        "decoder_input_ids": torch.ones(1, 3),
        "decoder_attention_mask": torch.ones(1, 3),
    }
    assert usual_mask("", given) is given["attention_mask"]
    assert usual_mask("encoder.block.0", decodes) is decodes["attention_mask"]
    assert usual_mask("decoder.block.0", decodes) is decodes["decoder_attention_mask"]
    assert usual_mask("", decodes) is decodes["decoder_attention_mask"]
    assert usual_mask("vision_model.encoder.layers.0", given) is None
