"""Reading a layer by its form: nothing is taken for an MLP that computes something else."""

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

import moefold
from moefold import MoEConfig, UpcycleConfig
from moefold.surgery.hosts import FORMS, Form, Site, find_host
from moefold.surgery.hosts.forms import compute, describe, form_of, name_of, run_dense
from tests.surgery.hosts.cases import CASES

ALL = UpcycleConfig(sites="all")


def site_of(layer: nn.Module) -> Site:
    form = form_of(layer)
    assert form is not None
    return describe("here", layer, form)


@pytest.fixture
def layer() -> Any:
    """Dense, 16 -> 24 -> 16, plain with GELU."""
    return CASES["bert"].build().get_submodule("encoder.layer.0")


@pytest.fixture
def gated() -> Any:
    """Dense, 16 -> 24 -> 16, gated with SiLU."""
    return CASES["llama"].build().get_submodule("layers.0")


def test_a_plain_mlp_by_hand(layer):
    site = site_of(layer)
    assert (site.dim, site.width, site.activation, site.causal) == (16, 24, "gelu", False)
    assert site.reasons_against == ()
    mlp = site.mlp
    assert mlp is not None
    assert mlp.up is layer.intermediate.dense.weight
    assert mlp.down_bias is layer.output.dense.bias
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    up, down = layer.intermediate.dense, layer.output.dense
    wanted = functional.gelu(x @ up.weight.T + up.bias) @ down.weight.T + down.bias
    # float64: the order of summation.
    assert (run_dense(layer, site.form, x) - wanted).abs().max() < 1e-13
    assert (compute(mlp, "gelu", x) - wanted).abs().max() < 1e-13
    assert mlp.num_parameters == 2 * 16 * 24 + 24 + 16


def test_a_gated_mlp_by_hand(gated):
    site = site_of(gated)
    assert (site.dim, site.width, site.activation, site.causal) == (16, 24, "silu", True)
    mlp = site.mlp
    assert mlp is not None
    assert mlp.gate is not None
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    gate, up, down = gated.mlp.gate_proj, gated.mlp.up_proj, gated.mlp.down_proj
    hidden = functional.silu(x @ gate.weight.T + gate.bias) * (x @ up.weight.T + up.bias)
    wanted = hidden @ down.weight.T + down.bias
    assert (run_dense(gated, site.form, x) - wanted).abs().max() < 1e-13
    assert (compute(mlp, "silu", x) - wanted).abs().max() < 1e-13


@pytest.mark.parametrize("name", ["modernbert", "phi3"])
def test_the_activated_half_of_a_fused_map_is_the_gate(name):
    model = CASES[name].build()
    (site, *_) = find_host(model).sites(model)
    mlp, fused = site.mlp, site.layer.get_submodule(site.form.up).weight
    assert mlp is not None
    assert mlp.gate is not None
    assert torch.equal(mlp.gate, fused[:24])  # pyright: ignore[reportIndexIssue]
    assert torch.equal(mlp.up, fused[24:])  # pyright: ignore[reportIndexIssue]
    # In the other order it is another function, so that this is no convention of ours.
    x = torch.randn(1, 3, 16, dtype=torch.float64)
    dense = run_dense(site.layer, site.form, x)
    swapped = type(mlp)(
        up=mlp.gate,
        up_bias=mlp.gate_bias,
        gate=mlp.up,
        gate_bias=mlp.up_bias,
        down=mlp.down,
        down_bias=mlp.down_bias,
    )
    assert (compute(mlp, site.activation, x) - dense).abs().max() < 1e-13
    assert (compute(swapped, site.activation, x) - dense).abs().max() > 1e-3


def test_weights_of_a_conv1d_are_transposed_views():
    layer = CASES["gpt2"].build().get_submodule("h.0")
    mlp = site_of(layer).mlp
    assert mlp is not None
    assert tuple(layer.mlp.c_fc.weight.shape) == (16, 24)  # pyright: ignore
    assert torch.equal(mlp.up, layer.mlp.c_fc.weight.T)  # pyright: ignore
    assert mlp.up.data_ptr() == layer.mlp.c_fc.weight.data_ptr()  # pyright: ignore


