"""Spearman's correlation of cosines, against scipy, and its intervals."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from moefold.evaluate.similarity import agreement, cosines, pair_change, pair_quality, spearman


def test_cosines():
    one, other = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), np.array([[4.0, 3.0]] * 3)
    assert cosines(one, other) == pytest.approx([24 / 25, 4 / 5, 0.0])


def test_spearman_is_scipys_with_ties_too():
    draw = np.random.default_rng(0)
    one, other = draw.integers(0, 5, 60).astype(float), draw.random(60)
    assert spearman(one, other) == pytest.approx(100 * np.asarray(spearmanr(one, other))[0])
    assert spearman(one, 7 - 2 * one) == pytest.approx(-100)
    assert spearman(np.zeros(5), other[:5]) == 0


def test_quality_of_pairs_and_its_change():
    draw = np.random.default_rng(1)
    scores = draw.random(200)
    good, bad = scores + 0.3 * draw.random(200), scores + 1.5 * draw.random(200)
    found = pair_quality(good, scores)
    assert found.mean == pytest.approx(100 * np.asarray(spearmanr(good, scores))[0])
    assert found.low < found.mean < found.high
    worse = pair_change(bad, good, scores)
    assert worse.mean == pytest.approx(spearman(bad, scores) - found.mean)
    assert worse.high < 0
    same = pair_change(good, good, scores)
    assert (same.low, same.high) == (0, 0)


def test_agreement_sees_angles_only():
    draw = np.random.default_rng(2)
    vectors = draw.normal(size=(30, 8))
    turn, _ = np.linalg.qr(draw.normal(size=(8, 8)))
    same = agreement(vectors, 3 * vectors @ turn)
    assert (same.low, same.mean, same.high) == pytest.approx((100, 100, 100), abs=1e-2)
    other = agreement(vectors, draw.normal(size=(30, 5)))
    assert other.low < 0 < other.high
    near = agreement(vectors, vectors + 0.3 * draw.normal(size=vectors.shape))
    assert other.high < near.low < near.mean < 100


def test_agreement_is_over_pairs_of_different_texts():
    # Three texts, three cosines: the order of both is the same but for one swap. Ranks 1 2 3 and
    # 1 3 2: 1 - 6 * 2 / (3 * 8) = 0.5.
    one = np.array([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5]])  # 01 closest, then 12, then 02
    other = np.array([[1.0, 0.0], [0.5, 0.5], [0.4, 0.6]])  # 12 closest, then 01, then 02
    assert agreement(one, other).mean == pytest.approx(50)


def test_too_few_texts():
    with pytest.raises(ValueError, match=r"2 and 2 texts; give the same to both .* at least 3"):
        agreement(np.ones((2, 3)), np.ones((2, 3)))
