"""The clock: what runs when, what counts, and what a ratio is. Nothing here waits or measures."""

import gc
import itertools

import pytest

from moefold.bench.timing import Seconds, clock_of, interleave, part, quartiles, ratios


class Told:
    """Passes that write down when they ran, and take the time they are told to."""

    def __init__(self, took):
        self.took = took
        self.ran = []

    def __call__(self, name):
        def run(x, clock):
            self.ran.append((name, x))
            assert not gc.isenabled()
            return Seconds(self.took[name](x), 3 * self.took[name](x))

        return run


def test_every_round_has_all_in_an_order_that_rotates():
    told = Told({name: lambda x: 1.0 for name in "abc"})
    seconds = interleave(
        {name: told(name) for name in "abc"}, [10, 11, 12, 13], lambda: 0.0, warmup=1
    )
    order = ["".join(name for name, _ in told.ran[3 * i : 3 * i + 3]) for i in range(4)]
    assert order == ["abc", "bca", "cab", "abc"]
    assert [x for _, x in told.ran[::3]] == [10, 11, 12, 13]  # an input of its own for each round
    # The warm-up is not counted.
    assert all(list(of) == [0, 1, 2] for of in seconds.values())
    assert gc.isenabled()


def test_slow_ones_run_in_a_few_rounds_spread_over_the_run():
    told = Told({"quick": lambda x: 1.0, "slow": lambda x: 50.0})
    passes = {name: told(name) for name in ("quick", "slow")}
    seconds = interleave(passes, list(range(15)), lambda: 0.0, warmup=4, few=["slow"])
    assert list(seconds["quick"]) == list(range(11))
    assert list(seconds["slow"]) == [0, 5, 10]
    assert [x for name, x in told.ran if name == "slow"] == [3, 4, 9, 14]  # 3: its warm-up


def test_a_ratio_is_within_a_round():
    # The machine gets ten times slower half way: the ratio does not.
    slowness = [1.0, 1.0, 10.0, 10.0]
    told = Told({"a": lambda x: slowness[x], "b": lambda x: 2 * slowness[x]})
    seconds = interleave({n: told(n) for n in "ab"}, [0, 1, 2, 3], lambda: 0.0, warmup=0)
    a, b = part(seconds["a"], "both"), part(seconds["b"], "both")
    assert ratios(b, a) == [2.0, 2.0, 2.0]
    assert quartiles(list(part(seconds["a"], "forward").values()))[1] == 5.5
    assert part(seconds["a"], "backward") == {0: 2.0, 1: 2.0, 2: 20.0, 3: 20.0}
    # Of rounds that only one took part in, nothing is said.
    assert ratios({0: 8.0, 1: 1.0}, {0: 2.0, 2: 1.0}) == [4.0, 4.0, 4.0]
    with pytest.raises(ValueError, match="no round has both times; give more rounds"):
        ratios({0: 1.0}, {1: 1.0})


def test_garbage_is_collected_again_even_after_an_error():
    def fails(x, clock):
        raise KeyError(x)

    with pytest.raises(KeyError):
        interleave({"a": fails}, [1], lambda: 0.0, warmup=0)
    assert gc.isenabled()


def test_progress_is_told_of_every_round():
    told = []
    interleave({}, [0, 1, 2], lambda: 0.0, warmup=1, progress=lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_quartiles_of_few():
    assert quartiles([3.0]) == [3.0, 3.0, 3.0]
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 3.0, 4.0]


def test_clocks_go_forward():
    for kind in ("wall", "cpu"):
        clock = clock_of("cpu", kind)
        assert all(a <= b for a, b in itertools.pairwise(clock() for _ in range(5)))
    with pytest.raises(ValueError, match="--clock cpu counts the time of this process"):
        clock_of("cuda", "cpu")
