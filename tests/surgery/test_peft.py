"""LoRA of peft on experts and routers: nothing at first, trained alone, merged back exactly."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertModel, LlamaConfig, LlamaForCausalLM

import moefold
from moefold import MoE, MoEConfig, UpcycleConfig, routers
from tests.surgery.conftest import tiny_config

peft = pytest.importorskip("peft")

# float64: sums over at most 24 products of numbers of order one, a few layers deep, reach 1e-14.
SAME = 1e-10


def bert() -> BertModel:
    return BertModel(tiny_config(num_hidden_layers=2)).double().eval()


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval()


ATTENTION = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
MAKE = {"bert": bert, "llama": llama}


def upcycled(kind: str, **settings: object) -> Any:
    moe = MoEConfig(num_experts=3, **settings)  # pyright: ignore[reportArgumentType]
    model = MAKE[kind]()
    moefold.upcycle(model, UpcycleConfig(moe=moe, sites="all"))
    return model


def lora(model: nn.Module, kind: str) -> Any:
    return peft.LoraConfig(
        r=2,
        lora_alpha=6,  # scale 3
        target_modules=ATTENTION[kind],
        target_parameters=moefold.lora_targets(model),
    )


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch)[0][batch["attention_mask"].bool()]


def trained(model: Any, batch: dict[str, Tensor], steps: int = 3) -> Any:
    """A few steps that move the adapters far enough to change the choice of experts."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        output(model, batch).sin().mean().backward()
        optimizer.step()
    return model.eval()


def test_targets_are_the_matrices_by_their_short_names():
    # BERT's experts are plain and have biases, Llama's are gated and have none.
    assert moefold.lora_targets(upcycled("bert")) == [
        "moe.experts.down_proj",
        "moe.experts.up_proj",
        "moe.router.weight",
    ]
    assert moefold.lora_targets(upcycled("llama", shared_width=8)) == [
        "moe.experts.down_proj",
        "moe.experts.gate_up_proj",
        "moe.router.weight",
        "moe.shared.down_proj",
        "moe.shared.gate_up_proj",
    ]
    # The slots of a soft router are no stack of matrices; a layer by itself has no place.
    soft = MoEConfig(num_experts=3, router=routers.config("soft")).build(8)
    assert moefold.lora_targets(soft) == ["experts.down_proj", "experts.up_proj"]


def test_a_model_without_mixtures_has_no_targets():
    with pytest.raises(ValueError, match=r"BertModel has no mixture of experts; call moefold.upc"):
        moefold.lora_targets(bert())


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("shared_width", [0, 8])
def test_adapters_train_alone_and_merge_back(kind, shared_width, batch, tmp_path):
    model = upcycled(kind, shared_width=shared_width)
    before = output(model, batch).detach()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, lora(model, kind))
    assert torch.equal(output(adapted, batch), before)  # B is zero: nothing is added

    trained(adapted, batch)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            key = name.removeprefix("base_model.model.").replace("base_layer.", "")
            assert torch.equal(parameter, base[key]), name
    after = output(adapted, batch).detach()
    assert (after - before).abs().max() > 1e-3

    deltas = low_rank_changes(adapted)
    merged = adapted.merge_and_unload()
    assert merged is model
    changed = {name: value - base[name] for name, value in merged.state_dict().items()}
    assert {name for name, change in changed.items() if change.any()} == set(deltas)
    for name, delta in deltas.items():
        assert (changed[name] - delta).abs().max() < SAME, name
    assert (output(merged, batch) - after).abs().max() < SAME

    moefold.save(merged, tmp_path / "moe")
    assert (output(moefold.load(tmp_path / "moe"), batch) - after).abs().max() < SAME
    moefold.revert(merged)
    assert not any(isinstance(module, MoE) for module in merged.modules())


def low_rank_changes(model: nn.Module) -> dict[str, Tensor]:
    """What every adapter adds, written out: of a stack, `3 * B[:, e] @ A[e]` for each expert e.

    peft keeps A as [(expert, rank), in] and B as [out, (rank, expert)].
    """
    found = {}
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        a, b = (getattr(module, part)["default"].weight for part in ("lora_A", "lora_B"))
        place = name.removeprefix("base_model.model.").replace(".base_layer", "")
        key = f"{place}.{getattr(module, 'parameter_name', 'weight')}"
        experts = getattr(module, "num_experts", 1)
        one = [3 * b[:, e::experts] @ a[2 * e : 2 * e + 2] for e in range(experts)]
        found[key] = (one[0] if experts == 1 else torch.stack(one)).detach()
    return found


@pytest.mark.parametrize("kind", MAKE)
def test_adapters_come_back_on_a_loaded_mixture(kind, batch, tmp_path):
    model = upcycled(kind)
    moefold.save(model, tmp_path / "moe")
    adapted = trained(peft.get_peft_model(model, lora(model, kind)), batch)
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(said["target_parameters"]) == moefold.lora_targets(moefold.load(tmp_path / "moe"))

    again = peft.PeftModel.from_pretrained(moefold.load(tmp_path / "moe"), tmp_path / "adapter")
    assert torch.equal(output(again, batch), output(adapted, batch))
    merged = again.merge_and_unload()
    assert (output(merged, batch) - output(adapted, batch)).abs().max() < SAME
    # What was loaded, adapted and merged is saved as any other mixture.
    moefold.save(merged, tmp_path / "merged")
    assert torch.equal(output(moefold.load(tmp_path / "merged"), batch), output(merged, batch))


