"""The receipt: what is measured after surgery, checked by hand and against what is known.

Layouts: 1 is a real token, . is padding.
"""

import json
import math

import pytest
import torch
from torch import nn

import moefold
from moefold import MoEConfig, Receipt, UpcycleConfig, routers
from moefold.modes import evaluating
from moefold.surgery import Copies
from moefold.surgery.hosts.transformer import TransformersHost
from moefold.surgery.receipt import (
    expert_similarity,
    output_of,
    relative_error,
    without_padding,
)
from tests.surgery.hosts.cases import CASES
from tests.surgery.test_upcycle import assert_same, photograph

KEEPING = UpcycleConfig(moe=MoEConfig(num_experts=3), sites="all")


def measured(model: nn.Module, config: UpcycleConfig = KEEPING, **given: object) -> Receipt:
    receipt = moefold.upcycle(model, config, **given).receipt  # pyright: ignore
    assert receipt is not None
    return receipt


def test_relative_error_by_hand():
    wanted = torch.tensor([3.0, 4.0])  # of length 5
    assert relative_error(torch.tensor([3.0, 4.5]), wanted) == pytest.approx(0.1)
    assert relative_error(wanted, wanted) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) > 1e100


def test_padding_counts_in_no_error():
    output = torch.tensor([[[1.0], [math.nan]]])
    mask = torch.tensor([[1, 0]])  # 1.
    assert without_padding(output, mask).tolist() == [[[1.0], [0.0]]]
    assert without_padding(output, None) is output
    assert without_padding(output, torch.ones(1, 3)) is output  # a mask for something else


def test_expert_similarity_by_hand():
    moe = MoEConfig(num_experts=3, expert_width=1).build(2)
    with torch.no_grad():
        # Directions 0, 90 and 180 degrees: cosines 0, -1 and 0; down maps all alike: 1, 1, 1.
        ways = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
        for name, parameter in moe.experts.named_parameters():
            if name.startswith("down"):
                parameter.copy_(torch.ones_like(parameter))
            else:
                parameter.copy_(ways.unsqueeze(1).expand_as(parameter))
    assert expert_similarity(moe) == pytest.approx((-1 / 3 + 1) / 2)


def test_a_change_of_one_site_is_measured_there_alone():
    # Half of the combine weight is gone at the second layer: it is off by exactly one half.
    model = CASES["bert"].build()
    half = MoEConfig(num_experts=2, router=routers.config("token-choice", k=1))
    config = UpcycleConfig(
        moe=MoEConfig(num_experts=3),
        moe_at={r"layer\.1": half},
        sites="all",
        birth=Copies(router_start="zero"),
    )
    receipt = measured(model, config)
    first, second = receipt.sites["encoder.layer.0"], receipt.sites["encoder.layer.1"]
    assert first.error < 1e-10
    assert first.mass == pytest.approx(1.0)
    # A router of zeros: softmax over two experts is one half, which top-1 leaves as it is.
    assert second.mass == pytest.approx(0.5)
    assert second.error == pytest.approx(0.5)
    assert second.coverage == 1.0
    assert receipt.error > 1e-2


def test_coverage_is_the_share_of_tokens_somebody_takes():
    # One sequence of 4 tokens and 2 experts that take one token each, perhaps the same.
    model = CASES["bert"].build()
    one_each = MoEConfig(num_experts=2, router=routers.config("expert-choice", capacity=1))
    ids = torch.tensor([[5, 6, 7, 8]])
    receipt = measured(model, UpcycleConfig(moe=one_each), inputs={"input_ids": ids})
    (site,) = receipt.sites.values()
    assert site.coverage in (0.25, 0.5)
    assert site.error > 0.1


def test_inputs_that_are_given_are_the_ones_measured():
    case = CASES["bert"]
    inputs = case.inputs()
    seen = []
    model = case.build()
    model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    receipt = measured(model, inputs=inputs)
    assert len(seen) == 2  # once before, once after
    assert all(ids is inputs["input_ids"] for ids in seen)
    assert receipt.inputs == "the inputs given"


@pytest.mark.parametrize("name", ["bert", "t5", "clip", "vit", "siglip", "gpt2"])
def test_made_up_inputs_fit_the_model(name):
    receipt = measured(CASES[name].build())
    assert len(receipt.sites) == CASES[name].layers
    # Renormalised copies in float64.
    assert receipt.error < 1e-10
    assert max(site.error for site in receipt.sites.values()) < 1e-10
    words = {"vit": "random pixels", "clip": "random tokens and random pixels"}
    words["siglip"] = words["clip"]
    assert receipt.inputs == words.get(name, "random tokens")


def test_the_random_state_and_the_modes_are_left_alone():
    model = CASES["bert"].build(hidden_dropout_prob=0.5).train()
    model.get_submodule("embeddings").eval()
    torch.manual_seed(3)
    moefold.upcycle(model, KEEPING, inputs=False)
    expected = torch.rand(3)
    modes = {name: module.training for name, module in model.named_modules()}
    moefold.revert(model)
    torch.manual_seed(3)
    receipt = measured(model)
    assert torch.equal(torch.rand(3), expected)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert receipt.error < 1e-10  # in evaluation mode: dropout would be seen


