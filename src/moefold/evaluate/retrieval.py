"""Retrieval, query by query: nDCG, MRR and recall over a ranked list of documents.

`sentence_transformers.evaluation.InformationRetrievalEvaluator` computes the same measures, and the
tests hold this module to it, but it returns only their means. A paired interval needs the value of
every query, so they are computed here.

Shapes: `queries` and `documents` are counts of texts, `dim` is the width of their vectors, `cutoff`
is how many documents are kept per query.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

METRICS = ("ndcg@10", "mrr@10", "recall@1", "recall@10")
_BATCHES_PER_CALL = 4


def encode(
    encoder: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    advance: Callable[[int], None] | None = None,
) -> Float[Tensor, "texts dim"]:
    """Encode texts in batches of similar length, so that little of a batch is padding.

    Args:
        encoder: a `SentenceTransformer`, or anything with its `encode`.
        texts: what to encode; at least one.
        batch_size: texts per batch.
        advance: called with the number of texts done since its last call, for a progress bar.

    Returns:
        One vector per text, in the order of `texts`, float32, on the CPU.

    Raises:
        ValueError: if there are no texts or `batch_size` is not positive.
    """
    if not texts:
        raise ValueError("there are 0 texts to encode; give at least 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    pieces = []
    step = batch_size * _BATCHES_PER_CALL
    for start in range(0, len(order), step):
        chunk = [texts[i] for i in order[start : start + step]]
        vectors = encoder.encode(
            chunk, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        pieces.append(vectors.float().cpu())
        if advance is not None:
            advance(len(chunk))
    vectors = torch.cat(pieces)
    out = torch.empty_like(vectors)
    out[torch.tensor(order)] = vectors
    return out


def rank(
    queries: Float[Tensor, "queries dim"],
    documents: Float[Tensor, "documents dim"],
    *,
    cutoff: int = 10,
) -> Int[Tensor, "queries cutoff"]:
    """The nearest documents of every query by cosine, best first.

    Of documents at the same cosine the one with the lowest index comes first. Fewer columns than
    `cutoff` come back where there are fewer documents.

    Raises:
        ValueError: if a vector is not finite; a ranking of such vectors would mean nothing.
    """
    for name, vectors in (("query", queries), ("document", documents)):
        bad = (~torch.isfinite(vectors).all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"the vectors of {len(bad)} of {len(vectors)} {name} texts are not finite (the "
                f"first is number {bad[0]}); the encoder has diverged, lower its learning rate"
            )
    queries = torch.nn.functional.normalize(queries, dim=1)
    documents = torch.nn.functional.normalize(documents, dim=1)
    rows = [
        (part @ documents.T).argsort(dim=1, descending=True, stable=True)[:, :cutoff]
        for part in queries.split(256)
    ]
    return torch.cat(rows)


def retrieval_metrics(
    ranking: Int[Tensor, "queries cutoff"],
    relevant: Sequence[Collection[int]],
) -> dict[str, Float[np.ndarray, " queries"]]:
    """Score a ranking of at least 10 columns (or of all documents, where there are fewer).

    With binary relevance and R relevant documents: nDCG@10 is the sum of 1/log2(1 + place) over
    relevant documents in the first ten places, divided by the best possible sum, which has
    min(R, 10) terms; MRR@10 is 1/place of the first relevant one (0 if it is not among ten);
    recall@k is the share of the R found among the first k (Järvelin and Kekäläinen, 2002).

    Args:
        ranking: document indices per query, best first.
        relevant: for each query the indices of its relevant documents; never empty.

    Returns:
        For each name in `METRICS` one value per query, in [0, 1].

    Raises:
        ValueError: if the two disagree in length, or a query has no relevant document.
    """
    if len(relevant) != len(ranking):
        raise ValueError(
            f"{len(ranking)} queries are ranked but {len(relevant)} have relevant documents "
            "listed; give one collection per query"
        )
    values = {name: np.zeros(len(relevant)) for name in METRICS}
    discounts = 1.0 / np.log2(np.arange(2, 12))
    for query, (row, wanted) in enumerate(zip(ranking.tolist(), relevant, strict=True)):
        if not wanted:
            raise ValueError(f"query number {query} has no relevant document; leave it out")
        wanted = set(wanted)
        hits = np.array([document in wanted for document in row[:10]], dtype=float)
        best = discounts[: min(len(wanted), 10)].sum()
        values["ndcg@10"][query] = (hits * discounts[: len(hits)]).sum() / best
        places = hits.nonzero()[0]
        values["mrr@10"][query] = 1.0 / (places[0] + 1) if len(places) else 0.0
        values["recall@1"][query] = hits[:1].sum() / len(wanted)
        values["recall@10"][query] = hits.sum() / len(wanted)
    return values
