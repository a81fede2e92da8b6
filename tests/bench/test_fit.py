"""Fitted exponents: exact on power laws, and numpy's on others."""

import numpy as np
import pytest
from scipy import stats

from moefold.bench.fit import _STUDENT, fit_power


@pytest.mark.parametrize("exponent", [0.0, 1.0, -0.5, 2.0])
def test_a_power_law_is_found(exponent):
    x = [1, 2, 8, 64]
    law = fit_power(x, [3.0 * one**exponent for one in x])
    # Some tens of roundings of numbers of order 1.
    assert law.exponent == pytest.approx(exponent, abs=1e-14)
    assert law.factor == pytest.approx(3.0)
    assert law.low == pytest.approx(exponent, abs=1e-6)  # a square root of rounding
    assert law.at(16) == pytest.approx(3.0 * 16**exponent)


def test_the_interval_is_students():
    rng = np.random.default_rng(0)
    x = 2.0 ** np.arange(7)
    cost = 0.3 * x**0.8 * np.exp(0.1 * rng.standard_normal(7))
    law = fit_power(list(x), list(cost))
    slope, _, _, _, deviation = stats.linregress(np.log(x), np.log(cost))
    assert law.exponent == pytest.approx(slope)
    half = stats.t.ppf(0.975, 5) * deviation
    # The table has four figures.
    assert law.high == pytest.approx(slope + half, rel=1e-3)
    assert law.low == pytest.approx(slope - half, rel=1e-3)


def test_the_table_of_students_quantiles():
    for over, quantile in enumerate(_STUDENT, start=1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, over), abs=6e-4)  # three decimals


def test_two_points_leave_no_interval():
    law = fit_power([1, 4], [1.0, 2.0])
    assert law.exponent == pytest.approx(0.5)
    assert law.low is law.high is None


@pytest.mark.parametrize(
    ("x", "cost", "match"),
    [
        ([3, 3], [1.0, 2.0], "two different x or more and a cost of each, not 1 and 2"),
        ([1, 2, 3], [1.0, 2.0], "not 3 and 2"),
        ([1, 2], [1.0, 0.0], r"a power law has no value 0\.0; leave it out"),
    ],
)
def test_what_has_no_exponent_is_refused(x, cost, match):
    with pytest.raises(ValueError, match=match):
        fit_power(x, cost)
