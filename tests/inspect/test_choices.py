"""The tally of who chooses whom: a small case by hand, then what must hold for real layers."""

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import moefold
from moefold.inspect import Choices, Tally
from moefold.inspect.choices import characteristic
from moefold.record import Record
from moefold.routing import Grouping, SoftRouting, SparseRouting

# Two sequences, three experts, P is padding:
#
#   tokens    x        y    x        | x        z     P
#   experts   0+1      1    0+1      | 0+1      none  none
#   weights   .6 .4    1.   .6 .4    | .6 .4
TOKENS = [["x", "y", "x"], ["x", "z", None]]
BY_WORD = {"x": [0.6, 0.4, 0.0], "y": [0.0, 1.0, 0.0], "z": [0.0] * 3, None: [0.0] * 3}


def sparse(tokens: Sequence[Sequence[str | None]]) -> SparseRouting:
    weights = torch.tensor([[BY_WORD[word] for word in sequence] for sequence in tokens])
    mask = torch.tensor([[word is not None for word in sequence] for sequence in tokens])
    return SparseRouting.from_choice(weights > 0, weights, mask=mask)


def record_of(*routings: SparseRouting | SoftRouting) -> Record:
    layer = moefold.MoEConfig(num_experts=3, expert_width=4).build(4)
    record = Record({"layers.3.mlp": layer})
    for routing in routings:
        record.heard["layers.3.mlp"].add(routing)
    return record


def test_by_hand():
    tally = Tally(keep=1)
    tally.add(record_of(sparse(TOKENS)), TOKENS)
    choices = tally.choices()
    (site,) = choices.sites
    assert site.site == "layers.3.mlp"
    assert choices.tokens == 5
    # Expert 0 has three rows, expert 1 four. Weights are float32, their sums float64.
    assert site.load == pytest.approx((3 / 7, 4 / 7, 0))
    assert site.mass == pytest.approx((1.8 / 4, 2.2 / 4, 0), rel=1e-6)
    assert site.dead == (2,)
    # All three tokens of expert 0 are expert 1's too; of its four, three are expert 0's.
    assert site.coactivation == ((1, 1, 0), (0.75, 1, 0), (0, 0, 0))
    assert site.metrics["uncovered"] == pytest.approx(1 / 5)
    # Only the first text is kept; heaviest expert first.
    assert choices.texts == (("x", "y", "x"),)
    x, y = ((0, 0.6), (1, 0.4)), ((1, 1.0),)
    assert choices.chosen == {"layers.3.mlp": ((x, y, x),)}


def test_two_passes_are_one_long_pass():
    both = [*TOKENS, ["y", "y", "x"]]
    together, apart = Tally(keep=3), Tally(keep=3)
    together.add(record_of(sparse(both)), both)
    for part in (both[:2], both[2:]):
        apart.add(record_of(sparse(part)), part)
    one, two = together.choices(), apart.choices()
    assert one.texts == two.texts
    assert one.chosen == two.chosen
    for name in ("load", "mass", "dead", "coactivation", "characteristic"):
        assert getattr(one.sites[0], name) == getattr(two.sites[0], name)


def test_only_the_last_pass_of_a_record_is_counted():
    twice, once = Tally(), Tally()
    other = [["y", "y", "y"], ["y", "y", "y"]]
    twice.add(record_of(sparse(other), sparse(TOKENS)), TOKENS)
    once.add(record_of(sparse(TOKENS)), TOKENS)
    assert twice.choices() == once.choices()


def test_a_soft_routing_has_shares_and_no_pairs():
    # One group of two tokens, two experts of one slot; token 0 is made of expert 1 mostly.
    combine = torch.tensor([[[[0.25], [0.75]], [[0.5], [0.5]]]])
    routing = SoftRouting(
        dispatch_weight=combine, combine_weight=combine, grouping=Grouping("sequence", 1, 2)
    )
    soft = moefold.routers.config("soft")
    layer = moefold.MoEConfig(num_experts=2, expert_width=4, router=soft).build(4)
    record = Record({"mlp": layer})
    record.heard["mlp"].add(routing)
    tally = Tally(keep=1)
    tally.add(record, [["a", "b"]])
    (site,) = tally.choices().sites
    assert site.load == pytest.approx((0.375, 0.625))
    assert site.coactivation is None
    assert tally.choices().chosen["mlp"][0][0] == ((1, 0.75), (0, 0.25))


