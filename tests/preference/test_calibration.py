"""Temperatures and reliability, against draws whose probabilities are known."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from moefold.preference import fit_temperature, reliability


def drawn(count: int, overconfident: float) -> torch.Tensor:
    """Log-odds told `overconfident` times too large, of pairs drawn by the true ones."""
    draw = np.random.default_rng(0)
    true = draw.normal(size=count) * 2
    won = draw.random(count) < 1 / (1 + np.exp(-true))
    return torch.from_numpy(np.where(won, true, -true) * overconfident)


def test_the_temperature_undoes_overconfidence():
    assert fit_temperature(drawn(20000, 3.0)) == pytest.approx(3.0, rel=0.05)


def test_the_temperature_is_where_the_likelihood_is_greatest():
    z, w = drawn(300, 1.7), torch.linspace(0.1, 2.0, 300, dtype=torch.float64)

    def loss(log_t: float) -> float:
        return float((w * torch.nn.functional.softplus(-z / np.exp(log_t))).sum())

    options = {"xatol": 1e-9}
    least: Any = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options=options)
    wanted = float(np.exp(least.x))
    # A minimum found by values is known to the root of their rounding.
    assert fit_temperature(z, w) == pytest.approx(wanted, rel=1e-6)


def test_pairs_without_weight_say_nothing():
    z = drawn(300, 2.0)
    weight = torch.ones(400)
    weight[300:] = 0
    found = fit_temperature(torch.cat([z, torch.full((100,), torch.inf)]), weight)
    assert found == pytest.approx(fit_temperature(z), rel=1e-9)
    with pytest.raises(ValueError, match="there are no pairs to calibrate by"):
        fit_temperature(z, torch.zeros(300))


def test_what_cannot_be_calibrated():
    with pytest.raises(ValueError, match="there are no pairs to calibrate by"):
        fit_temperature(torch.zeros(0))
    with pytest.raises(ValueError, match="all 2 pairs are in the right order"):
        fit_temperature(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="all 2 pairs are in the wrong order"):
        fit_temperature(torch.tensor([-1.0, -2.0]))


def test_probabilities_that_are_frequencies_are_reliable():
    z = drawn(20000, 3.0)
    sound, loud = reliability(z, temperature=3.0), reliability(z)
    assert sound.error < 0.01 < 0.1 < loud.error
    assert sound.log_loss < loud.log_loss
    assert int(sound.count.sum()) == 20000


def test_bins_hold_what_they_say():
    # Told 0.6 twice (once right) and 0.9 (right), which are in the second and the last of ten bins.
    told = torch.tensor([0.6, 0.6, 0.9], dtype=torch.float64)
    found = reliability(told.logit() * torch.tensor([1.0, -1.0, 1.0]), bins=4)
    assert found.probability.tolist() == pytest.approx([0.6, 0.9])
    assert found.frequency.tolist() == [0.5, 1.0]
    assert found.count.tolist() == [2, 1]
    assert found.error == pytest.approx((2 * 0.1 + 0.1) / 3)
    assert found.log_loss == pytest.approx(-float(torch.tensor([0.6, 0.4, 0.9]).log().mean()))
    with pytest.raises(
        ValueError, match=r"0 pairs, 10 bins, temperature 1.0: each must be positive"
    ):
        reliability(torch.zeros(0))