def test_of_two_forms_of_a_class_the_one_that_fits():
    for name in ("t5", "t5-gated", "dinov2", "dinov2-gated"):
        model = CASES[name].build()
        assert {name_of(site.form) for site in find_host(model).sites(model)} == {name}


def test_only_the_exact_class_has_a_form(layer):
    class Mine(type(layer)):
        """Whatever it does otherwise is not known."""

    layer.__class__ = Mine
    assert form_of(layer) is None


def double(module: nn.Module, given: tuple, result: torch.Tensor) -> torch.Tensor:
    return 2 * result


@pytest.mark.parametrize("where", ["intermediate", "intermediate.dense", "output.dense"])
def test_a_hook_that_changes_values_is_noticed(layer, where):
    layer.get_submodule(where).register_forward_hook(double)
    (reason,) = site_of(layer).reasons_against
    assert "its MLP computes something else than its weights and gelu do" in reason
    assert "a hook, an adapter, or another kind of MLP" in reason


def test_a_hook_that_only_looks_is_none(layer):
    seen = []
    layer.intermediate.register_forward_hook(lambda *_: seen.append(1))
    assert site_of(layer).reasons_against == ()
    assert seen  # it was run to be compared


def test_a_hook_in_one_layer_leaves_the_others():
    model = CASES["bert"].build()
    model.get_submodule("encoder.layer.1.output.dense").register_forward_hook(double)
    made = moefold.plan(model, UpcycleConfig(sites=r"layer\.0"))
    assert made.chosen == ("encoder.layer.0",)
    assert "stays dense: its MLP computes something else" in made.sites[1].reason
    with pytest.raises(
        ValueError, match=r"cannot upcycle encoder.layer.1 its MLP computes something else .*1.0e"
    ):
        moefold.plan(model, ALL)


def test_describing_changes_no_mode(layer):
    layer.train()
    layer.output.eval()
    site_of(layer)
    assert layer.training
    assert layer.intermediate.training
    assert not layer.output.training
    assert not layer.output.dense.training


def test_dropout_between_the_maps_is_noted():
    model = CASES["t5"].build(dropout_rate=0.25)
    made = moefold.plan(model, ALL)
    assert "dropout of 0.25 between the two maps is left out" in made.sites[0].reason


def test_an_unknown_activation_is_named(layer):
    layer.intermediate.intermediate_act_fn = nn.Softplus()
    (reason,) = site_of(layer).reasons_against
    assert "its activation (Softplus) is none of gelu, " in reason


def test_chunks_of_tokens_are_no_group():
    model = CASES["bert"].build(chunk_size_feed_forward=2)
    with pytest.raises(ValueError, match=r"in chunks of 2 tokens.*chunk_size_feed_forward=0"):
        moefold.plan(model, ALL)


def test_adapters_are_refused():
    model = CASES["bert"].build()
    config = LoraConfig(r=2, target_modules=["intermediate.dense"])
    adapted = get_peft_model(model, config).get_submodule("base_model.model")  # pyright: ignore
    with pytest.raises(
        ValueError, match=r"layer.0.intermediate.dense \(Linear\).*merge_and_unload"
    ):
        moefold.plan(adapted, ALL)
    # And where nobody looks for adapters, the class of the map tells.
    (reason,) = site_of(adapted.get_submodule("encoder.layer.0")).reasons_against
    assert reason == CANNOT_BE_COPIED.format("intermediate.dense", "Linear")


