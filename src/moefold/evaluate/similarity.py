"""Two ways to judge embeddings by cosines: against scores of people, and against other embeddings.

    pair_quality    Spearman's correlation of the cosine of two texts with their score
    agreement       Spearman's correlation of the cosines of all pairs of texts under two models

Both times 100, as is usual for the first. Intervals draw pairs, or texts, again.

Shapes: `texts dim`, `pairs dim`.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from moefold.evaluate.intervals import Interval, bootstrap

Cosines = Float[np.ndarray, " pairs"]


def cosines(one: Float[np.ndarray, "pairs dim"], other: Float[np.ndarray, "pairs dim"]) -> Cosines:
    """Of the rows of one with the rows of the other; 0 for a vector without length."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    products = (one * other).sum(1)
    return np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)


def pair_quality(
    found: Cosines, scores: Float[np.ndarray, " pairs"], *, resamples: int = 1000
) -> Interval:
    """How well cosines order pairs of texts, x100."""
    return bootstrap(lambda i: spearman(found[i], scores[i]), len(scores), resamples=resamples)


def pair_change(
    found: Cosines,
    before: Cosines,
    scores: Float[np.ndarray, " pairs"],
    *,
    resamples: int = 1000,
) -> Interval:
    """The same less that of other cosines, the same pairs drawn for both."""

    def of(i: Int[np.ndarray, " items"]) -> float:
        return spearman(found[i], scores[i]) - spearman(before[i], scores[i])

    return bootstrap(of, len(scores), resamples=resamples)


def agreement(
    one: Float[np.ndarray, "texts dim"],
    other: Float[np.ndarray, "texts other_dim"],
    *,
    resamples: int = 200,
) -> Interval:
    """Whether two models find the same texts alike, x100; needs no labels.

    Texts are drawn again, not pairs, which are not independent; a text drawn twice makes no pair
    with itself.

    Raises:
        ValueError: fewer than three texts, whose pairs have no order to agree on.
    """
    if len(one) < 3 or len(one) != len(other):
        raise ValueError(
            f"{len(one)} and {len(other)} texts; give the same to both models, at least 3"
        )
    mine, theirs = _all_cosines(one), _all_cosines(other)

    def of(i: Int[np.ndarray, " items"]) -> float:
        rows, columns = np.triu_indices(len(i), 1)
        a, b = i[rows], i[columns]
        a, b = a[a != b], b[a != b]
        return spearman(mine[a, b], theirs[a, b])

    return bootstrap(of, len(one), resamples=resamples)


def spearman(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    """Spearman's rank correlation x100; ties have their mean rank. 0 where one does not vary."""
    if len(one) < 2:  # a draw of one text over and over
        return 0.0
    ranks = np.stack([rankdata(one), rankdata(other)])
    ranks -= ranks.mean(1, keepdims=True)
    scale = np.sqrt((ranks**2).sum(1).prod())
    return float(100 * (ranks[0] * ranks[1]).sum() / scale) if scale > 0 else 0.0


def _all_cosines(
    vectors: Float[np.ndarray, "texts dim"],
) -> Float[np.ndarray, "texts texts_again"]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return unit @ unit.T


__all__ = ["agreement", "cosines", "pair_change", "pair_quality", "spearman"]
