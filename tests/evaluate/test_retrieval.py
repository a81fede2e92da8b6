"""Retrieval measures: by hand, and against the evaluator of sentence-transformers."""

import math

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from moefold.evaluate import METRICS, encode, rank, retrieval_metrics


def test_by_hand():
    # ranking of 12 documents per query, relevant ones in brackets:
    #   query 0:  4 [7] 1 ...      place 2
    #   query 1:  [0] 3 [5] ...    places 1 and 3, and document 11, which is only at place 11
    #   query 2:  no hit among the first ten
    others = [20 + i for i in range(12)]
    ranking = torch.tensor(
        [
            [4, 7, 1, *others[:9]],
            [0, 3, 5, *others[:7], 11, 2],
            [1, 2, 3, *others[:9]],
        ]
    )
    found = retrieval_metrics(ranking, [{7}, {0, 5, 11}, {99}])
    best = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    expected = {
        "ndcg@10": [1 / math.log2(3), (1 + 1 / math.log2(4)) / best, 0],
        "mrr@10": [1 / 2, 1, 0],
        "recall@1": [0, 1 / 3, 0],
        "recall@10": [1, 2 / 3, 0],
    }
    assert set(found) == set(METRICS)
    for name, values in expected.items():
        # The same few float64 operations, in another order at most.
        np.testing.assert_allclose(found[name], values, rtol=1e-15)


@pytest.mark.parametrize("documents", [3, 10, 11, 40])
@pytest.mark.parametrize("seed", range(15))
def test_agrees_with_sentence_transformers(documents: int, seed: int):
    draw = np.random.default_rng(seed)
    queries = 6
    relevant = [
        set(draw.choice(documents, size=draw.integers(1, min(documents, 14) + 1), replace=False))
        for _ in range(queries)
    ]
    scores = draw.random((queries, documents))
    ranking = torch.from_numpy((-scores).argsort(1)[:, :10])
    found = retrieval_metrics(ranking, [{int(d) for d in some} for some in relevant])
    evaluator = InformationRetrievalEvaluator(
        queries={str(q): "q" for q in range(queries)},
        corpus={str(d): "d" for d in range(documents)},
        relevant_docs={str(q): {str(d) for d in relevant[q]} for q in range(queries)},
        mrr_at_k=[10],
        ndcg_at_k=[10],
        precision_recall_at_k=[1, 10],
        accuracy_at_k=[1],
        map_at_k=[10],
    )
    theirs = evaluator.compute_metrics(
        [
            [{"corpus_id": str(d), "score": float(scores[q, d])} for d in range(documents)]
            for q in range(queries)
        ]
    )
    expected = {
        "ndcg@10": theirs["ndcg@k"][10],
        "mrr@10": theirs["mrr@k"][10],
        "recall@1": theirs["recall@k"][1],
        "recall@10": theirs["recall@k"][10],
    }
    for name, value in expected.items():
        # Sums of at most ten float64 numbers of size one, in another order.
        assert found[name].mean() == pytest.approx(value, abs=1e-14)


def test_rank_is_by_cosine_and_prefers_the_first_of_equals():
    # Documents 1 and 2 point the same way, 2 is longer; 0 is across, 3 opposite.
    documents = torch.tensor([[0.0, 1.0], [1.0, 0.0], [5.0, 0.0], [-1.0, 0.0]])
    assert rank(torch.tensor([[3.0, 0.0]]), documents).tolist() == [[1, 2, 0, 3]]
    assert rank(torch.tensor([[3.0, 0.0]]), documents, cutoff=2).tolist() == [[1, 2]]
    # Enough equals for a sort that is not stable to show.
    alike = torch.ones(5000, 2)
    assert rank(torch.ones(1, 2), alike, cutoff=2000).tolist() == [list(range(2000))]


def test_rank_keeps_a_long_list_of_queries_in_order():
    documents = torch.eye(7)
    which = torch.randint(7, (600,))
    assert torch.equal(rank(documents[which], documents, cutoff=1)[:, 0], which)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rank_refuses_vectors_that_are_not_finite(bad: float):
    good, broken = torch.ones(3, 2), torch.ones(3, 2)
    broken[1, 0] = bad
    with pytest.raises(ValueError, match=r"1 of 3 query texts .* number 1\).*learning rate"):
        rank(broken, good)
    with pytest.raises(ValueError, match="1 of 3 document texts"):
        rank(good, broken)


class Encoder:
    """Encodes a text as its length, and remembers the batches it was given."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode(self, texts: list[str], **_: object) -> torch.Tensor:
        self.calls.append(texts)
        return torch.tensor([[float(len(text)), 1.0] for text in texts])


def test_encode_sorts_by_length_and_gives_the_order_back():
    texts = ["x" * int(n) for n in torch.randperm(50)]
    encoder, done = Encoder(), []
    vectors = encode(encoder, texts, batch_size=2, advance=done.append)
    assert vectors[:, 0].tolist() == [float(len(text)) for text in texts]
    seen = [len(text) for call in encoder.calls for text in call]
    assert seen == sorted(seen, reverse=True)
    assert sum(done) == 50
    assert len(done) > 1


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="0 texts to encode"):
        encode(Encoder(), [])
    with pytest.raises(ValueError, match="batch_size is 0"):
        encode(Encoder(), ["a"], batch_size=0)
    ranking = torch.zeros(2, 10, dtype=torch.long)
    with pytest.raises(ValueError, match="2 queries are ranked but 1 have"):
        retrieval_metrics(ranking, [{1}])
    with pytest.raises(ValueError, match="query number 1 has no relevant document"):
        retrieval_metrics(ranking, [{1}, set()])