CANNOT_BE_COPIED = (
    "its {} is a {}, whose weights cannot be copied as they are (merge adapters and dequantise "
    "first)"
)


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: a subclass of a linear map, whose weight is packed."""


def test_quantised_maps_are_refused():
    model = CASES["bert"].build()
    model.get_submodule("encoder.layer.1.output").dense = Linear4bit(24, 16)
    made = moefold.plan(model, UpcycleConfig(sites=("encoder.layer.0",)))
    assert made.sites[1].reason == (
        f"stays dense: {CANNOT_BE_COPIED.format('output.dense', 'Linear4bit')}"
    )
    with pytest.raises(ValueError, match=r"cannot upcycle encoder.layer.1 .* a Linear4bit, whose"):
        moefold.upcycle(model, ALL)


def test_weights_of_integers_are_refused(layer):
    dense = layer.intermediate.dense
    dense.weight = nn.Parameter(dense.weight.to(torch.int8), requires_grad=False)
    (reason,) = site_of(layer).reasons_against
    assert reason == "its intermediate.dense holds torch.int8 (dequantise first)"


def test_all_reasons_are_given_at_once(layer):
    layer.intermediate.dense = nn.Bilinear(2, 2, 2)
    del layer.output.dense
    reasons = site_of(layer).reasons_against
    assert len(reasons) == 2
    assert reasons[0].startswith("its intermediate.dense is a Bilinear")
    assert reasons[1] == "has no output.dense"


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5-gated", "modernbert"])
def test_copies_are_as_wide_as_the_mlp(name):
    model = CASES[name].build()
    config = UpcycleConfig(moe=MoEConfig(expert_width=23), sites="all")
    with pytest.raises(
        ValueError, match=r"expert_width is 23, but the experts are copies of an MLP of width 24"
    ):
        moefold.plan(model, config)
    same = UpcycleConfig(moe=MoEConfig(expert_width=24), sites="all")
    assert len(moefold.plan(model, same).chosen) == CASES[name].layers


def test_maps_of_two_dtypes_are_refused(layer):
    layer.output.dense.float()
    (reason,) = site_of(layer).reasons_against
    assert "its maps differ in dtype" in reason
    assert "cast the model to one" in reason


def test_shared_modules_are_described_once():
    # Two names for one layer: named_modules gives the first, so surgery happens once.
    model = CASES["bert"].build()
    layers = model.get_submodule("encoder.layer")
    assert isinstance(layers, nn.ModuleList)
    layers[1] = layers[0]
    assert [site.name for site in find_host(model).sites(model)] == ["encoder.layer.0"]


def test_a_form_without_its_modules_is_no_crash(monkeypatch):
    class Odd(nn.Module):
        """Has one of the maps and nothing else."""

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 8)

    where = f"{Odd.__module__}.{Odd.__qualname__}"
    form = Form(layer=where, up="up", down="down", activation="act", pieces=("up",))
    monkeypatch.setitem(FORMS._targets, "odd", form)
    monkeypatch.setitem(FORMS._summaries, "odd", "one map")
    with pytest.raises(ValueError, match=r"cannot upcycle 0 has no down"):
        moefold.plan(nn.Sequential(Odd()), ALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_another_function_is_seen_too(layer, dtype):
    layer.to(dtype)
    assert site_of(layer).reasons_against == ()
    layer.output.dense.register_forward_hook(lambda module, given, result: result * 1.01)
    (reason,) = site_of(layer).reasons_against
    assert "something else than its weights and gelu do (relative difference 1.0e-02)" in reason
    assert {p.dtype for p in layer.parameters()} == {dtype}


def test_half_precision_that_overflows_is_no_other_function(gated):
    gated.half()
    with torch.no_grad():
        gated.mlp.up_proj.weight.fill_(6e4)
    assert site_of(gated).reasons_against == ()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_autocast_changes_no_verdict(name):
    model = CASES[name].build().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert moefold.plan(model, ALL).kept_at_birth


def test_a_patched_layer_is_refused(layer):
    """Its class is what surgery exchanges, and a forward of its own goes past that."""
    add_hook_to_module(layer, ModelHook())
    assert "a forward put over that of its class (a hook of accelerate" in why_not(layer)
    remove_hook_from_module(layer)
    assert "a forward put over" in why_not(layer)  # accelerate leaves the old one there, bound
    del layer.forward
    assert site_of(layer).reasons_against == ()


def test_offloaded_weights_are_refused(layer):
    cpu_offload(layer.intermediate, execution_device=torch.device("cpu"))
    assert "its intermediate.dense is offloaded by accelerate" in why_not(layer)


def test_weights_that_are_no_plain_tensors_are_refused(layer):
    class Sharded(torch.Tensor):
        """As DTensor is one, or what torchao makes."""

    weight = layer.intermediate.dense.weight.data.as_subclass(Sharded)
    layer.intermediate.dense.weight = nn.Parameter(weight)
    assert "its intermediate.dense holds a Sharded (gather or dequantise it" in why_not(layer)


def why_not(layer: nn.Module) -> str:
    return "; ".join(site_of(layer).reasons_against)
