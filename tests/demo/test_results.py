"""From runs to sentences: the right pairing, the right sign, and no win that is not one."""

from typing import Any

import numpy as np
import pytest

from moefold.demo.results import difference, lines, signed, summarise, verdicts
from moefold.evaluate import METRICS

QUERIES = 50


def run(seed: int, results: dict[str, Any]) -> dict[str, Any]:
    """A run in which every measure of a model has the same values."""
    return {
        "seed": seed,
        "results": {
            name: {
                "values": {metric: list(values) for metric in METRICS},
                "examples": 64,
                "seconds": 2.0,
                "flops": 3e12,
            }
            for name, values in results.items()
        },
    }


def runs(moe: float, continued: float, noise: float = 0.0) -> list[dict[str, Any]]:
    """Three seeds; every model is the untouched encoder plus a constant."""
    base = np.random.default_rng(0).random(QUERIES) / 2
    out = [run(0, {"untouched": base})]
    draw = np.random.default_rng(1)
    for seed in range(3):
        jitter = noise * draw.normal(size=QUERIES)
        out.append(run(seed, {"moe": base + moe + jitter}))
        out.append(run(seed, {"dense": base + 0.1, "dense-continued": base + continued}))
    return out


def test_differences_are_paired_by_seed_and_query():
    found = runs(moe=0.15, continued=0.18)
    interval = difference(found, "moe", "dense", "mrr@10")
    # Every pair differs by the same, whatever is drawn; 1e-12: sums of float64 of size one.
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.05,) * 3, abs=1e-12)
    # The untouched encoder has one row, compared with each seed.
    interval = difference(found, "moe", "untouched", "ndcg@10")
    assert (interval.low, interval.high) == pytest.approx((0.15, 0.15), abs=1e-12)


def test_whatever_wins_is_what_is_said():
    equal_examples, equal_compute = verdicts(summarise(runs(moe=0.15, continued=0.18)))
    assert equal_examples.startswith("At equal examples the MoE wins by 0.0500 nDCG@10")
    assert equal_compute.startswith(
        "At equal training compute the dense twin wins by 0.0300 nDCG@10 (95% interval -0.0300"
    )


def test_what_cannot_be_told_apart_is_not_called_a_win():
    first, _ = verdicts(summarise(runs(moe=0.101, continued=0.1, noise=0.2)))
    assert first.startswith("At equal examples the two are not separable: MoE - dense = ")
    low, high = first.split("interval ")[1].rstrip(").").split(" to ")
    assert float(low) < 0 < float(high)


def test_the_table_has_a_row_per_model_and_its_numbers():
    summary = summarise(runs(moe=0.15, continued=0.18))
    table = lines(summary)
    assert [line.split("  ")[0] for line in table[1:]] == [
        "untouched encoder",
        "dense twin",
        "dense twin, continued",
        "MoE",
    ]
    mean = summary["models"]["moe"]["ndcg@10"]["mean"]
    assert f"{mean:.4f}" in table[4]
    assert " 3.0 " in table[4]  # TFLOP
    assert len({len(line) for line in table}) == 1


@pytest.mark.parametrize(
    ("value", "text"), [(-0.00001, "+0.0000"), (0.1, "+0.1000"), (-0.1, "-0.1000")]
)
def test_signed(value: float, text: str):
    assert signed(value) == text
