"""Packed rows: several sequences in one, whose positions begin anew or whose mask is in blocks.

Layout: a row is AAAAAABCCCCC, with padding AAAAAABCCCCC...; a mask in blocks is, for ABB,

    A 1 0 0        causal:  A 1 0 0
    B 0 1 1                 B 0 1 0
    B 0 1 1                 B 0 1 1
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel

import moefold
from moefold.surgery.hosts.masks import is_packed
from tests.routers.common import untyped
from tests.surgery.decoders import DECODERS, VOCABULARY, WINDOW, decoder, heard, upcycled

LENGTHS = (6, 1, 5)
LOW = torch.finfo(torch.float32).min


def packed_row() -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, VOCABULARY, (1, sum(LENGTHS)))
    return ids, torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)


def blocks(padding: int = 0, *, causal: bool) -> Tensor:
    """The mask of a packed row, `1 1 tokens tokens`; padding attends to nothing."""
    owner = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])
    mask = owner.unsqueeze(1) == owner
    mask = mask.tril() if causal else mask
    return functional.pad(mask, (0, padding, 0, padding))[None, None]


# What a mask says.

TWO = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 1]]).bool()[None, None]  # ABB
ONE = torch.ones(1, 1, 3, 3, dtype=torch.bool)  # AAA
LATE = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 1, 1]]).bool()[None, None]  # .AA
REAL = torch.ones(1, 3, dtype=torch.bool)


def added(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, LOW)


@pytest.mark.parametrize("form", [lambda m: m, added, Tensor.long], ids=["sdpa", "eager", "ints"])
@pytest.mark.parametrize("triangle", [lambda m: m, Tensor.tril], ids=["all", "causal"])
def test_a_mask_in_blocks_is_packed(form, triangle):
    late = torch.tensor([[False, True, True]])
    assert is_packed(form(triangle(TWO)), None, REAL)
    assert not is_packed(form(triangle(ONE)), None, REAL)
    assert not is_packed(form(triangle(LATE)), None, late)
    # One packed row of a batch is enough.
    both = torch.cat([triangle(ONE), triangle(TWO)])
    assert is_packed(form(both), None, REAL.expand(2, 3))


def test_a_window_is_not_packed():
    band = torch.ones(6, 6).tril().triu(-1).bool()[None, None]
    assert not is_packed(band, None, torch.ones(1, 6, dtype=torch.bool))


def test_positions_say_it_where_there_is_no_mask():
    assert is_packed(None, torch.tensor([[0, 0, 1]]), None)
    assert is_packed(None, torch.tensor([[0, 1, 2], [0, 1, 0]]), None)
    assert not is_packed(None, torch.tensor([[4, 5, 6]]), None)


@pytest.mark.parametrize(
    ("mask", "positions"),
    [
        (None, None),
        (None, torch.tensor([[3]])),
        (None, torch.zeros(3, 1, 3).long()),  # positions of three kinds, as for images
        (REAL, torch.tensor([[0, 0, 1]])),  # flash attention, which unpads by it
        (torch.ones(1, 1, 1, 3).bool(), torch.tensor([[0, 0, 1]])),  # one row for all
        (torch.ones(1, 1, 2, 3).bool(), torch.tensor([[1, 2]])),  # with a cache
    ],
)
def test_where_nothing_says_so(mask, positions):
    assert is_packed(mask, positions, REAL) is None


# Decoders.


@pytest.mark.parametrize("form", DECODERS)
@torch.no_grad()
def test_a_packed_row_is_its_sequences_alone(form):
    assert max(LENGTHS) > WINDOW
    model = upcycled(decoder(form), "token-choice", k=2)
    ids, positions = packed_row()
    # With a cache transformers takes the row for one sequence.
    with moefold.record_routing(model) as record:
        found = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    for site in record.sites:
        assert heard(record, site)[1].all()
    alone = [model(input_ids=part, use_cache=False).logits for part in ids.split(LENGTHS, 1)]
    tolerance = 1e-4 if form == "gemma2" else 1e-10  # float32; float64: the order of summation
    assert (found - torch.cat(alone, dim=1)).abs().max() < tolerance


MIXING: list[tuple[str, dict[str, Any], str]] = [
    ("token-choice", {"k": 1, "capacity": 2}, "past"),
    ("expert-choice", {"group": "position"}, "batch"),
    ("hash", {"by": "position"}, "past"),
]


@pytest.mark.parametrize(("router", "settings", "reach"), MIXING)
@pytest.mark.parametrize("form", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_a_packed_row_is_refused_where_it_would_be_mixed(form, router, settings, reach):
    model = upcycled(decoder(form), router, **settings)
    ids, positions = packed_row()
    message = rf"0: the batch is packed, several .* reaches the {reach} .*a row of its own and pad"
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, position_ids=positions, use_cache=False)
    # Nor is it a matter of positions alone: one sequence that begins late is taken.
    assert model(input_ids=ids, position_ids=torch.arange(3, 15)[None]).logits.isfinite().all()


@pytest.mark.parametrize("form", ["llama", "gemma3"])
def test_padding_at_the_end_of_a_packed_row(form):
    # AAAAAABCCCCC and AAAAAABCCCCC...: the same outputs, routings, losses and gradients.
    model = upcycled(decoder(form), "token-choice", k=2).train()
    ids, positions = packed_row()
    outputs, values, slopes = [], [], []
    for padding in (0, 3):
        real = functional.pad(torch.ones_like(ids), (0, padding)).bool()
        mask: Any = blocks(padding, causal=True)
        if form == "gemma3":
            narrow = mask & torch.ones_like(mask).triu(1 - WINDOW)
            mask = {"full_attention": mask, "sliding_attention": narrow}
        model.zero_grad()
        with moefold.record_routing(model) as record:
            logits = model(
                input_ids=functional.pad(ids, (0, padding), value=9),
                position_ids=functional.pad(positions, (0, padding)),
                attention_mask=mask,
                use_cache=False,
            ).logits[real]
        logits.square().sum().backward()
        for site in record.sites:
            assert torch.equal(heard(record, site)[1], real)
        outputs.append(logits.detach())
        values.append(record.loss(balance=1.0, z=1.0))
        slopes.append({n: p.grad for n, p in model.named_parameters() if "moe." in n})
    # float64: the order of summation.
    assert torch.allclose(*outputs, rtol=0, atol=1e-10)
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-12)
    for name, slope in slopes[0].items():
        assert torch.allclose(slope, slopes[1][name], rtol=1e-10, atol=1e-10), name


# Encoders, which are packed by a mask in blocks, or with lengths for flash attention.


def encoder(router: str, **settings: Any) -> Any:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        initializer_range=0.3,
    )
    return upcycled(BertModel(config).double().eval(), router, **settings)


@torch.no_grad()
def test_an_encoder_whose_sequences_would_compete_refuses_them():
    ids, positions = packed_row()
    packed = {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": blocks(causal=False),
    }
    model = encoder("expert-choice", capacity_factor=1.0)
    with pytest.raises(ValueError, match=r"layer.0: the batch is packed.* reaches the group"):
        model(**packed)
    # What may not see its neighbour is another sequence: the same row as one is taken.
    assert model(ids)[0].isfinite().all()
    chosen = encoder("token-choice", k=2)(**packed)[0]
    assert chosen.isfinite().all()


@pytest.mark.parametrize(
    ("router", "settings"),
    [
        ("token-choice", {"k": 2, "capacity_factor": 0.75, "group": "batch"}),
        ("expert-choice", {"capacity_factor": 1.0, "group": "batch"}),
    ],
)
@torch.no_grad()
def test_where_the_whole_batch_competes_packing_is_padding(router, settings):
    # AAAAAABCCCCC, AAAAAABCCCCC.. and AAAAAA / B..... / CCCCC. are the same twelve tokens.
    model = encoder(router, **settings)
    ids, positions = packed_row()
    found = []
    for padding in (0, 2):
        output = model(
            input_ids=functional.pad(ids, (0, padding), value=9),
            position_ids=functional.pad(positions, (0, padding)),
            attention_mask=blocks(padding, causal=False),
        )[0]
        found.append(output[0, : sum(LENGTHS)])
    parts = [functional.pad(part[0], (0, 6 - part.shape[1])) for part in ids.split(LENGTHS, 1)]
    mask = torch.arange(6) < torch.tensor(LENGTHS).unsqueeze(1)
    expected = model(input_ids=torch.stack(parts), attention_mask=mask.long())[0][mask]
    # float64: the order of summation.
    assert (found[0] - expected).abs().max() < 1e-10
    assert (found[1] - expected).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("router", "settings", "reach"),
    [*MIXING, ("soft", {}, "group"), ("unified", {"group": 4}, "batch")],
)
@torch.no_grad()
def test_lengths_for_flash_attention(router, settings, reach):
    lengths = torch.tensor([0, 2, 3], dtype=torch.int32)
    layer = encoder(router, **settings).encoder.layer[1]
    hidden = torch.zeros(1, 3, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"layer.1: the batch is packed.* reaches the {reach} "):
        layer(hidden, cu_seq_lens_q=lengths)
    taken = encoder("expert-choice", group="batch").encoder.layer[1]
    with untyped():
        assert taken(hidden, cu_seq_lens_q=lengths).isfinite().all()
