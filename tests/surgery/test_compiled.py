"""An upcycled model under torch.compile computes what it computes without.

Nothing is compiled to machine code: `aot_eager` traces as every compiler does and then runs the
operations it found, so what is wrong with the trace shows and little time is lost.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertModel,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

import moefold
from moefold import MoEConfig, UpcycleConfig, routers
from moefold.surgery import Copies
from tests.surgery.conftest import tiny_config
from tests.surgery.decoders import VOCABULARY, checkpoint, decoder, given, left_padded, upcycled

pytestmark = [
    pytest.mark.compile,
    # torch's own, while it traces an autograd function.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """Every model of transformers runs through one wrapper, which is compiled 8 times at most."""
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["token-choice", "expert-choice", "soft"])
def test_outputs_and_gradients(tiny, batch, name):
    model = tiny(num_hidden_layers=2).train()
    moe = MoEConfig(num_experts=4, router=routers.config(name))
    moefold.upcycle(model, UpcycleConfig(moe=moe, birth=Copies(router_std=1.0, copy_noise_std=0.1)))
    real = batch["attention_mask"].bool()

    def run(called: torch.nn.Module) -> tuple[torch.Tensor, dict]:
        model.zero_grad()
        output = called(**batch).last_hidden_state[real]
        output.square().sum().backward()
        return output.detach(), {
            n: p.grad for n, p in model.named_parameters() if p.grad is not None
        }

    expected, slopes = run(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, others = run(compiled)  # pyright: ignore[reportArgumentType]
    # float32, the same products in another order.
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    for parameter, slope in slopes.items():
        assert torch.allclose(slope, others[parameter], rtol=1e-3, atol=1e-4), parameter
    # What is not used (the pooler) has no gradient, or one of zeros, which compiled code makes.
    assert not any(others[parameter].any() for parameter in others.keys() - slopes.keys())
    with moefold.record_routing(model) as record:
        compiled(**batch)
    (routing,) = record["encoder.layer.1.moe"]
    assert routing.mask is not None
    assert torch.equal(routing.mask, real)


def test_padding_further_when_compiled(tiny, batch):
    model = tiny(num_hidden_layers=1).double()
    router = routers.config("expert-choice", capacity_factor=1.5)
    moe = MoEConfig(num_experts=4, router=router)
    birth = Copies(router_std=1.0, copy_noise_std=0.1)
    moefold.upcycle(model, UpcycleConfig(moe=moe, sites="all", birth=birth))
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch)[0][real]
        compiled = torch.compile(model, backend="aot_eager")
        more = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in batch.items()}
        # float64: the order of summation.
        assert (compiled(**batch)[0][real] - expected).abs().max() < 1e-11
        assert (compiled(**more)[0][:, :7][real] - expected).abs().max() < 1e-11


def build_bert() -> tuple[PreTrainedModel, dict[str, Any]]:
    ids, mask = left_padded(LENGTHS)
    config = tiny_config(num_hidden_layers=2, use_cache=False)  # or checkpointing warns of it
    return BertModel(config), {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}


def build_t5() -> tuple[PreTrainedModel, dict[str, Any]]:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        initializer_factor=3.0,
    )
    ids, mask = left_padded(LENGTHS)
    inputs = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    decoded, real = left_padded([3, 5, 2])
    return T5Model(config), {
        **inputs,
        "decoder_input_ids": decoded,
        "decoder_attention_mask": real,
        "use_cache": False,
    }


def build_vit() -> tuple[PreTrainedModel, dict[str, Any]]:
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return ViTModel(config), {"pixel_values": torch.randn(3, 3, 8, 8, dtype=torch.float64)}


def build_decoder(form: str) -> Callable[[], tuple[PreTrainedModel, dict[str, Any]]]:
    def build() -> tuple[PreTrainedModel, dict[str, Any]]:
        return decoder(form), {**given(*left_padded(LENGTHS)), "use_cache": False}

    return build


LENGTHS = [7, 4, 1]
HOSTS = {
    "bert": build_bert,
    "t5": build_t5,
    "vit": build_vit,
    **{form: build_decoder(form) for form in ("llama", "qwen3", "gemma3", "gpt2")},
}
# A router of the past: where padding takes room, or a mask is not the right one, outputs differ.
PAST: dict[str, Any] = {"k": 1, "capacity": 2}


def outputs_and_gradients(
    called: Callable[..., Any], model: nn.Module, inputs: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = called(**inputs)[0]
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    output = output if mask is None else output[mask.bool()]
    output.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), found


@pytest.mark.parametrize(
    ("host", "checkpointed"),
    [*((host, False) for host in HOSTS), ("bert", True), ("llama", True)],
)
def test_every_kind_of_host(host, checkpointed):
    model, inputs = HOSTS[host]()
    model = upcycled(model.double(), "token-choice", **PAST).train()
    twin = copy.deepcopy(model)
    if checkpointed:
        checkpoint(twin, reentrant=False)
    expected, slopes = outputs_and_gradients(model, model, inputs)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    found, others = outputs_and_gradients(compiled, twin, inputs)
    # float64: the order of summation, and of gradients that are added up.
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    assert any("moe.router" in name for name in slopes)
    for name, slope in slopes.items():
        assert torch.allclose(others[name], slope, rtol=1e-10, atol=1e-10), name


def test_a_packed_row_is_refused_when_it_is_run():
    model = upcycled(decoder("llama"), "token-choice", **PAST)
    ids, positions = torch.randint(5, VOCABULARY, (1, 5)), torch.arange(5).unsqueeze(0)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(input_ids=ids, position_ids=positions, use_cache=False).logits
        expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        assert torch.allclose(found, expected, rtol=0, atol=1e-10)
        with pytest.raises(RuntimeError, match=r"layers.0: the batch is packed, several sequences"):
            compiled(input_ids=ids, position_ids=positions % 3, use_cache=False)


def test_a_step_with_a_static_cache():
    # Generation compiles one step, and runs it again and again.
    model = upcycled(decoder("llama"), "token-choice", k=2)
    ids, mask = left_padded([9, 6, 4])
    inputs = given(ids, mask)
    step: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits[:, 6:]
        first = {name: value[:, :6] for name, value in inputs.items()}
        model(**first, past_key_values=cache)
        for at in (6, 7, 8):
            now = {name: value[:, at : at + 1] for name, value in inputs.items()}
            now["attention_mask"] = mask[:, : at + 1]
            with moefold.record_routing(model) as record:
                found = step(**now, past_key_values=cache).logits
            assert (found[:, 0] - expected[:, at - 6]).abs().max() < 1e-10
            for site in record.sites:
                (routing,) = record[site]
                assert routing.mask is None or torch.equal(routing.mask, mask[:, [at]].bool())
