"""Decisions with their plays, and the files that hold them."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from moefold_backgammon.decisions import Decisions, join, read_decisions


def decisions(lengths=(4, 2, 3), chosen=(2, 1, 0), first=0):
    plays = sum(lengths)
    finals = np.zeros((plays, 2, 25), np.int8)
    finals[:, 1, 0] = first + np.arange(plays)  # its number, to tell it from others
    before = np.zeros((len(lengths), 2, 25), np.int8)
    before[:, 1, 1] = first + np.arange(len(lengths))
    return Decisions(
        before=before,
        dice=np.ones((len(lengths), 2), np.int8),
        finals=finals,
        lengths=np.array(lengths, np.int32),
        chosen=np.array(chosen, np.int32),
        equities=(first + np.arange(plays)).astype(np.float32) / 10,
        plies=np.zeros(plays, np.int8),
        game=np.arange(len(lengths), dtype=np.int32),
    )


def plays_of(some):
    return some.finals[:, 1, 0].tolist()


def test_the_deepest_look_decides_where_depths_are_mixed():
    some = decisions(lengths=(4, 2), chosen=(1, 0))
    assert some.comparable is some.equities
    # Of the first decision two plays were looked at deeply; a shallow 0.9 is no better than both.
    mixed = replace(
        some,
        equities=np.array([0.9, 0.4, 0.3, -0.2, 0.1, 0.5], np.float32),
        plies=np.array([0, 2, 2, 0, 0, 0], np.int8),
    )
    assert mixed.comparable.tolist() == pytest.approx([0.3, 0.4, 0.3, -0.2, 0.1, 0.5])
    assert len(mixed.part(np.zeros(2, bool)).comparable) == 0


def test_a_part_takes_its_plays_along():
    #  decision   0        1     2
    #  plays      0 1 2 3  4 5   6 7 8
    some = decisions()
    assert some.starts.tolist() == [0, 4, 6]
    picked = some.part(np.array([2, 0]))
    assert plays_of(picked) == [6, 7, 8, 0, 1, 2, 3]
    assert picked.equities.tolist() == pytest.approx([0.6, 0.7, 0.8, 0, 0.1, 0.2, 0.3])
    assert picked.chosen.tolist() == [0, 2]
    assert picked.before[:, 1, 1].tolist() == [2, 0]
    assert plays_of(some.part(some.game == 1)) == [4, 5]
    assert len(some.part(np.zeros(3, bool))) == 0


def test_what_is_saved_is_read_back_in_the_order_of_names(tmp_path):
    names = "ecafhdbgi"
    for name in names:
        some = decisions(lengths=(2,), chosen=(1,), first=10 * names.index(name))
        some.save(tmp_path / f"{name}.safetensors", metadata={"made": "by hand"})
    read = read_decisions(tmp_path)
    first = [10 * names.index(name) for name in sorted(names)]
    assert plays_of(read) == [play for one in first for play in (one, one + 1)]
    assert read.chosen.tolist() == [1] * 9
    assert len(list(tmp_path.iterdir())) == 9  # nothing half written is left
    assert plays_of(read_decisions(tmp_path / "a.safetensors")) == [20, 21]


def test_joining_puts_one_after_the_other():
    assert plays_of(join([decisions(), decisions(first=20)])) == [*range(9), *range(20, 29)]


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="decision 1 chooses play 2 of 2"):
        decisions(chosen=(0, 2, 0))
    some = decisions()
    with pytest.raises(ValueError, match=r"have 8 plays by their lengths, but there are 9"):
        Decisions(
            **{name: getattr(some, name) for name in some.__slots__ if name != "lengths"},
            lengths=np.array([4, 2, 2], np.int32),
        )


def test_files_that_hold_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        read_decisions(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read as decisions"):
        read_decisions(tmp_path)
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r'holds \["weight"\], not decisions'):
        read_decisions(tmp_path)
