"""Pooling by hand, statistics by numpy, and the similarity that a sum stands for."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from moefold.embedding.pool import joined, pooled, standardized

# Two texts of 3 and 2 tokens of width 1, padded; what stands under padding is no number.
#   left    1 2 6        right   1 2 6
#           . 4 7                4 7 .
NAN = float("nan")
VALUES = {"left": [[1.0, 2.0, 6.0], [NAN, 4.0, 7.0]], "right": [[1.0, 2.0, 6.0], [4.0, 7.0, NAN]]}
EXPECTED = {
    "last": [6.0, 7.0],
    "mean": [3.0, 5.5],
    "weighted-mean": [(1 + 2 * 2 + 3 * 6) / 6, (4 + 2 * 7) / 3],
}


@pytest.mark.parametrize("side", VALUES)
@pytest.mark.parametrize("pooling", EXPECTED)
def test_by_hand(side, pooling):
    values = torch.tensor(VALUES[side], dtype=torch.float64).unsqueeze(2)
    mask = ~values.squeeze(2).isnan()
    made = pooled(values, mask, pooling)
    # Sums of three numbers in float64.
    assert made.squeeze(1).tolist() == pytest.approx(EXPECTED[pooling], abs=1e-14)


def test_a_batch_has_mean_zero_and_deviation_one():
    x = torch.randn(5, 3, dtype=torch.float64)
    x[:, 1] = 2.0  # says nothing: 0 / (0 + 1e-8)
    made = standardized(x).numpy()
    deviation = np.std(x.numpy(), axis=0, ddof=1)
    assert np.allclose(made, (x.numpy() - x.numpy().mean(0)) / (deviation + 1e-8), atol=1e-12)
    assert (made[:, 1] == 0).all()


def test_a_batch_of_one_has_no_deviation():
    assert standardized(torch.randn(1, 3)).tolist() == [[0.0, 0.0, 0.0]]
    x = torch.randn(1, 3, dtype=torch.float64)
    mean, std = torch.ones(3).double(), torch.full((3,), 2.0).double()
    assert torch.allclose(standardized(x, mean, std), (x - 1) / (2 + 1e-8), atol=1e-15)


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_the_dot_product_of_sums_is_the_published_similarity(weight):
    hidden, routing = torch.randn(4, 6).double(), torch.randn(4, 5).double()
    made = joined(hidden, routing, "sum", weight)
    for i in range(4):
        for j in range(4):
            cosines = (cosine_similarity(t[i], t[j], dim=0) for t in (hidden, routing))
            of_hidden, of_routing = cosines
            # Published: cos of hidden states + weight * cos of routing weights. Sums of 11 terms.
            assert abs(made[i] @ made[j] - (of_hidden + weight * of_routing)) < 1e-14
    # All have one length, so that a cosine orders pairs as the published similarity does.
    assert torch.allclose(made.norm(dim=1), torch.tensor((1 + weight) ** 0.5).double(), atol=1e-12)


def test_concatenation_keeps_both():
    hidden, routing = torch.randn(2, 3), torch.randn(2, 4)
    assert torch.equal(joined(hidden, routing, "concat", 1.0), torch.cat((hidden, routing), 1))
    assert joined(hidden, None, "hidden", 1.0).equal(hidden)
    assert joined(None, routing, "routing", 1.0).equal(routing)
