"""Counting the operations of training: by hand for a tiny BERT, dense and upcycled."""

import pytest
import torch

import moefold
from moefold.train import training_flops
from tests.train.tiny import tiny_encoder

DIM, WIDTH, LAYERS, EXPERTS = 16, 24, 4, 4


def by_hand(tokens: int, dropout: bool) -> int:
    """Four projections and the MLP, two products of attention; each twice more in backward.

    Without dropout a fused kernel computes the attention's scores once more in backward. BERT's
    pooler looks at one token; nothing of a sentence encoder depends on it, so it has no backward.
    """
    linear = 2 * tokens * (4 * DIM * DIM + 2 * DIM * WIDTH)
    attention = 2 * tokens * tokens * DIM
    return LAYERS * (3 * linear + (6 if dropout else 7) * attention) + 2 * DIM * DIM


def tokens_of(encoder: object, text: str) -> int:
    return encoder.preprocess([text])["input_ids"].shape[1]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("dropout", [True, False])
def test_dense_is_what_the_layers_say(tmp_path, dropout: bool):
    encoder = tiny_encoder(tmp_path, attention_probs_dropout_prob=0.1 if dropout else 0.0)
    texts = ["abc", "ab 12 (x)"]
    lengths = [tokens_of(encoder, text) for text in texts]
    assert lengths[0] < lengths[1]
    # Integers; the mean of two of them is exact as well.
    assert training_flops(encoder, texts) == sum(by_hand(n, dropout) for n in lengths) / 2


@pytest.mark.parametrize("k", [1, 3])
def test_a_mixture_costs_its_rows_and_its_router(tmp_path, k: int):
    encoder = tiny_encoder(tmp_path)
    tokens = tokens_of(encoder, "abc def")
    router = moefold.routers.config("token-choice", k=k, renormalize=True)
    config = moefold.MoEConfig(num_experts=EXPERTS, router=router, losses={"balance": 0.01})
    dense = training_flops(encoder, ["abc def"])
    moefold.upcycle(encoder, moefold.UpcycleConfig(moe=config, sites="last:1"))
    mlp, gate = 2 * tokens * 2 * DIM * WIDTH, 2 * tokens * DIM * EXPERTS
    assert training_flops(encoder, ["abc def"]) - dense == 3 * ((k - 1) * mlp + gate)


def test_counting_leaves_no_trace(tmp_path):
    encoder = tiny_encoder(tmp_path)
    moefold.upcycle(encoder)
    moes = [m for m in encoder.modules() if isinstance(m, moefold.MoE)]
    before = torch.get_rng_state()
    training_flops(encoder, ["abc"])
    assert torch.equal(torch.get_rng_state(), before)
    assert not encoder.training
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert [m.backend for m in moes] == ["auto", "auto"]


def test_nothing_to_count(tmp_path):
    with pytest.raises(ValueError, match="0 texts"):
        training_flops(tiny_encoder(tmp_path), [])