def test_evaluating_puts_back_what_fails():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    seen = []

    def stop() -> None:
        with evaluating(model):
            seen.append(model[0].training)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert seen == [False]
    assert model[0].training
    assert not model[1].training


def test_no_hook_stays():
    model = CASES["bert"].build()
    measured(model)
    moefold.revert(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_decoders_own_mask_counts_for_its_output():
    # 111 / 1.. in the encoder, 111 / 11. in the decoder: what is returned are the decoder's tokens.
    model = CASES["t5"].build()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "decoder_input_ids": ids,
        "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    with torch.no_grad():
        output = output_of(model, inputs)
    assert (output != 0).all(-1).tolist() == [[True, True, True], [True, True, False]]
    assert measured(model, inputs=inputs).error < 1e-10


class OneOfTwo(nn.Module):
    """Two towers, of which one is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = CASES["timm-vit"].build(), CASES["timm-vit"].build()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_what_the_inputs_do_not_reach_is_not_measured():
    pixels = CASES["timm-vit"].inputs()
    receipt = measured(OneOfTwo().eval(), inputs=pixels)
    assert set(receipt.sites) == {"used.blocks.0", "used.blocks.1"}
    idle = UpcycleConfig(moe=MoEConfig(num_experts=3), sites=r"idle\..*")
    nothing = measured(OneOfTwo().eval(), idle, inputs=pixels)
    assert nothing.sites == {}
    assert str(nothing).endswith("the output of the model is off by 0.0e+00 of its length")


def test_a_dense_model_that_makes_nan_is_refused_before_it_is_touched():
    model = CASES["bert"].build()
    with torch.no_grad():
        model.get_submodule("embeddings.word_embeddings").weight[9] = math.nan  # pyright: ignore
    before = photograph(model)
    with pytest.raises(
        ValueError, match=r"the dense model makes NaN or infinite values of the inputs given; pass"
    ):
        moefold.upcycle(model, KEEPING, inputs={"input_ids": torch.tensor([[5, 9]])})
    assert [name for name, *_ in before[0]] == [name for name, _ in model.named_modules()]
    # Inputs that nobody chose are no reason to refuse; the plan says why there is no receipt.
    with torch.no_grad():
        model.get_submodule("embeddings.word_embeddings").weight.fill_(math.nan)  # pyright: ignore
    made = moefold.upcycle(model, KEEPING)
    assert made.receipt is None
    assert "not measured" in str(made)
    assert "NaN or infinite values of random tokens" in made.unmeasured


def test_a_model_that_says_nothing_of_its_inputs_is_not_measured():
    made = moefold.upcycle(CASES["timm-vit"].build(), KEEPING)
    assert made.receipt is None
    assert made.unmeasured == "the model does not say what it takes; pass `inputs`"
    assert "not measured" in str(made)


def test_a_model_without_weights_is_not_measured():
    model = CASES["bert"].build().to("meta")
    made = moefold.upcycle(model, KEEPING)
    assert made.unmeasured == "the weights are on the device 'meta'"


def test_inputs_that_do_not_fit_leave_the_model_untouched():
    model = CASES["bert"].build()
    before = photograph(model)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        moefold.upcycle(model, KEEPING, inputs={"pixels": torch.zeros(1)})
    assert_same(model, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failure_of_the_measurement_takes_surgery_back(monkeypatch):
    model = CASES["bert"].build()
    before = photograph(model)
    monkeypatch.setattr("moefold.surgery.receipt.expert_similarity", lambda moe: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        moefold.upcycle(model, KEEPING)
    assert_same(model, before)


def test_it_is_printed_and_saved_with_the_model(tmp_path):
    model = CASES["bert"].build()
    made = moefold.upcycle(model, KEEPING)
    receipt = made.receipt
    assert receipt is not None
    assert str(made).endswith(str(receipt))
    lines = str(receipt).splitlines()
    assert lines[0].startswith("  measured               on random tokens: the output of the model")
    assert "encoder.layer.0  off by" in lines[1]
    assert "100.0% of tokens covered, combine mass 1.000, experts alike 1.000" in lines[1]
    assert Receipt.from_dict(json.loads(json.dumps(receipt.to_dict()))) == receipt
    moefold.save(model, tmp_path / "moe")
    section = TransformersHost().section(moefold.load(tmp_path / "moe"))
    assert section is not None
    assert Receipt.from_dict(section["receipt"]) == receipt


def test_no_receipt_is_asked_for():
    model = CASES["bert"].build()
    made = moefold.upcycle(model, KEEPING, inputs=False)
    assert made.receipt is None
    assert "measured" not in str(made)
    section = TransformersHost().section(model)
    assert section is not None
    assert "receipt" not in section


def test_what_is_no_number_is_null_in_json(tiny):
    """`NaN` is no JSON: readers other than Python's would stop at the config of the model."""
    model = tiny()
    for layer in model.encoder.layer:
        nn.init.zeros_(layer.intermediate.dense.weight)
        nn.init.zeros_(layer.output.dense.weight)
    receipt = measured(model)
    assert math.isnan(receipt.sites["encoder.layer.1"].similarity)
    text = json.dumps(receipt.to_dict(), allow_nan=False)
    again = Receipt.from_dict(json.loads(text))
    assert math.isnan(again.sites["encoder.layer.1"].similarity)
    assert str(again) == str(receipt)
