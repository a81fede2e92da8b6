"""Decoders: padding on the left, caches, and routers that must not look ahead.

Layouts: 1 is a real token, . is padding. A batch is 1111111 / ...1111 / ......1, windows of
attention are 4 tokens wide.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

import moefold
from moefold import MoEConfig, UpcycleConfig, routers
from moefold.surgery.hosts import layer as moe_layers
from moefold.surgery.hosts import masks
from tests.routers.common import VARIANTS, variant_id
from tests.surgery.decoders import (
    ATTENTIONS,
    DECODERS,
    TOLERANCE,
    VOCABULARY,
    checkpoint,
    decoder,
    further,
    given,
    heard,
    left_padded,
    spread_experts,
    upcycled,
)

LENGTHS = [7, 4, 1]
# One of each reach that a decoder may have: the token, the past, other sequences at its position.
CAUSAL: dict[str, dict[str, Any]] = {
    "token-choice": {"k": 2},
    "token-choice, past": {"k": 1, "capacity": 2},
    "expert-choice, position": {"capacity_factor": 1.0, "group": "position"},
}


def of(name: str) -> tuple[str, dict[str, Any]]:
    return name.partition(",")[0], CAUSAL[name]


def kind_of(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation)


# Padding.


@pytest.mark.parametrize(("form", "attention"), ATTENTIONS)
def test_padding_on_the_left_is_in_no_routing(form, attention):
    model = upcycled(decoder(form, attention), "token-choice")
    ids, mask = left_padded(LENGTHS)
    with moefold.record_routing(model) as record, torch.no_grad():
        model(**given(ids, mask))
    assert len(record.sites) == 2
    for site in record.sites:
        chosen, found = heard(record, site)
        assert torch.equal(found, mask.bool())
        assert torch.equal(chosen.any(-1), mask.bool())


def change_by_padding(model: PreTrainedModel) -> float:
    ids, mask = left_padded(LENGTHS)
    with torch.no_grad():
        expected = model(**given(ids, mask)).logits[mask.bool()]
        changes = []
        for by in (1, 6):
            more, wider = further(ids, mask, by)
            found = model(**given(more, wider)).logits[wider.bool()]
            changes.append(float((found - expected).abs().max()))
    return max(changes)


@pytest.mark.parametrize("router", CAUSAL)
@pytest.mark.parametrize(("form", "attention"), ATTENTIONS)
def test_padding_further_on_the_left_changes_no_real_token(form, attention, router):
    name, settings = of(router)
    model = upcycled(decoder(form, attention), name, **settings)
    assert change_by_padding(model) < TOLERANCE[attention]


def test_padding_further_on_the_left_moves_no_position():
    assert change_by_padding(upcycled(decoder("llama"), "hash", by="position")) < TOLERANCE["sdpa"]


def test_without_the_mask_padding_would_take_the_room(monkeypatch):
    # The test above can fail: the same with the mask withheld.
    monkeypatch.setattr(moe_layers, "real_tokens", lambda *_: None)
    name, settings = of("token-choice, past")
    assert change_by_padding(upcycled(decoder("llama"), name, **settings)) > 1e-2


@pytest.mark.parametrize("form", ["llama", "gemma3"])
def test_losses_do_not_count_padding(form):
    # Losses that are asked for and losses that ride, with 0 and 5 more columns of padding. What
    # rides has no value to look at, but gradients: those of the router.
    model = upcycled(decoder(form), "token-choice", k=2).train()
    ids, mask = left_padded(LENGTHS)
    values, slopes = [], []
    for by in (0, 5):
        inputs = given(*further(ids, mask, by))
        model.zero_grad()
        with moefold.record_routing(model) as record:
            model(**inputs).logits.mul(0).sum().backward()
        values.append(record.loss(balance=1.0, z=1.0))
        moes = [module for module in model.modules() if isinstance(module, moefold.MoE)]
        slopes.append([moe.router.weight.grad for moe in moes])
    # float64: the order of summation.
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-12)
    for one, other in zip(*slopes, strict=True):
        assert one.abs().max() > 1e-6
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


# Caches.


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("form", DECODERS)
def test_renormalised_copies_generate_what_the_dense_model_does(form, cache):
    # 7 tokens and 8 more: past the window of Mistral and Gemma.
    dense = decoder(form)
    model = upcycled(copy.deepcopy(dense), "token-choice", spread=False, k=2, renormalize=True)
    ids, mask = left_padded(LENGTHS)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    if cache == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    expected = dense.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)
    # That the tokens say something of the mixtures: other experts say other tokens.
    spread_experts(model)
    assert not torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)


# Twelve tokens: a prompt, then one by one and several at once; several at once, up to the window
# and past it; all at once; one by one from the first, then many.
STEPS = ((5, 1, 1, 2, 3), (2, 2, 2, 2, 4), (12,), (1, 1, 1, 1, 1, 1, 6))


def cache_for(model: PreTrainedModel, kind: str, room: int) -> Any:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=room)


def in_steps(model: PreTrainedModel, inputs: dict, steps: tuple[int, ...], cache: Any) -> Tensor:
    logits, at = [], 0
    for step in steps:
        now = slice(at, at + step)
        part = {name: value[:, now] for name, value in inputs.items()}
        part["attention_mask"] = inputs["attention_mask"][:, : at + step]
        logits.append(model(**part, past_key_values=cache, use_cache=True).logits)
        at += step
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("form", "attention"),
    [a for a in ATTENTIONS if "sdpa" in a or a[0] in ("llama", "mistral", "gemma2")],
)
@torch.no_grad()
def test_steps_with_a_cache_are_the_full_forward(form, attention, cache):
    model = upcycled(decoder(form, attention), "token-choice", k=2)
    ids, mask = left_padded([12, 8, 3])
    inputs = given(ids, mask)
    with moefold.record_routing(model) as full:
        expected = model(**inputs, use_cache=False).logits[mask.bool()]
    for steps in STEPS:
        with moefold.record_routing(model) as record:
            found = in_steps(model, inputs, steps, cache_for(model, cache, room=20))
        assert (found[mask.bool()] - expected).abs().max() < 10 * TOLERANCE[attention], steps
        for site in full.sites:
            chosen, real = heard(record, site)
            assert torch.equal(real, mask.bool()), steps
            assert torch.equal(chosen, heard(full, site)[0]), steps


@pytest.mark.parametrize("form", ["llama", "mistral", "gemma3"])
@torch.no_grad()
def test_the_last_keys_of_a_static_cache_are_not_the_own_ones(form, monkeypatch):
    # The test above can fail: with a static cache the last keys of a mask are room for later.
    model = upcycled(decoder(form), "token-choice", k=2)
    ids, mask = left_padded([12, 8, 3])

    def last(mask: Tensor, *_: Any) -> Tensor:
        return mask.diagonal(offset=mask.shape[2] - mask.shape[1], dim1=-2, dim2=-1)

    monkeypatch.setattr(masks, "_own_keys", last)
    with moefold.record_routing(model) as record:
        in_steps(model, given(ids, mask), STEPS[1], cache_for(model, "static", room=20))
    assert not torch.equal(heard(record, record.sites[-1])[1], mask.bool())


_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "pad_token_id": 1,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    # The class divides by sqrt(d_model): three times a T5 of its width.
    "initializer_factor": 3.0,
}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("config", "kind"),
    [(T5Config, T5ForConditionalGeneration), (UMT5Config, UMT5ForConditionalGeneration)],
    ids=["t5", "umt5"],
)
@torch.no_grad()
def test_steps_of_an_encoder_decoder_are_its_full_forward(config, kind, cache):
    model = upcycled(kind(config(**_T5)).double().eval(), "token-choice", k=2)
    ids, mask = left_padded([7, 5, 2])
    ids, mask = ids.flip(1), mask.flip(1)
    encoded = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    decoded, real = left_padded([9, 6, 4])
    inputs: dict[str, Any] = {
        "encoder_outputs": BaseModelOutput(last_hidden_state=encoded),
        "attention_mask": mask,
    }
    with moefold.record_routing(model.decoder) as full:
        expected = model(
            **inputs, decoder_input_ids=decoded, decoder_attention_mask=real, use_cache=False
        ).logits
    own, cross = cache_for(model, cache, room=15), cache_for(model, cache, room=7)
    both, logits, at = EncoderDecoderCache(own, cross), [], 0
    with moefold.record_routing(model.decoder) as record:
        for step in (3, 2, 1, 1, 1, 1):
            part = {
                "decoder_input_ids": decoded[:, at : at + step],
                "decoder_attention_mask": real[:, : at + step],
            }
            logits.append(model(**inputs, **part, past_key_values=both, use_cache=True).logits)
            at += step
    found = torch.cat(logits, dim=1)
    # float64: the order of summation.
    assert (found - expected)[real.bool()].abs().max() < 1e-10
    for site in full.sites:
        chosen, seen = heard(record, site)
        assert torch.equal(seen, real.bool())
        assert torch.equal(chosen, heard(full, site)[0])


# Causality.

ASKED = [
    *(variant for variant in VARIANTS if variant[0] != "hash"),  # by default it wants token ids
    ("hash", {"by": "position", "k": 2}),
]


@pytest.mark.parametrize("variant", ASKED, ids=variant_id)
@torch.no_grad()
def test_a_router_sees_no_later_token_or_is_refused(variant):
    name, settings = variant
    model = decoder("llama")
    if not routers.build(name, dim=16, num_experts=4, **settings).is_causal:
        router = routers.config(name, **settings)
        config = UpcycleConfig(moe=MoEConfig(num_experts=4, router=router), sites="all")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        message = r"would change an earlier one.*Causal routers: .*token-choice.*mixtral.*position"
        for operation in (moefold.plan, moefold.upcycle):
            with pytest.raises(ValueError, match=message):
                operation(model, config)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        return
    upcycled(model, name, **settings)
    ids = torch.randint(5, VOCABULARY, (3, 9))
    for training in (False, True):
        first, second = (
            _logits(model.train(training), tokens) for tokens in (ids, changed(ids, after=6))
        )
        # But for the order of sums, of which an expert given more or fewer tokens may take another.
        assert (first - second)[:, :6].abs().max() < TOLERANCE["sdpa"]
        assert (first - second)[:, 6:].abs().max() > 1e-2


def changed(ids: Tensor, *, after: int) -> Tensor:
    later = (ids[:, after:] + 7) % VOCABULARY
    return torch.cat([ids[:, :after], later], dim=1)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    torch.manual_seed(0)  # routers that draw (at random, jitter) draw the same
    return model(ids).logits


def test_a_decoder_is_refused_what_its_encoder_may_have():
    model: Any = T5ForConditionalGeneration(T5Config(**_T5)).double().eval()
    soft = MoEConfig(num_experts=4, router=routers.config("soft"))
    chosen = MoEConfig(num_experts=4, router=routers.config("token-choice", k=2))
    message = r"decoder\.block\.0: router 'soft' looks at the whole group.*Causal routers: "
    with pytest.raises(ValueError, match=message):
        moefold.plan(model, UpcycleConfig(moe=soft, sites="all"))
    config = UpcycleConfig(moe=soft, moe_at={r"decoder\..*": chosen}, sites="all")
    moefold.upcycle(model, config, inputs=False)
    spread_experts(model)
    ids, mask = left_padded(LENGTHS)
    decoded = torch.randint(5, VOCABULARY, (3, 9))
    with torch.no_grad():
        first, second = (
            model(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens).logits
            for tokens in (decoded, changed(decoded, after=6))
        )
    # Its norms and attention are in float32.
    assert (first - second)[:, :6].abs().max() < TOLERANCE["eager"]
    assert (first - second)[:, 6:].abs().max() > 1e-2


def test_a_router_that_looks_ahead_would_change_earlier_tokens(monkeypatch):
    # The test above can fail: expert choice, let through.
    monkeypatch.setattr(routers.AbstractRouter, "is_causal", property(lambda _: True))
    model = upcycled(decoder("llama"), "expert-choice", capacity_factor=1.0)
    ids = torch.randint(5, VOCABULARY, (3, 9))
    with torch.no_grad():
        first, second = _logits(model, ids), _logits(model, changed(ids, after=6))
    assert (first - second)[:, :6].abs().max() > 1e-3


NOT_CAUSAL = [
    *((form, {"is_causal": False}) for form in DECODERS),
    ("gemma3", {"use_bidirectional_attention": True}),
]


@pytest.mark.parametrize(("form", "setting"), NOT_CAUSAL)
def test_a_decoder_made_an_encoder_takes_any_router_with_its_mask(form, setting):
    model = upcycled(decoder(form, **setting), "expert-choice", capacity_factor=1.0)
    ids, mask = left_padded(LENGTHS)
    with moefold.record_routing(model) as record, torch.no_grad():
        model(**given(ids, mask), use_cache=False)
    for site in record.sites:
        assert torch.equal(heard(record, site)[1], mask.bool())
    assert change_by_padding(model) < TOLERANCE[kind_of(model)]


def test_a_causal_gemma2_stays_one():
    # The flag that Gemma 3 heeds makes no difference to the masks of Gemma 2.
    dense = decoder("gemma2", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match=r"a causal host cannot use it"):
        upcycled(dense, "expert-choice")


# Training.


def gradients(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[list, dict]:
    """Logits of several forward passes, and the gradients of one backward after all of them."""
    kept = [model(**given(ids, mask), use_cache=False).logits[mask.bool()] for ids, mask in batches]
    torch.stack([(logits.sin() * logits).sum() for logits in kept]).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [logits.detach() for logits in kept], found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", ["llama", "gemma3", "gpt2"])
def test_checkpointing_with_two_batches_before_one_backward(form, reentrant):
    # Each layer is computed again with the mask of its own batch.
    name, settings = of("token-choice, past")
    model = upcycled(decoder(form), name, **settings).train()
    twin = copy.deepcopy(model)
    checkpoint(twin, reentrant=reentrant)
    batches = [left_padded(LENGTHS), left_padded([3, 9])]
    plain, expected = gradients(model, batches)
    checkpointed, found = gradients(twin, batches)
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.equal(one, other)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        # The same products, but gradients of two passes may be added in another order.
        assert torch.allclose(gradient, found[parameter], rtol=1e-10, atol=1e-12), parameter
    assert any("router" in parameter for parameter in expected)


def test_autocast():
    # Mixtures of copies are about as far from float32 as the dense model is: they round once more,
    # where two experts are added up.
    dense = decoder("llama", "eager").train()
    model = upcycled(copy.deepcopy(dense), "token-choice", spread=False, k=2, renormalize=True)
    ids, mask = left_padded(LENGTHS)
    real = mask.bool()
    expected = dense(**given(ids, mask)).logits[real]
    with torch.autocast("cpu", torch.bfloat16), moefold.record_routing(model) as record:
        rounded = dense(**given(ids, mask)).logits[real]
        found = model(**given(ids, mask)).logits[real]
    found.float().square().sum().backward()
    for site in record.sites:
        assert torch.equal(heard(record, site)[1], real)
        assert record[site][0].weights.dtype == torch.float32  # pyright: ignore
    dense_error, error = (
        float((logits.detach().float() - expected.detach()).abs().max())
        for logits in (rounded, found)
    )
    assert 0 < error < 3 * dense_error
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for n, p in model.named_parameters()
        if "moe." in n
    )
