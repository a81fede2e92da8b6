"""What a router remembers follows whatever is done to the cache it is kept in."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import moefold
from moefold import MoEConfig, UpcycleConfig, routers
from moefold.surgery.hosts.past import CachedPast, remembering


def upcycled(rule: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).double().eval()
    router = routers.config("unified", budget=1.5, inference=rule)
    moefold.upcycle(model, UpcycleConfig(moe=MoEConfig(num_experts=4, router=router), sites="all"))
    return model


def keys_of(cache: Any) -> list[list[float]]:
    return cache.layers[0].keys[:, 0, :, 0].tolist()


def cache_of_scores() -> tuple[DynamicCache, CachedPast]:
    """Two sequences of three tokens, in keys and in scores alike."""
    cache = DynamicCache()
    values = torch.arange(6.0).reshape(2, 1, 3, 1)
    cache.update(values, values, 0)
    CachedPast(cache, 0, 0, "router").add(values[:, 0])
    return cache, CachedPast(cache, 0, 3, "router")


@pytest.mark.parametrize("rule", ["threshold", "prefix", "token-choice"])
def test_an_upcycled_decoder_generates_what_full_passes_would(rule):
    model = upcycled(rule)
    ids = torch.randint(3, 60, (2, 7))
    mask = torch.arange(7).expand(2, 7) >= torch.tensor([[0], [3]])
    made = model.generate(
        ids * mask, attention_mask=mask.long(), max_new_tokens=10, do_sample=False
    )
    for _ in range(10):
        logits = model(input_ids=ids * mask, attention_mask=mask.long(), use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1)
    assert torch.equal(made, ids * mask)


@pytest.mark.parametrize("rule", ["threshold", "prefix", "token-choice"])
def test_an_upcycled_decoder_with_a_rule_does_not_leak(rule):
    found = moefold.leakage(upcycled(rule), {"input_ids": torch.randint(3, 60, (2, 12))})
    assert found.tolerance == 1e-12
    assert found.clean, str(found)


def test_a_causal_decoder_takes_a_group_router_only_with_a_rule():
    with pytest.raises(ValueError, match="causal"):
        upcycled("group")


def test_beams_are_reordered():
    cache, past = cache_of_scores()
    cache.reorder_cache(torch.LongTensor([1, 1]))
    kept = past.scores()
    assert kept is not None
    assert kept[..., 0].tolist() == keys_of(cache) == [[3, 4, 5]] * 2


def test_sequences_are_repeated_and_selected():
    cache, past = cache_of_scores()
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    kept = past.scores()
    assert kept is not None
    assert kept[..., 0].tolist() == keys_of(cache)
    assert kept[..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_rejected_tokens_are_cut_off():
    cache, _ = cache_of_scores()
    cache.crop(-1)
    kept = CachedPast(cache, 0, 2, "router").scores()
    assert kept is not None
    assert kept[..., 0].tolist() == [[0, 1], [3, 4]]


def test_a_cache_that_is_emptied_forgets():
    cache, _ = cache_of_scores()
    cache.reset()
    past = CachedPast(cache, 0, 0, "router")
    assert past.scores() is None
    cache.update(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1), 0)
    past.add(torch.ones(1, 2, 1))
    kept = CachedPast(cache, 0, 2, "router").scores()
    assert kept is not None
    assert kept.tolist() == [[[1.0], [1.0]]]


def test_the_class_of_a_layers_cache_is_made_once():
    cache, _ = cache_of_scores()
    kind = type(cache.layers[0])
    assert kind is remembering(kind.__mro__[1])
    assert kind.__name__ == "DynamicLayerWithScores"
