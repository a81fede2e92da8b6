"""Perplexity, operations and experts on text, against what is counted by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import moefold
from moefold import routers
from moefold.evaluate.language import Pieces, passed, perplexity, perplexity_ratio, pieces_of
from tests.embedding.tiny import tokenizer
from tests.rerouting.models import build


def ids(*lengths: int, seed: int = 0) -> Pieces:
    """Random pieces, each a document."""
    draw = np.random.default_rng(seed)
    pieces = tuple(tuple(draw.integers(3, 60, n).tolist()) for n in lengths)
    return Pieces(ids=pieces, document=tuple(range(len(pieces))))


def test_text_is_cut_into_pieces_of_documents():
    #          0 1 2 3 4        5           6 7 8 9
    texts = ["a a a a a", "a", "a a a a", ""]
    pieces = pieces_of(texts, _Words(), length=2)
    # The fifth word of the first text and the second text have nothing to be predicted from.
    assert pieces.ids == ((1, 1), (1, 1), (1, 1), (1, 1))
    assert pieces.document == (0, 0, 2, 2)
    assert pieces.tokens == 8
    one = pieces_of(["a a a a a a"], _Words(), length=2)
    assert one.document == (0, 1, 2)  # of a single text every piece is one


class _Words:
    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def test_halves_part_between_documents():
    pieces = Pieces(ids=((1, 1),) * 6, document=(0, 0, 0, 0, 1, 1))
    first, second = pieces.halves()
    assert (first.document, second.document) == ((0, 0, 0, 0), (1, 1))
    first, second = Pieces(ids=((1, 1),) * 4, document=(7, 7, 7, 7)).halves()
    assert (first.tokens, second.tokens) == (8, 0)
    assert pieces.up_to(5).tokens == 4
    assert pieces.up_to(1).tokens == 2


def test_batches_are_of_one_length():
    assert list(ids(3, 5, 3, 3, 5).batches(2)) == [[1, 4], [0, 2], [3]]


def test_perplexity_is_what_the_words_say():
    model, pieces = build("olmoe"), ids(7, 4, 7, 2)
    found = passed(model, pieces, batch_size=2)
    losses, counts = [], []
    for piece in pieces.ids:
        with torch.no_grad():
            said = model(input_ids=torch.tensor([piece])).logits[0].double().log_softmax(-1)
        losses.append(-sum(float(said[t, word]) for t, word in enumerate(piece[1:])))
        counts.append(len(piece) - 1)
    assert found.losses is not None
    # float32 losses of a few units, a handful of them for each document.
    assert np.allclose(found.losses, losses, rtol=1e-5)
    assert found.predicted.tolist() == counts == [6, 3, 6, 1]
    interval = perplexity(found.losses, found.predicted)
    assert interval.mean == pytest.approx(math.exp(sum(losses) / 16), rel=1e-5)
    assert interval.low < interval.mean < interval.high


def test_a_document_is_drawn_whole():
    # Two documents, one of a single token lost by 3 nats, one of nine lost by 1 each. Draws give
    # one of them twice or both: exp(3), exp(1), exp(1.2).
    found = perplexity(np.array([3.0, 9.0]), np.array([1, 9]))
    assert found.mean == pytest.approx(math.exp(1.2))
    assert found.low == pytest.approx(math.exp(1))
    assert found.high == pytest.approx(math.exp(3))


def test_a_ratio_is_paired():
    losses, counts = np.random.default_rng(0).random(50) * 40, np.full(50, 10)
    found = perplexity_ratio(losses + 1.0, losses, counts)  # each token loses a tenth of a nat
    assert (found.mean, found.low, found.high) == pytest.approx((math.exp(0.1),) * 3)


# Operations of one token of tests/rerouting/models.py, two for each multiplication: width 16,
# 2 heads of 8, 6 experts of width 24, 60 words.
ATTENTION = 2 * 4 * 16 * 16  # query, key, value, output
GATE = 2 * 16 * 6
ROW = 2 * (16 * 48 + 24 * 16)  # gate and up in one, down
HEAD = 2 * 16 * 60


def by_hand(tokens: int, rows: float, layers: int = 2) -> float:
    """For a token of a sequence, with so many rows in each layer."""
    scores = 2 * (2 * tokens * 16)  # with each token: a score and a sum, in both heads
    return layers * (ATTENTION + scores + GATE + rows * ROW) + HEAD


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_operations_are_those_of_a_count_by_hand(experts):
    model: Any = build("olmoe")
    model.set_experts_implementation(experts)
    pieces = ids(10, 10, 10)
    found = passed(model, pieces, batch_size=2)
    assert found.flops_per_token == by_hand(10, 2)
    assert found.experts_per_token is None  # it does not say
    for budget in (1, 1.5, 3):
        moefold.reroute(model, routers.config("unified", budget=budget))
        found = passed(model, pieces, batch_size=2, losses=False)
        assert found.flops_per_token == by_hand(10, budget)
        assert found.experts_per_token == budget
        assert found.losses is None
        moefold.revert(model)


def test_lengths_are_counted_each_by_itself():
    found = passed(build("olmoe"), ids(10, 4), batch_size=2)
    assert found.flops_per_token == (10 * by_hand(10, 2) + 4 * by_hand(4, 2)) / 14


def test_progress_is_in_tokens_and_modes_come_back():
    model, done = build("olmoe").train(), []
    passed(model, ids(5, 5, 3), batch_size=2, advance=done.append)
    assert done == [10, 3]
    assert model.training


def test_refusals():
    with pytest.raises(ValueError, match=r"2 texts hold no two tokens; give text of the kind"):
        pieces_of(["", " \n"], tokenizer(), length=8)
    with pytest.raises(ValueError, match=r"length is 1; a piece needs at least 2 tokens"):
        pieces_of(["a a"], _Words(), length=1)
