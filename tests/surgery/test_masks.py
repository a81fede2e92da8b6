"""The padding mask reaches the router: in every form, checkpointed or not, and padding is nothing.

Layouts: 1 is a real token, . is padding.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import StaticCache

import moefold
from moefold import MoEConfig, UpcycleConfig, routers
from moefold.surgery import Copies
from moefold.surgery.hosts import layer as moe_layers
from moefold.surgery.hosts.masks import real_tokens
from tests.routers.common import untyped
from tests.surgery.decoders import checkpoint, decoder, spread_experts

HIDDEN = torch.zeros(2, 3, 8)
REAL = torch.tensor([[True, True, True], [True, False, False]])  # 111 / 1..
LOW = torch.finfo(torch.float32).min


def added(attended: torch.Tensor) -> torch.Tensor:
    return torch.where(attended, 0.0, LOW)


BIDIRECTIONAL = REAL[:, None, None, :].expand(2, 1, 3, 3)
CAUSAL = BIDIRECTIONAL & torch.ones(3, 3, dtype=torch.bool).tril()
FORMS = {
    "flash": REAL,
    "flash, integers": REAL.long(),
    "flash with a cache": functional.pad(REAL, (2, 0), value=True),
    "sdpa": BIDIRECTIONAL,
    "sdpa, one row": BIDIRECTIONAL[:, :, :1],
    "sdpa, many heads": BIDIRECTIONAL.expand(2, 4, 3, 3),
    "sdpa, causal": CAUSAL,
    "sdpa, causal with a cache": functional.pad(CAUSAL, (2, 0), value=True),
    "eager": added(BIDIRECTIONAL),
    "eager, causal": added(CAUSAL),
    "eager, half": added(CAUSAL).half().clamp_min(torch.finfo(torch.float16).min),
}


@pytest.mark.parametrize("mask", FORMS.values(), ids=FORMS.keys())
def test_real_tokens_of_every_form(mask):
    assert torch.equal(real_tokens(mask, HIDDEN), REAL)  # pyright: ignore[reportArgumentType]


def test_left_padding():
    real = torch.tensor([[False, False, True], [False, True, True]])  # ..1 / .11
    causal = real[:, None, None, :] & torch.ones(3, 3, dtype=torch.bool).tril()
    assert torch.equal(real_tokens(added(causal), HIDDEN), real)  # pyright: ignore


# Masks of a static cache are as wide as its room. Two queries, in rows of the batch that begin
# with 1 and with 3 tokens of padding; the own keys are in brackets.


def filled(form: str, room: int, tokens: int) -> StaticCache:
    cache = StaticCache(config=decoder(form).config, max_cache_len=room)
    states = torch.zeros(2, 1, tokens, 8)
    for layer in range(2):
        cache.update(states, states, layer)
    return cache


def static_mask(*rows: str) -> torch.Tensor:
    bits = [[[char == "1" for char in query] for query in row.split()] for row in rows]
    return torch.tensor(bits).unsqueeze(1)


@pytest.mark.parametrize("form", [bool, added], ids=["sdpa", "eager"])
def test_own_keys_of_a_static_cache(form):
    # Room for 6, with 2 tokens in it:
    #     .1[1]...  .11[1]..
    #     ..[.]...  ...[1]..
    mask = static_mask(".11... .111..", "...... ...1..")
    mask = mask if form is bool else added(mask)
    found = real_tokens(mask, HIDDEN[:, :2], filled("llama", 6, 2), 1)
    assert torch.equal(found, torch.tensor([[True, True], [False, True]]))  # pyright: ignore


def test_own_keys_of_a_static_cache_with_a_window():
    # A window of 4 over room for 20. With 1 token in it there are keys 0 to 3:
    #     .[1]..  .1[1].
    #     .[.]..  ..[.].
    mask = static_mask(".1.. .11.", ".... ....")
    found = real_tokens(mask, HIDDEN[:, :2], filled("mistral", 20, 1), 1)
    assert torch.equal(found, torch.tensor([[True, True], [False, False]]))  # pyright: ignore
    # With 2 tokens and 3 more it is full: keys 0 to 4, and the window begins to move.
    #     .1[1]..  .11[1].  .111[1]
    #     ..[.]..  ...[1].  ...1[1]
    mask = static_mask(".11.. .111. .1111", "..... ...1. ...11")
    found = real_tokens(mask, HIDDEN, filled("mistral", 20, 2), 1)
    assert torch.equal(found, torch.tensor([[True] * 3, [False, True, True]]))  # pyright: ignore
    # With 5 tokens there are keys 2 to 6 for tokens 5 and 6.
    #     111[1].  .111[1]
    mask = static_mask("1111. .1111", ".111. ..111")
    found = real_tokens(mask, HIDDEN[:, :2], filled("mistral", 20, 5), 1)
    assert torch.equal(found, torch.tensor([[True, True]] * 2))  # pyright: ignore
    # One token at a time: keys 2 to 5, the last is its own.
    mask = static_mask("1111", "....")
    found = real_tokens(mask, HIDDEN[:, :1], filled("mistral", 20, 5), 1)
    assert torch.equal(found, torch.tensor([[True], [False]]))  # pyright: ignore


def test_one_mask_for_the_whole_batch():
    found = real_tokens(BIDIRECTIONAL[1:], HIDDEN)
    assert torch.equal(found, REAL[1:].expand(2, 3))  # pyright: ignore[reportArgumentType]


def test_no_mask_means_all_are_real():
    assert real_tokens(None, HIDDEN) is None


@pytest.mark.parametrize("mask", [torch.ones(2, 3, 3), "blocks"])
def test_other_forms_are_refused(mask):
    with pytest.raises(ValueError, match=r"of type (Tensor and shape .*3, 3|str and shape None).*"):
        real_tokens(mask, HIDDEN)


ROUTERS = {
    "token-choice": {"k": 2, "renormalize": True},
    "token-choice, capacity": {"k": 2, "capacity_factor": 0.75},
    "token-choice, batch": {"k": 2, "capacity_factor": 0.75, "group": "batch"},
    "expert-choice": {"capacity_factor": 1.5},
    "sinkhorn-expert-choice": {},
    "unified": {"budget": 1.5},
    "unified, batch": {"budget": 1.5, "group": "batch"},
    "soft": {"slots": 2},
}


def config(name: str) -> UpcycleConfig:
    router = routers.config(name.partition(",")[0], **ROUTERS[name])
    # A router of some size, so that tokens differ in what they choose.
    return UpcycleConfig(
        moe=MoEConfig(num_experts=4, router=router), sites="all", birth=Copies(router_std=1.0)
    )


def padded(batch: dict, by: int) -> dict:
    """The batch with more padding on the right, of ids that stand for something elsewhere."""
    ids = functional.pad(batch["input_ids"], (0, by), value=7)
    return {"input_ids": ids, "attention_mask": functional.pad(batch["attention_mask"], (0, by))}


def changes_by_padding(model: nn.Module, batch: dict) -> float:
    real = batch["attention_mask"].bool()
    tokens = real.shape[1]
    with torch.no_grad():
        before = model(**batch)[0][real]
        return max(
            float((model(**padded(batch, by))[0][:, :tokens][real] - before).abs().max())
            for by in (1, 6)
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ROUTERS)
def test_padding_further_changes_no_real_token(tiny, batch, name, attention):
    model = tiny(attn_implementation=attention).double()
    moefold.upcycle(model, config(name))
    spread_experts(model)
    # float64, outputs about 1: what may differ is the order of summation in longer rows.
    assert changes_by_padding(model, batch) < 1e-11


@pytest.mark.parametrize("name", [n for n in ROUTERS if n != "token-choice"])
def test_without_the_mask_padding_would_matter(tiny, batch, name, monkeypatch):
    # The test above can fail: the same with the mask withheld.
    monkeypatch.setattr(moe_layers, "real_tokens", lambda *_: None)
    model = tiny().double()
    moefold.upcycle(model, config(name))
    spread_experts(model)
    assert changes_by_padding(model, batch) > 1e-3


def test_padding_is_in_no_routing(tiny, batch):
    model = tiny()
    moefold.upcycle(model, config("expert-choice"))
    with moefold.record_routing(model) as record, torch.no_grad():
        model(**batch)
    assert len(record.sites) == 4
    for site in record.sites:
        (routing,) = record[site]
        assert routing.mask is not None
        assert torch.equal(routing.mask, batch["attention_mask"].bool())


def gradients(model: nn.Module, batches: list[dict]) -> tuple[list, dict]:
    """Outputs of several forward passes, and the gradients of one backward after all of them."""
    made = [model(**batch)[0] for batch in batches]
    real = [batch["attention_mask"].bool() for batch in batches]
    kept = [output[mask] for output, mask in zip(made, real, strict=True)]
    torch.stack([(output.sin() * output).sum() for output in kept]).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [output.detach() for output in kept], found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["token-choice", "expert-choice", "unified, batch", "soft"])
def test_checkpointing_with_two_batches_before_one_backward(tiny, batch, name, reentrant):
    # Queries, then documents, then backward: each layer is recomputed with its own batch's mask.
    queries = batch
    documents = {
        "input_ids": torch.randint(60, (2, 9)),
        "attention_mask": (torch.arange(9) < torch.tensor([[3], [9]])).long(),
    }
    model = tiny().double().train()
    moefold.upcycle(model, config(name))
    spread_experts(model)
    twin = copy.deepcopy(model)
    checkpoint(twin, reentrant=reentrant)
    assert all(layer.gradient_checkpointing for layer in twin.encoder.layer)
    plain, expected = gradients(model, [queries, documents])
    checkpointed, found = gradients(twin, [queries, documents])
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.equal(one, other)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        # The same products, but gradients of two passes may be added in another order.
        assert torch.allclose(gradient, found[parameter], rtol=1e-10, atol=1e-12), parameter
    assert any("router" in n or "phi" in n for n in expected)


def test_checkpointing_recomputes(tiny, batch):
    # That the test above tests something: the layer does run twice, recorded once.
    model = tiny().train()
    moefold.upcycle(model, config("expert-choice"))
    checkpoint(model, reentrant=False)
    layer, runs = model.encoder.layer[1], []
    layer.attention.register_forward_hook(lambda *_: runs.append(1))
    with moefold.record_routing(model) as record:
        model(**batch)[0].sum().backward()
    assert len(runs) == 2
    assert len(record["encoder.layer.1.moe"]) == 1


def test_packed_sequences_are_refused_where_they_would_mix(tiny):
    lengths = torch.tensor([0, 2, 3], dtype=torch.int32)
    hidden = torch.zeros(1, 3, 16)
    model = tiny()
    moefold.upcycle(model, config("expert-choice"))
    with pytest.raises(ValueError, match=r"layer.1: the batch is packed, .* reaches the group"):
        model.encoder.layer[1](hidden, cu_seq_lens_q=lengths)
    moefold.revert(model)
    moefold.upcycle(model, config("token-choice"))
    with untyped():
        assert model.encoder.layer[1](hidden, cu_seq_lens_q=lengths).isfinite().all()
