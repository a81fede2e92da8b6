"""Human decisions: hand-written lines, and the file itself where it is."""

import base64
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest

from moefold_backgammon.board import CATEGORIES, CONTACT, start
from moefold_backgammon.human import NOT_LISTED, read_human
from moefold_backgammon.notation import find_play
from moefold_backgammon.plays import plays
from moefold_backgammon.position_id import encode_position_ids

DATA = Path(os.environ.get("MOEFOLD_DATA", Path(__file__).parents[4] / "shared" / "data"))
FILE = DATA / "backgammon_human_train.jsonl.xz"
needs_file = pytest.mark.skipif(
    not FILE.is_file(), reason=f"no {FILE.name}; set MOEFOLD_DATA to the folder that holds it"
)


def match_id(dice, length=7):
    number = dice[0] << 15 | dice[1] << 18 | length << 21 | 3 << 4
    return base64.b64encode(number.to_bytes(9, "little")).decode()


def row(**other):
    one = {
        "match": "a",
        "player": 4,
        "position": encode_position_ids(start()[None])[0],
        "match_id": match_id((3, 1)),
        "dice": "31",
        "played": "24/23 13/10",
        "analysis": [[2, "8/5 6/5", 0.2], [2, "24/23 13/10", 0.01], [0, "13/9", 0.05]],
    }
    return {**one, **other}


def file_of(tmp_path, *rows):
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


FORCED = np.stack([np.eye(25, dtype=np.int8)[0] * 2, np.eye(25, dtype=np.int8)[0] * 3])


def test_a_line(tmp_path):
    some = read_human(file_of(tmp_path, row()))
    finals, _ = plays(start()[None], np.array([[3, 1]]))
    decisions = some.decisions
    assert (decisions.finals == finals).all()
    assert decisions.chosen.tolist() == [find_play(start(), finals, "24/23 13/10")]
    assert some.best.tolist() == [find_play(start(), finals, "8/5 6/5")]
    assert some.player.tolist() == [4]
    assert some.category.tolist() == [CONTACT]
    assert CATEGORIES[CONTACT] == "contact"
    assert some.states.length.tolist() == [7]
    listed = {
        find_play(start(), finals, text): (depth, value) for depth, text, value in row()["analysis"]
    }
    for place in range(16):
        depth, value = listed.get(place, (NOT_LISTED, np.nan))
        assert decisions.plies[place] == depth
        assert decisions.equities[place] == pytest.approx(value, nan_ok=True)


def test_forced_plays_are_left_out_and_counted(tmp_path):
    forced = row(
        position=encode_position_ids(FORCED[None])[0],
        played="1/off(2)",
        match="b",
        analysis=[[0, "1/off(2)", 1.0]],
    )
    some = read_human(file_of(tmp_path, forced, row(player=5), row(match="b", player=6)))
    assert some.forced == 1
    assert some.player.tolist() == [5, 6]
    assert some.matches == ("b", "a")
    assert some.decisions.game.tolist() == [1, 0]
    assert len(some.states.length) == len(some.best) == len(some.category) == len(some) == 2


def test_a_part(tmp_path):
    rows = [row(player=number, match=str(number)) for number in range(5)]
    some = read_human(file_of(tmp_path, *rows))
    part = some.part(np.array([3, 1]))
    assert part.player.tolist() == [3, 1]
    assert [some.matches[at] for at in part.decisions.game] == ["3", "1"]
    assert len(part.decisions.finals) == 32
    assert read_human(file_of(tmp_path, *rows), most=2).player.tolist() == [0, 1]


def test_whole_matches_are_held_out_whatever_else_is_in_the_file(tmp_path):
    rows = [row(match=str(number // 2)) for number in range(400)]
    some = read_human(file_of(tmp_path, *rows))
    out = some.held_out(0.3)
    assert (out[::2] == out[1::2]).all()
    # Of 200 matches 60 are expected, with a standard deviation of 6.5; four of those.
    assert 34 < out[::2].sum() < 86
    later = read_human(file_of(tmp_path, *rows[100:]))
    assert (later.held_out(0.3) == out[100:]).all()
    assert (some.held_out(0.5) >= out).all()
    assert not some.held_out(0).any()
    assert some.held_out(1).all()
    with pytest.raises(ValueError, match="share 10 of the matches must be from 0 to 1"):
        some.held_out(10)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"dice": "21"}, r"line 2 of .* has the dice '21', but its match id .* says \[3, 1\]"),
        ({"dice": "71"}, "line 2 of .* has the dice '71'; two digits"),
        ({"played": "8/3"}, "1 of 2 plays of .* are not legal; the first is '8/3' in line 2"),
        (
            {"analysis": [[2, "8/5 6/5", 0.2], [2, "7/3", 0.1]]},
            "1 of 5 plays of .* are not legal; the first is '7/3' in line 2",
        ),
        ({"analysis": []}, "line 2 of .* is no human decision"),
        ({"player": "me"}, r"line 2 of .* is no human decision .*\['player'\]"),
        ({"position": "4HPwATDgc"}, "line 2 of .*: position id 0 is '4HPwATDgc'"),
    ],
)
def test_what_is_wrong_is_refused(tmp_path, other, says):
    with pytest.raises(ValueError, match=says):
        read_human(file_of(tmp_path, row(), row(**other)))


def test_dice_may_stand_in_either_order(tmp_path):
    assert len(read_human(file_of(tmp_path, row(dice="13")))) == 1


def test_lines_that_are_cut_off_or_of_something_else(tmp_path):
    file = file_of(tmp_path, row())
    file.write_text(file.read_text() + json.dumps(row())[:50])
    with pytest.raises(ValueError, match=r"line 2 of .*some.jsonl is no human decision"):
        read_human(file)
    with pytest.raises(ValueError, match=r"no human decision .*'position'"):
        read_human(file_of(tmp_path, {"match": "a", "player": 1}))


def test_compressed(tmp_path):
    file = tmp_path / "some.jsonl.xz"
    file.write_bytes(lzma.compress((json.dumps(row()) + "\n").encode()))
    assert len(read_human(file)) == 1


@needs_file
def test_the_first_lines_of_the_file():
    some = read_human(FILE, most=2000)
    chosen = some.decisions.equities[some.decisions.starts + some.decisions.chosen]
    assert np.isfinite(chosen).all()  # the play that was made is always listed
    # About 70 % of the plays are the best listed; a standard deviation is 1 %.
    assert (some.best == some.decisions.chosen).mean() == pytest.approx(0.7, abs=0.06)


@pytest.mark.slow
@needs_file
def test_every_play_of_the_file_is_legal():
    some = read_human(FILE)  # raises if not
    assert len(some) + some.forced == 95_346
    assert len(some.matches) == 2_788
    assert len(np.unique(some.player)) == 808