def test_under_gradient_checkpointing_the_gradients_are_the_same(batch):
    model = upcycled("bert")
    adapted = trained(peft.get_peft_model(model, lora(model, "bert")), batch, steps=1)

    def gradients() -> list[Tensor]:
        adapted.zero_grad()
        adapted.train()
        output(adapted, batch).sin().mean().backward()
        return [p.grad.clone() for p in adapted.parameters() if p.grad is not None]

    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients()
    assert len(plain) == len(checkpointed) > 0
    for one, other in zip(plain, checkpointed, strict=True):
        assert (one - other).abs().max() < SAME


def test_a_sentence_transformer_is_adapted_by_its_transformer(minilm, tmp_path):
    texts = ["A router decides which expert sees a token.", "Rain."]
    moefold.upcycle(minilm, UpcycleConfig(sites="last:1"), inputs=False)
    before = minilm.encode(texts)
    inner = minilm[0].model
    config = peft.LoraConfig(r=2, target_parameters=moefold.lora_targets(minilm))
    adapted = peft.get_peft_model(inner, config)
    assert (minilm.encode(texts) == before).all()  # in place: the encoder sees the adapters
    features = minilm.tokenize(texts)
    trained(adapted, {name: features[name] for name in ("input_ids", "attention_mask")})
    after = minilm.encode(texts)
    assert abs(after - before).max() > 1e-3
    with pytest.raises(ValueError, match=r"SentenceTransformer carries adapters of peft: 0.model"):
        moefold.save(minilm, tmp_path / "moe")
    assert adapted.merge_and_unload() is inner
    # float32: a weight plus its change is rounded once more than the two products apart, 6e-8 of
    # vectors of length one, through one layer.
    assert abs(minilm.encode(texts) - after).max() < 1e-5
    moefold.save(minilm, tmp_path / "moe")
    assert abs(moefold.load(tmp_path / "moe").encode(texts) - after).max() < 1e-5  # pyright: ignore


def test_a_host_with_adapters_is_refused_until_they_are_merged(tmp_path):
    model = bert()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    names = list(adapted.state_dict())
    for host in (adapted, model):
        message = rf"{type(host).__name__} carries adapters of peft: .*\bmerge_and_unload\(\)"
        with pytest.raises(ValueError, match=message):
            moefold.upcycle(host)
        with pytest.raises(ValueError, match=message):
            moefold.plan(host)
    assert list(adapted.state_dict()) == names
    merged = adapted.merge_and_unload()
    moefold.upcycle(merged)
    assert any(isinstance(module, MoE) for module in merged.modules())


def test_a_mixture_with_adapters_is_neither_saved_nor_reverted(tmp_path):
    model = upcycled("bert")
    adapted = peft.get_peft_model(model, lora(model, "bert"))
    held = {
        adapted: r"PeftModel carries adapters of peft: the model itself \(PeftModel\), .*; merge",
        model: r"BertModel carries .*: encoder.layer.0.attention.self.query \(Linear\), .*; mer",
    }
    for one, message in held.items():
        with pytest.raises(ValueError, match=message):
            moefold.save(one, tmp_path / "moe")
        with pytest.raises(ValueError, match=message):
            moefold.revert(one)
    assert not (tmp_path / "moe").exists()
    unloaded = adapted.unload()  # takes them out without a trace
    moefold.save(unloaded, tmp_path / "moe")
    moefold.revert(unloaded)


@pytest.mark.parametrize("how", ["target_parameters", "modules_to_save"])
def test_a_router_that_adapts_still_adapts(how, batch):
    # Either way peft puts a module of its own in the place of the router.
    model = upcycled("bert", router=routers.config("bias-balanced", k=1))
    settings = {how: ["moe.router.weight"] if how == "target_parameters" else ["router"]}
    config = peft.LoraConfig(target_modules=["query"], **settings)
    adapted = peft.get_peft_model(model, config).eval()
    moe = next(module for module in adapted.modules() if isinstance(module, MoE))
    assert not isinstance(moe.router, moefold.routers.AbstractRouter)
    router: Any = moe.own_router
    before = router.state.clone()
    with moefold.record_routing(adapted) as record:
        output(adapted, batch)
    record.update()
    assert not torch.equal(router.state, before)
    # And it is the one that routes.
    first = next(iter(record.values()))[0]
    with torch.no_grad(), moefold.record_routing(adapted) as record:
        router.state.copy_(torch.tensor([9.0, 0.0, 0.0]))
        output(adapted, batch)
    loads = next(iter(record.values()))[0].rows_per_expert
    assert loads[0] == batch["attention_mask"].sum() != first.rows_per_expert[0]
