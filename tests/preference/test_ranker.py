"""The ranker keeps to scikit-learn's conventions, and learns what an expert goes by."""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score

from moefold.preference import ComparisonRanker, Groups, NetConfig


def cases(count: int, seed: int = 0) -> tuple[list[np.ndarray], list[int]]:
    """Offers with a price in thousands and a quality; the expert weighs one against the other."""
    draw = np.random.default_rng(seed)
    groups = [
        np.stack([draw.normal(3000, 500, n), draw.normal(0.5, 0.1, n)], 1)
        for n in draw.integers(2, 6, count)
    ]
    return groups, [int(np.argmax(x[:, 1] - 2e-4 * x[:, 0])) for x in groups]


def test_three_lines_learn_to_choose():
    groups, chosen = cases(300)
    others, wanted = cases(200, seed=1)
    ranker = ComparisonRanker(epochs=30, learning_rate=0.02).fit(groups, chosen)
    predicted = ranker.predict(others)
    agreement = np.mean(predicted == wanted)
    # Blindly it would be 0.32; what is left are offers that are worth almost the same.
    assert agreement > 0.93
    assert ranker.score(others, wanted) == pytest.approx(agreement)
    assert ranker.n_features_in_ == 2
    assert ranker.history_.loss[-1] < ranker.history_.loss[0]


def test_few_groups_are_seen_more_often(monkeypatch):
    monkeypatch.setattr("moefold.preference.ranker._STEPS", 50)
    groups, chosen = cases(40)
    ranker = ComparisonRanker().fit(groups[:32], chosen[:32])
    assert ranker.history_.steps[-1] == 50


def test_everything_it_says_is_one_order():
    groups, chosen = cases(40)
    ranker = ComparisonRanker(epochs=5).fit(groups, chosen)
    scores, ranks = ranker.decision_function(groups), ranker.rank(groups)
    chances, best = ranker.predict_proba(groups), ranker.predict(groups)
    for x, s, r, p, b in zip(groups, scores, ranks, chances, best, strict=True):
        assert len(s) == len(p) == len(x)
        assert r[0] == b == np.argmax(s) == np.argmax(p)
        assert sorted(r) == list(range(len(x)))
        assert (np.diff(s[r]) <= 0).all()
        assert p.sum() == pytest.approx(1, abs=1e-6)
        # Luce: of any two, the chances are as the comparison says.
        assert np.log(p[0] / p[1]) == pytest.approx(s[0] - s[1], abs=1e-4)


def test_parameters_and_clones():
    ranker = ComparisonRanker(
        hidden=7, net=NetConfig("mlp", {"activation": "relu"}), random_state=3
    )
    assert ranker.get_params()["hidden"] == 7
    twin: Any = clone(ranker.set_params(epochs=2))
    assert twin.get_params() == ranker.get_params()
    groups, chosen = cases(30)
    with pytest.raises(NotFittedError, match="ComparisonRanker instance is not fitted yet"):
        twin.predict(groups)
    assert ranker.fit(groups, chosen) is ranker
    # The seed is all that it draws from.
    torch.manual_seed(9)
    np.testing.assert_array_equal(
        np.concatenate(ranker.decision_function(groups)),
        np.concatenate(twin.fit(groups, chosen).decision_function(groups)),
    )
    fresh: Any = clone(ranker)
    other = fresh.set_params(random_state=4).fit(groups, chosen)
    assert not np.allclose(other.decision_function(groups)[0], ranker.decision_function(groups)[0])
    torch.manual_seed(5)  # nor does it touch the global generator
    wanted = float(torch.rand(()))
    torch.manual_seed(5)
    ranker.fit(groups, chosen)
    assert float(torch.rand(())) == wanted


def test_cross_validation_and_search():
    groups, chosen = cases(60)
    ranker = ComparisonRanker(net="linear", epochs=15, learning_rate=0.1)
    found = cross_val_score(ranker, groups, chosen, cv=3)
    assert found.min() > 0.7  # of 20 groups; blindly 0.3
    search = GridSearchCV(ranker, {"learning_rate": [1e-9, 0.1]}, cv=2).fit(groups, chosen)
    assert search.best_params_ == {"learning_rate": 0.1}


def test_rankings_utilities_contexts_and_weights():
    draw = np.random.default_rng(0)
    groups = [draw.normal(size=(4, 2)) for _ in range(120)]
    worth = [x[:, 0] for x in groups]
    ranker = ComparisonRanker(net="linear", epochs=20, learning_rate=0.05)
    known: dict[str, Any]
    for known in (
        {"rankings": [np.argsort(-w).tolist() for w in worth]},
        {"utilities": worth},
        {"y": [int(w.argmax()) for w in worth]},
    ):
        ranker.fit(groups, **known)
        ranks = ranker.rank(groups)
        both = zip(ranks, worth, strict=True)
        assert np.mean([np.array_equal(r, np.argsort(-w)) for r, w in both]) > 0.7
    # A context turns the order round.
    signs = [np.array([draw.choice([-1.0, 1.0])]) for _ in groups]
    chosen = [int((w * s).argmax()) for w, s in zip(worth, signs, strict=True)]
    turned = ComparisonRanker(epochs=50, learning_rate=0.05)
    turned.fit(groups, chosen, context=signs)
    assert turned.score(groups, chosen, context=signs) > 0.9
    assert np.mean(turned.predict(groups, context=[-s for s in signs]) == chosen) < 0.3
    # Groups that do not count are not learnt from.
    upside_down = [int(w.argmin()) for w in worth]
    weights = [1.0] * 60 + [0.0] * 60
    half = [int(w.argmax()) for w in worth[:60]] + upside_down[60:]
    ranker.fit(groups, half, sample_weight=weights)
    # Were they counted, half the groups would say the opposite, and this would be near 0.25.
    assert ranker.score(groups, [int(w.argmax()) for w in worth]) > 0.8


def test_comparators_that_are_no_order():
    groups, chosen = cases(60)
    ranker = ComparisonRanker(net="mirror", comparator="antisymmetric", epochs=60)
    assert ranker.fit(groups, chosen).score(groups, chosen) > 0.8
    with pytest.raises(ValueError, match="AntisymmetricComparator tells chances of pairs only"):
        ranker.predict_proba(groups)
    rounds = Groups.of([x.astype(np.float32) for x in groups], chosen=chosen)
    assert ranker.score(rounds) == ranker.score(groups, chosen)


def test_bad_input_is_explained():
    groups, chosen = cases(5)
    ranker = ComparisonRanker(epochs=1)
    with pytest.raises(ValueError, match="group 2 chooses candidate 9 of"):
        ranker.fit(groups, [*chosen[:2], 9, *chosen[3:]])
    with pytest.raises(ValueError, match="train has no choice, ranks or utilities"):
        ranker.fit(groups)
    with pytest.raises(ValueError, match="candidates are texts; the net 'mlp' takes a vector"):
        ranker.fit([["a", "b"]], [0])
    ranker.fit(groups, chosen)
    with pytest.raises(
        ValueError, match=r"each candidate is \(3,\), those of fit had the shape \(2,"
    ):
        ranker.predict([np.zeros((2, 3))])
    with pytest.raises(ValueError, match="Groups hold all that is known of them; leave out chosen"):
        ranker.score(Groups.of(groups, chosen=chosen), chosen)
