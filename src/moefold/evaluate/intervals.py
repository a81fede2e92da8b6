"""Intervals for a mean over seeds and queries, by resampling both.

Every seed is evaluated on the same queries, so the values form a table, seeds by queries. A result
should hold for other seeds *and* other queries, so both are drawn again, independently: a seed
drawn twice brings its whole row twice, a query its whole column. This is the crossed bootstrap of
Owen, *The pigeonhole bootstrap*, Annals of Applied Statistics 1 (2007), which does not understate
the variance of a mean over many rows and columns.

`scipy.stats.bootstrap` draws along one axis only; with one seed the two agree, which a test checks.

Shapes: `seeds` by `queries`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean with the range it plausibly lies in.

    Attributes:
        mean: over all seeds and queries.
        low: lower end.
        high: upper end.
        level: share of resampled means between the two ends.
    """

    mean: float
    low: float
    high: float
    level: float = 0.95

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(
                f"an interval runs from low to high, not from {self.low} to {self.high}"
            )

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside, so that a difference with this interval has a sign."""
        return self.low > 0 or self.high < 0


def crossed_bootstrap(
    values: Float[np.ndarray, "seeds queries"],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The percentile interval of the mean, seeds and queries drawn again.

    For the difference of two models evaluated on the same queries, pass the table of differences:
    the pairing is then kept by construction. With one seed only the queries are drawn, and the
    interval says nothing about other seeds. With very few seeds the spread between them is
    understated (by (n - 1) / n of its variance for n seeds).

    Args:
        values: one number per seed and query.
        level: share of resampled means inside, between 0 and 1.
        resamples: how many times to draw.
        seed: of the draws; the same arguments give the same interval.

    Raises:
        ValueError: if the table is empty or not finite, or `level` or `resamples` out of range.
    """
    seeds, queries = values.shape
    if seeds == 0 or queries == 0:
        raise ValueError(
            f"the table has {seeds} seeds and {queries} queries; both must be positive"
        )
    if not np.isfinite(values).all():
        raise ValueError("the table holds values that are not finite; an interval needs numbers")
    _check(level, resamples)
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    # In pieces, because the counts of all draws together may take gigabytes.
    for start in range(0, resamples, 1000):
        size = min(1000, resamples - start)
        of_query, of_seed = (_times_drawn(draw, size, n) for n in (queries, seeds))
        totals = ((of_query @ values.T) * of_seed).sum(1)
        means[start : start + size] = totals / (seeds * queries)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high), level=level)


def bootstrap(
    statistic: Callable[[Int[np.ndarray, " items"]], float],
    items: int,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The percentile interval of any statistic of one sample, for those that are no mean.

    For what two models make of the same items, let the statistic compare them: the same items are
    then drawn for both.

    Args:
        statistic: of the items at these places, each as often as it is drawn.
        items: how many there are.
        level: share of resampled values inside, between 0 and 1.
        resamples: how many times to draw.
        seed: of the draws; the same arguments give the same interval.

    Returns:
        The interval; its mean is the statistic of all items, each of them once.

    Raises:
        ValueError: there are no items, or `level` or `resamples` is out of range.
    """
    if items < 1:
        raise ValueError("there are 0 items to draw from; an interval needs at least 1")
    _check(level, resamples)
    draw = np.random.default_rng(seed)
    values = [statistic(draw.integers(0, items, items)) for _ in range(resamples)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    whole = statistic(np.arange(items))
    return Interval(mean=float(whole), low=float(low), high=float(high), level=level)


def _check(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1, as in 0.95")
    if resamples < 100:
        raise ValueError(f"resamples is {resamples}; take at least 100")


def _times_drawn(
    draw: np.random.Generator, size: int, count: int
) -> Float[np.ndarray, "draws items"]:
    """How often each of `count` things comes up when `count` are drawn with replacement."""
    which = draw.integers(0, count, size=(size, count)) + count * np.arange(size)[:, None]
    return np.bincount(which.ravel(), minlength=size * count).reshape(size, count).astype(float)
