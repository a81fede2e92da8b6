"""What a report says is what the diagnostics say, worked by hand where it can be."""

import json
import math

import pytest
import torch
from torch import nn

from moefold.preference import (
    AntisymmetricComparator,
    ConsistentComparator,
    Groups,
    NetConfig,
    PreferenceConfig,
    PreferenceModel,
    Report,
    calibrate,
    measure,
)
from tests.preference.common import random_groups


class Itself(nn.Module):
    """A score that is the first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x[:, 0]


def by_hand() -> Groups:
    # right, wrong, a tie of the right one and another, wrong
    scores = [[2.0, 0.0], [0.0, 1.0, 3.0], [1.0, 1.0], [0.0, 4.0]]
    return Groups.of(
        [torch.tensor(one).unsqueeze(1) for one in scores],
        chosen=[0, 1, 0, 0],
        utilities=[[1, 0], [0, 2, 1.5], [3, 1], [1, 0.5]],
        split=["m1", "m1", "m2", "m2"],
        category=["race", "race", "race", "contact"],
    )


def test_a_report_worked_by_hand():
    model = PreferenceModel(ConsistentComparator(Itself()))
    report = measure(model, by_hand())
    assert (report.groups, report.candidates) == (4, 9)
    assert report.agreement == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert report.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    # 0, 2 - 1.5, the mean of 0 and 2, 1 - 0.5
    assert report.regret == pytest.approx((0 + 0.5 + 1 + 0.5) / 4)
    # Deviations from 0.375: m1 0.625 - 0.375, m2 0.125 - 0.375; two matches, not four decisions.
    assert report.standard_error == pytest.approx(math.sqrt(2 * (0.25**2 + 0.25**2)) / 4)
    assert report.categories is not None
    assert report.categories["race"] == pytest.approx(
        {"mean": 0.5, "standard_error": 0.5 / math.sqrt(3), "groups": 3}
    )
    assert report.categories["contact"]["mean"] == 0
    pairs = [2.0, 1.0, -2.0, 0.0, -4.0]
    weights = [1, 0.5, 0.5, 1, 1]
    each = [w * math.log1p(math.exp(-z)) for z, w in zip(pairs, weights, strict=True)]
    assert report.loss == pytest.approx(sum(each) / 4)
    assert report.reliability is not None
    assert int(report.reliability.count.sum()) == 5
    assert report.unseen is None


def test_what_was_seen_is_told_apart():
    groups = by_hand()
    model = PreferenceModel(ConsistentComparator(Itself()))
    report = measure(model, groups, known=groups.take([0, 3]))
    assert report.unseen is not None
    assert report.unseen["groups"] == 2
    assert report.unseen["mean"] == pytest.approx(0.25)
    nothing = measure(model, groups, known=groups)
    assert nothing.unseen is not None
    assert nothing.unseen["groups"] == 0
    assert math.isnan(nothing.unseen["mean"])


def test_values_that_are_known_are_not_asked_again():
    groups = by_hand()
    model = PreferenceModel(ConsistentComparator(Itself()))
    values, wanted = model.values(groups), measure(model, groups)

    class Asked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("it is known")

    model.comparator = ConsistentComparator(Asked())
    assert measure(model, groups, values=values).to_dict() == wanted.to_dict()


def test_it_is_plain_data_and_back():
    model = PreferenceModel(ConsistentComparator(Itself()))
    report = measure(model, by_hand().take([0, 1, 3]), known=by_hand())
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert json.loads(text)["categories"]["contact"]["standard_error"] is None
    again = Report.from_dict(json.loads(text))
    assert again.to_dict() == report.to_dict()
    assert math.isnan(again.categories["contact"]["standard_error"])  # pyright: ignore[reportOptionalSubscript]


def test_calibration_makes_probabilities_frequencies():
    # An expert who takes the better of two with the probability that half its score tells.
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 2, generator=draw) * 3
    likely = ((scores[:, 0] - scores[:, 1]) / 2).sigmoid()
    chosen = (torch.rand(4000, generator=draw) > likely).long()
    groups = Groups(candidates=scores.reshape(-1, 1), lengths=torch.full((4000,), 2), chosen=chosen)
    model = PreferenceModel(ConsistentComparator(Itself()))
    before = measure(model, groups)
    # 4,000 comparisons tell the temperature 2 to about 3 %.
    assert calibrate(model, groups) == pytest.approx(2, rel=0.1)
    after = measure(model, groups)
    assert after.temperature == model.temperature
    assert after.reliability is not None
    assert before.reliability is not None
    assert after.reliability.error < 0.02 < before.reliability.error
    right = groups.take((chosen == scores.argmax(1)).nonzero().squeeze(1))
    assert calibrate(model, right) == 1.0  # no temperature is best


def test_comparators_that_are_no_order(monkeypatch):
    groups = random_groups(20, seed=1).take(range(20))
    groups = Groups(**{**groups.as_inputs(), "candidates": groups.candidates.float()})
    config = PreferenceConfig(net=NetConfig("mirror", {"hidden": 3}), comparator="antisymmetric")
    model = config.build(groups)
    assert isinstance(model.comparator, AntisymmetricComparator)
    whole = measure(model, groups)
    monkeypatch.setattr("moefold.preference.model.AT_ONCE", 9)
    parts = measure(model, groups)
    assert parts.reliability is not None
    assert whole.reliability is not None
    torch.testing.assert_close(parts.reliability.count, whole.reliability.count)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.agreement == whole.agreement


def test_nothing_known_is_nothing_to_measure():
    model = PreferenceModel(ConsistentComparator(Itself()))
    groups = by_hand()
    bare = Groups(candidates=groups.candidates, lengths=groups.lengths)
    with pytest.raises(ValueError, match="there are 4 groups, labelled: False; give at least one"):
        measure(model, bare)
    with pytest.raises(ValueError, match="there are 0 groups, labelled: True"):
        measure(model, groups.take([]))