@pytest.mark.parametrize("router", ["token-choice", "expert-choice", "unified", "soft"])
def test_a_real_layer(router: str):
    config = moefold.routers.config(router)
    layer = moefold.MoEConfig(num_experts=4, expert_width=8, router=config).build(6)
    words = [["a", "b", "c", "d", "e"], ["a", "a", "b", None, None]]
    mask = torch.tensor([[word is not None for word in row] for row in words])
    tally = Tally(keep=2)
    with moefold.record_routing(layer) as record:
        layer(torch.randn(2, 5, 6), mask)
        tally.add(record, words)
    choices = tally.choices()
    (site,) = choices.sites
    (routing,) = record[""]
    np.testing.assert_allclose(site.load, moefold.metrics.load(routing).numpy(), rtol=1e-6)
    assert [len(text) for text in choices.chosen[""]] == [5, 3]
    # JSON and back is the same value.
    assert Choices.from_dict(json.loads(json.dumps(choices.to_dict()))) == choices


def test_characteristic_tokens_are_those_out_of_proportion():
    # "the" is everywhere; "def" goes to expert 0 far above its share, "is" to expert 1; "rare" went
    # to expert 1 both times it occurred, which may well be chance.
    words = ["the", "def", "is", "rare"]
    counts = np.array([[500, 500], [90, 10], [10, 90], [0, 2]], dtype=float)
    first, second = characteristic(counts, words, most=3)
    assert [word for word, *_ in first] == ["def"]
    assert [word for word, *_ in second] == ["is"]
    assert first[0][2] == 90
    assert first[0][1] > 1.96


def test_z_is_that_of_monroe_colaresi_and_quinn():
    # Equations 16, 20 and 22 with two words and two experts, written out. The prior is worth a
    # thousand tokens.
    counts = np.array([[3000.0, 1000.0], [2000.0, 6000.0]])
    of_a, of_b = 1000 * 4 / 12, 1000 * 8 / 12

    def z(word: float, n: float, other: float, m: float, prior: float) -> float:
        odds = (word + prior) / (n + 1000 - word - prior)
        other_odds = (other + prior) / (m + 1000 - other - prior)
        variance = 1 / (word + prior) + 1 / (other + prior)
        return (math.log(odds) - math.log(other_odds)) / math.sqrt(variance)

    first, second = characteristic(counts, ["a", "b"], most=2)
    assert first == (("a", pytest.approx(z(3000, 5000, 1000, 7000, of_a), abs=0.005), 3000),)
    assert second == (("b", pytest.approx(z(6000, 7000, 2000, 5000, of_b), abs=0.005), 6000),)
    # 0.005, because two digits are kept. With a hundredth of the tokens the prior decides for "a".
    assert z(30, 50, 10, 70, of_a) < 1.96
    assert characteristic(counts / 100, ["a", "b"], most=2)[0] == ()


def test_errors_name_what_does_not_fit():
    tally = Tally()
    with pytest.raises(ValueError, match="nothing was counted"):
        tally.choices()
    with pytest.raises(ValueError, match="holds no routing"):
        tally.add(record_of(), TOKENS)
    with pytest.raises(
        ValueError, match=r"layers\.3\.mlp routed 2 sequences of 3 tokens, .* are 1 sequences"
    ):
        tally.add(record_of(sparse(TOKENS)), TOKENS[:1])
    with pytest.raises(ValueError, match="sequences of up to 4"):
        tally.add(record_of(sparse(TOKENS)), [["x"] * 4, ["x"]])
