"""Surgery: in place, all or nothing, and back again exactly."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM, BertModel
from transformers.models.bert.modeling_bert import BertLayer, BertOutput

import moefold
from moefold import MoE, MoEConfig, UpcycleConfig, routers
from moefold.surgery import Copies
from moefold.surgery.hosts.auto import is_moefold_config
from moefold.surgery.hosts.layer import is_moe_layer
from moefold.surgery.hosts.transformer import TransformersHost


def photograph(model: nn.Module) -> tuple:
    """Everything surgery could change: objects, classes, order and values."""
    modules = [(name, id(m), type(m)) for name, m in model.named_modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return modules, list(values), values


def assert_same(model: nn.Module, before: tuple) -> None:
    modules, names, values = photograph(model)
    assert modules == before[0]
    assert names == before[1]
    assert all(torch.equal(values[name], before[2][name]) for name in names)


def test_every_expert_is_the_dense_mlp(tiny):
    model = tiny()
    dense = copy.deepcopy(model.encoder.layer[1])
    moefold.upcycle(model, UpcycleConfig(moe=MoEConfig(num_experts=3)))
    layer = model.encoder.layer[1]
    assert is_moe_layer(layer)
    experts = dict(layer.moe.experts.named_parameters())
    for expert in range(3):
        assert torch.equal(experts["up_proj"][expert], dense.intermediate.dense.weight)
        assert torch.equal(experts["up_proj_bias"][expert], dense.intermediate.dense.bias)
        assert torch.equal(experts["down_proj"][expert], dense.output.dense.weight)
        assert torch.equal(experts["down_proj_bias"][expert], dense.output.dense.bias)
    # Copies, not views: training one expert changes no other, nor what revert brings back.
    with torch.no_grad():
        experts["up_proj"][0].add_(1.0)
    assert torch.equal(experts["up_proj"][1], dense.intermediate.dense.weight)
    moefold.revert(model)
    assert torch.equal(layer.intermediate.dense.weight, dense.intermediate.dense.weight)


def test_surgery_in_inference_mode_makes_weights_that_train(tiny, batch):
    model = tiny()
    with torch.inference_mode(), torch.device("meta"):
        made = moefold.upcycle(model)
    assert made.receipt is not None, made.unmeasured
    model(**batch).last_hidden_state.square().sum().backward()
    for name, parameter in model.encoder.layer[1].moe.named_parameters():
        assert parameter.grad is not None, name


def test_what_was_put_into_a_layer_after_surgery_stays(tiny):
    model = tiny()
    names = list(model.state_dict())
    moefold.upcycle(model)
    layer = model.encoder.layer[1]
    layer.attention, layer.probe = copy.deepcopy(layer.attention), nn.Linear(16, 2)
    attention, probe = layer.attention, layer.probe
    moefold.revert(model)
    assert layer.attention is attention
    assert layer.probe is probe
    assert [name for name in model.state_dict() if "probe" not in name] == names


def test_what_was_written_into_the_config_after_surgery_stays(tiny, tmp_path):
    model = tiny()
    config = model.config
    moefold.upcycle(model)
    model.resize_token_embeddings(70)
    model.config.pad_token_id = 7
    moefold.revert(model)
    assert model.config.model_type == "bert"
    assert (model.config.vocab_size, model.config.pad_token_id) == (70, 7)
    assert model.encoder.config is model.config
    assert (config.vocab_size, config.pad_token_id) == (60, 0)  # others may hold it
    model.save_pretrained(tmp_path / "dense")
    opened = BertModel.from_pretrained(tmp_path / "dense")
    assert opened.embeddings.word_embeddings.num_embeddings == 70
    assert not hasattr(opened.config, "moefold")


def test_router_and_noise_have_the_standard_deviation_asked_for(tiny):
    model = tiny(hidden_size=64, intermediate_size=256)
    dense = model.encoder.layer[3].intermediate.dense.weight.clone()
    birth = Copies(router_std=0.5, copy_noise_std=0.1)
    moefold.upcycle(
        model, UpcycleConfig(moe=MoEConfig(num_experts=16), sites="last:1", birth=birth)
    )
    moe = model.encoder.layer[3].moe
    # 16 x 64 draws: the sample deviation of n normal draws has standard error std / sqrt(2 n),
    # here 0.011; five of them. For the noise, 16 x 256 x 64 draws: 0.00014.
    assert abs(moe.router.weight.std() - 0.5) < 5 * 0.011
    assert abs((moe.experts.up_proj - dense).std() - 0.1) < 5 * 0.00014
    assert not torch.equal(moe.experts.up_proj[0], moe.experts.up_proj[1])


def test_norm_dropout_and_attention_stay_the_hosts_own(tiny):
    model = tiny()
    layer = model.encoder.layer[1]
    attention, norm, dropout = layer.attention, layer.output.LayerNorm, layer.output.dropout
    moefold.upcycle(model)
    assert model.encoder.layer[1] is layer
    assert layer.attention is attention
    assert layer.output.LayerNorm is norm
    assert layer.output.dropout is dropout
    assert not any("dense" in name for name, _ in layer.output.named_modules())


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_fast", "relu", "silu", "tanh"])
def test_the_activation_is_the_hosts(tiny, batch, activation):
    model = tiny(hidden_act=activation).double()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        before = model(**batch)[0][real]
        moefold.upcycle(model, UpcycleConfig(sites="all"))
        # float64; `gelu_fast` of transformers spells sqrt(2 / pi) to ten digits, which costs 1e-11
        # a layer. Another activation would differ by more than 1e-4.
        assert (model(**batch)[0][real] - before).abs().max() < 1e-8


def test_sites_are_named_in_the_mixtures(tiny):
    model = tiny()
    moefold.upcycle(model)
    moe = model.get_submodule("encoder.layer.3.moe")
    assert isinstance(moe, MoE)
    assert moe.site == "encoder.layer.3"
    with torch.no_grad():
        moe.router.get_parameter("weight").fill_(float("nan"))
    with pytest.raises(ValueError, match=r"encoder.layer.3: router logits are NaN"):
        model(input_ids=torch.ones(1, 2, dtype=torch.long))


def test_revert_restores_every_object_and_bit(tiny):
    model = tiny()
    config = model.config
    before = photograph(model)
    moefold.upcycle(model, UpcycleConfig(sites="all"))
    assert is_moefold_config(model.config)
    moefold.revert(model)
    assert_same(model, before)
    assert model.config is config
    assert model.encoder.config is config
    # And once more: nothing of the first surgery is left.
    moefold.upcycle(model)
    moefold.revert(model)
    assert_same(model, before)


def test_a_deep_copy_reverts_by_itself(tiny):
    model = tiny()
    before = photograph(model)
    moefold.upcycle(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.encoder.layer[1].moe.experts.up_proj.zero_()
    moefold.revert(twin)
    assert is_moe_layer(model.encoder.layer[1])
    moefold.revert(model)
    assert_same(model, before)
    assert all(torch.equal(twin.state_dict()[name], value) for name, value in before[2].items())


def test_what_was_taken_out_follows_the_model_when_it_comes_back(tiny):
    model = tiny()
    moefold.upcycle(model)
    model.double().train()
    moefold.revert(model)
    dense = model.encoder.layer[1].intermediate.dense
    assert dense.weight.dtype == torch.float64
    assert dense.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_mixed_precision_is_not_flattened_by_revert(tiny):
    model = tiny()
    for layer in model.encoder.layer:
        layer.intermediate.dense.bfloat16()
        layer.output.dense.bfloat16()
    before = photograph(model)
    made = moefold.upcycle(model)
    assert model.encoder.layer[1].moe.experts.up_proj.dtype == torch.bfloat16
    # Such a model runs under autocast only, so there is no receipt, and the plan says why.
    assert made.receipt is None
    assert "must have the same dtype" in str(made)
    moefold.revert(model)
    assert_same(model, before)


def test_a_failure_in_the_middle_leaves_the_model_untouched(tiny, monkeypatch):
    model = tiny()
    before, config = photograph(model), model.config
    install, done = TransformersHost.install, []

    def fail_at_the_second(self, model, site, moe, changes):
        if done:
            # The worst moment: half of a site is changed.
            changes.replace_children(site.layer, intermediate=None)
            raise RuntimeError("no more")
        done.append(site.name)
        install(self, model, site, moe, changes)

    monkeypatch.setattr(TransformersHost, "install", fail_at_the_second)
    with pytest.raises(RuntimeError, match="no more"):
        moefold.upcycle(model)
    assert done == ["encoder.layer.1"]
    assert_same(model, before)
    assert model.config is config
    monkeypatch.undo()
    moefold.upcycle(model)  # and nothing stands in the way of the next try


def test_a_refused_plan_leaves_the_model_untouched(tiny):
    model = tiny(is_decoder=True)
    before = photograph(model)
    config = UpcycleConfig(moe=MoEConfig(router=routers.config("expert-choice")))
    with pytest.raises(ValueError, match="a causal host cannot use it"):
        moefold.upcycle(model, config)
    assert_same(model, before)


def test_a_second_surgery_is_refused(tiny):
    model = tiny()
    moefold.upcycle(model, UpcycleConfig(sites="last:1"))
    with pytest.raises(
        ValueError, match=r"already upcycled at encoder.layer.3.moe; call moefold.revert"
    ):
        moefold.upcycle(model, UpcycleConfig(sites=("encoder.layer.1",)))


def test_nothing_to_revert(tiny):
    with pytest.raises(ValueError, match="BertModel is not upcycled, there is nothing to revert"):
        moefold.revert(tiny())


def test_revert_wants_the_object_that_was_upcycled(tiny):
    model = BertForMaskedLM(tiny().config)
    moefold.upcycle(model)
    with pytest.raises(ValueError, match="holds mixtures but not the dense MLPs"):
        moefold.revert(model.bert)


def test_another_model_with_the_same_config_stays_dense(tiny):
    model = tiny()
    twin = BertModel(model.config)
    assert twin.config is model.config
    moefold.upcycle(model)
    assert twin.config.model_type == "bert"
    assert type(twin.encoder.layer[1]) is BertLayer
    assert type(twin.encoder.layer[1].output) is BertOutput


def test_hooks_and_recorded_hidden_states_go_on(tiny, batch):
    model = tiny(attn_implementation="eager").double()
    seen = []
    model.encoder.layer[1].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        before = model(**batch, output_hidden_states=True, output_attentions=True)
        moefold.upcycle(model)
        after = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(seen) == 4  # the receipt runs the model as well, before and after
    assert len(after.hidden_states) == 5
    assert len(after.attentions) == 4
    real = batch["attention_mask"].bool()
    # Renormalised copies: float64 rounding, of states about 1.
    for one, other in zip(before.hidden_states, after.hidden_states, strict=True):
        assert (one[real] - other[real]).abs().max() < 1e-12


def test_it_learns(tiny, batch):
    model = tiny().train()
    moefold.upcycle(model)
    assert model.encoder.layer[1].moe.training
    real = batch["attention_mask"].bool()
    model(**batch)[0][real].square().mean().backward()
    moe = model.encoder.layer[1].moe
    assert moe.router.weight.grad.abs().max() > 0
    touched = moe.experts.up_proj.grad.abs().flatten(1).amax(1)
    assert (touched > 0).sum() >= 2  # top-2: somebody took every token
    assert model.encoder.layer[0].intermediate.dense.weight.grad.abs().max() > 0


def test_a_decoder_generates_one_token_at_a_time(tiny):
    # With a cache the layer sees the new token only, and a mask over all keys.
    model = tiny(is_decoder=True).double()
    moefold.upcycle(model, UpcycleConfig(moe=MoEConfig(num_experts=4)))
    ids = torch.randint(60, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask)[0]
        first = model(input_ids=ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
        last = model(
            input_ids=ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values
        )[0]
    # The same sums in another order, float64, values about 1.
    assert (whole[:, 5:] - last).abs().max() < 1e-12


def test_an_encoder_to_attend_to_is_refused_as_the_host_does(tiny):
    model = tiny(is_decoder=True)
    moefold.upcycle(model)
    hidden = torch.zeros(1, 3, 16)
    with pytest.raises(ValueError, match=r"are passed, BertLayer\("):
        model.encoder.layer[1](hidden, None, hidden)


def test_cross_attention_is_the_hosts_own(tiny, batch):
    model = tiny(is_decoder=True, add_cross_attention=True).double()
    encoded = torch.randn(3, 5, 16, dtype=torch.float64)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        before = model(**batch, encoder_hidden_states=encoded)[0][real]
        moefold.upcycle(model, UpcycleConfig(sites="all"))
        after = model(**batch, encoder_hidden_states=encoded)[0][real]
        other = model(**batch, encoder_hidden_states=-encoded)[0][real]
    # Renormalised copies: float64 rounding, of states about 1.
    assert (after - before).abs().max() < 1e-12
    assert (other - before).abs().max() > 1e-3


def test_provenance_names_the_source_without_its_path(tiny_folder):
    model = BertModel.from_pretrained(tiny_folder)
    moefold.upcycle(model)
    section = TransformersHost().section(model)
    assert section is not None
    assert section["source"]["name"] == "dense"
    assert set(section["source"]["sha256"]) == {"model.safetensors"}
    assert str(tiny_folder.parent) not in str(section)


def test_experts_of_a_frozen_host_are_frozen_and_the_router_is_not(tiny, batch):
    model = tiny().requires_grad_(False)
    model.encoder.layer[3].output.dense.bias.requires_grad_(True)
    moefold.upcycle(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "encoder.layer.1.moe.router.weight",
        "encoder.layer.3.moe.router.weight",
        "encoder.layer.3.moe.experts.down_proj_bias",
    }
    model.train()(**batch)[0].sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == trained
    moefold.revert(model)
    left = [name for name, p in model.named_parameters() if p.requires_grad]
    assert left == ["encoder.layer.3.output.dense.bias"]


def test_experts_of_a_trainable_host_are_trainable(tiny):
    model = tiny()
    moefold.upcycle(model)
    assert all(p.requires_grad for p in model.parameters())
