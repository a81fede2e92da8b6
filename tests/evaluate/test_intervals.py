"""The crossed bootstrap: against scipy where scipy can, and against its known variance."""

import math

import numpy as np
import pytest
from scipy import stats

from moefold.evaluate import Interval, bootstrap, crossed_bootstrap


def test_one_seed_is_the_ordinary_bootstrap_over_queries():
    values = np.random.default_rng(3).random((1, 80))
    ours = crossed_bootstrap(values, resamples=20_000)
    theirs = stats.bootstrap(
        (values[0],), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    # An end is a quantile of 20,000 draws. Its standard error is sqrt(p (1 - p) / n) / density with
    # p = 0.025 and, for a normal distribution, density 0.0584 / sd: 0.019 sd. Two ends from
    # different draws differ by sqrt(2) of that; four of those pass all but 1 in 16,000.
    sd = values.std() / math.sqrt(80)
    tolerance = 4 * math.sqrt(2) * 0.019 * sd
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.high, abs=tolerance)


@pytest.mark.parametrize("shape", [(2, 30), (5, 30), (12, 7)])
def test_the_width_is_that_of_seeds_and_queries_together(shape: tuple[int, int]):
    # Additive effects: value = effect of the seed + effect of the query. Then a resampled mean is a
    # resampled mean of each, independent, and its variance is the sum of var(effect) / n of both.
    draw = np.random.default_rng(0)
    of_seed, of_query = draw.normal(size=shape[0]), 2 * draw.normal(size=shape[1])
    values = of_seed[:, None] + of_query[None, :]
    sd = math.sqrt(of_seed.var() / shape[0] + of_query.var() / shape[1])
    # One sigma on both sides holds 0.6827 of a normal distribution. With two seeds their part is
    # far from normal, but small beside the queries'.
    found = crossed_bootstrap(values, level=0.6827, resamples=20_000)
    assert (found.high - found.low) / 2 == pytest.approx(sd, rel=0.06)


def test_a_difference_is_paired():
    # The queries differ wildly, the two models hardly: paired, the difference is plain.
    hard = np.random.default_rng(1).random((3, 100))
    better = hard + 0.01
    found = crossed_bootstrap(better - hard)
    assert found.low == pytest.approx(0.01)
    assert found.high == pytest.approx(0.01)
    assert found.excludes_zero
    alone = crossed_bootstrap(hard)
    assert alone.high - alone.low > 0.02


def test_the_same_arguments_give_the_same_interval():
    values = np.random.default_rng(1).random((3, 50))
    assert crossed_bootstrap(values) == crossed_bootstrap(values)
    assert crossed_bootstrap(values) != crossed_bootstrap(values, seed=1)
    assert crossed_bootstrap(values, level=0.5).low > crossed_bootstrap(values).low


@pytest.mark.parametrize(
    ("low", "high", "excludes"),
    [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 1.0, False)],
)
def test_zero_is_excluded_only_from_outside(low: float, high: float, excludes: bool):
    assert Interval(mean=0.0, low=low, high=high).excludes_zero == excludes


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="0 seeds and 5 queries"):
        crossed_bootstrap(np.zeros((0, 5)))
    with pytest.raises(ValueError, match="not finite"):
        crossed_bootstrap(np.full((1, 5), math.nan))
    with pytest.raises(ValueError, match=r"level is 95\.0; .* as in 0\.95"):
        crossed_bootstrap(np.zeros((1, 5)), level=95.0)
    with pytest.raises(ValueError, match="resamples is 10"):
        crossed_bootstrap(np.zeros((1, 5)), resamples=10)
    with pytest.raises(ValueError, match=r"not from 1\.0 to 0\.0"):
        Interval(mean=0.0, low=1.0, high=0.0)


def test_any_statistic_of_one_sample():
    values = np.random.default_rng(3).random(80)
    found = bootstrap(lambda which: float(np.median(values[which])), 80, resamples=5000)
    theirs = stats.bootstrap(
        (values,), np.median, n_resamples=5000, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    assert found.mean == np.median(values)
    # A median of 80 lies between its neighbours; ends of two sets of draws differ by a step or two
    # of the sorted sample, which are 1/80 apart.
    assert found.low == pytest.approx(theirs.low, abs=2.5 / 80)
    assert found.high == pytest.approx(theirs.high, abs=2.5 / 80)
    mean = bootstrap(lambda which: float(values[which].mean()), 80, resamples=10_000)
    crossed = crossed_bootstrap(values[None])
    # As derived above: 4 sqrt(2) standard errors of an end, here of 10,000 draws.
    tolerance = 4 * math.sqrt(2) * 0.019 * math.sqrt(2) * values.std() / math.sqrt(80)
    assert mean.low == pytest.approx(crossed.low, abs=tolerance)
    assert mean.high == pytest.approx(crossed.high, abs=tolerance)


def test_a_sample_that_cannot_be_drawn_from():
    with pytest.raises(ValueError, match=r"there are 0 items to draw from; an interval needs at"):
        bootstrap(float, 0)
    with pytest.raises(ValueError, match=r"level is 1; it must lie between 0 and 1"):
        bootstrap(float, 3, level=1)
    with pytest.raises(ValueError, match=r"resamples is 10; take at least 100"):
        bootstrap(float, 3, resamples=10)
