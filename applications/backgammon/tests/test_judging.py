"""Players judged by labels, a benchmark and people; expected values by hand or another way."""

import json
import math

import numpy as np
import pytest

from human_lines import human_lines
from moefold_backgammon.bm import Benchmark
from moefold_backgammon.board import start
from moefold_backgammon.decisions import Decisions
from moefold_backgammon.human import read_human
from moefold_backgammon.judging import (
    choices,
    judge_by_benchmark,
    judge_by_labels,
    judge_by_people,
    write_json,
)
from moefold_backgammon.notation import find_play
from moefold_backgammon.players import PubEvalPlayer, RandomPlayer
from moefold_backgammon.plays import plays

FINALS = plays(start()[None], np.array([[3, 1]]))[0]


class Says:
    """A player with a play for each decision, in order."""

    name = "says"

    def __init__(self, *texts):
        self.texts = list(texts)

    def choose(self, before, dice, finals, lengths):
        at, chosen = 0, []
        for board, length in zip(before, lengths, strict=True):
            chosen.append(find_play(board, finals[at : at + length], self.texts.pop(0)))
            at += length
        return np.array(chosen)


def benchmark(decisions):
    """The start with 3 and 1, again and again: 8/5 6/5 before 24/23 13/10 before 13/10 6/5."""
    texts = ("8/5 6/5", "24/23 13/10", "13/10 6/5")
    finals = np.stack([FINALS[find_play(start(), FINALS, text)] for text in texts])
    return Benchmark(
        before=np.tile(start(), (decisions, 1, 1)),
        dice=np.tile(np.array([3, 1], np.int8), (decisions, 1)),
        finals=np.tile(finals, (decisions, 1, 1)),
        lengths=np.full(decisions, 3, np.int32),
        losses=np.tile(np.array([0, 0.125, 0.25], np.float32), decisions),
    )


def test_a_rating_by_hand():
    player = Says("8/5 6/5", "24/23 13/10", "13/9", "13/10 6/5")
    found = judge_by_benchmark(player, benchmark(4))
    # 0, 0.125, 0.25 for one that is not listed, 0.25.
    assert found.loss == pytest.approx(0.15625)
    assert found.rating == pytest.approx(78.125)
    spread = np.std([0, 0.125, 0.25, 0.25], ddof=1)
    assert found.standard_error == pytest.approx(spread / 2)
    assert (found.best, found.listed) == (0.25, 0.75)
    assert found.categories.keys() == {"contact"}
    assert "says: PR 78.12 (standard error 29.92), 0.1562 points lost in each of 4" in str(found)
    assert found.to_dict()["categories"]["contact"]["rating"] == pytest.approx(78.125)


def test_kinds_of_positions_are_told_apart():
    race = np.zeros((2, 25), np.int8)
    race[:, [0, 7]] = 5, 10
    some = benchmark(2)
    finals, _ = plays(race[None], np.array([[3, 1]]))
    both = Benchmark(
        before=np.concatenate([some.before, race[None]]),
        dice=np.tile(np.array([3, 1], np.int8), (3, 1)),
        finals=np.concatenate([some.finals, finals[:1]]),
        lengths=np.array([3, 3, 1], np.int32),
        losses=np.append(some.losses, np.float32(0)),
    )
    found = judge_by_benchmark(PubEvalPlayer(), both)
    assert [(name, share["groups"]) for name, share in found.categories.items()] == [
        ("contact", 2),
        ("race", 1),
    ]
    assert math.isnan(found.categories["race"]["standard_error"])  # of one decision
    assert found.to_dict()["categories"]["race"]["standard_error"] is None


def test_a_best_play_that_is_not_legal_is_refused():
    some = benchmark(3)
    some.finals[3] = some.before[0]  # of the second decision
    with pytest.raises(
        ValueError, match=r"best play of 1 of 3 decisions is not legal; .* number 2,"
    ):
        judge_by_benchmark(PubEvalPlayer(), some)


def test_labels_by_hand():
    at = {text: find_play(start(), FINALS, text) for text in ("8/5 6/5", "13/9", "24/20")}
    equities = np.full(len(FINALS), -1, np.float32)
    equities[[at["8/5 6/5"], at["13/9"], at["24/20"]]] = 0.5, 0.5, 0.25
    labels = Decisions(
        before=np.tile(start(), (4, 1, 1)),
        dice=np.tile(np.array([3, 1], np.int8), (4, 1)),
        finals=np.tile(FINALS, (4, 1, 1)),
        lengths=np.full(4, len(FINALS), np.int32),
        chosen=np.full(4, at["8/5 6/5"], np.int32),
        equities=np.tile(equities, 4),
        plies=np.zeros(4 * len(FINALS), np.int8),
        game=np.arange(4, dtype=np.int32),
    )
    found = judge_by_labels(Says("8/5 6/5", "13/9", "24/20", "24/23 13/10"), labels)
    assert found.agreement == 0.5  # two plays are as good as each other
    assert found.regret == pytest.approx((0 + 0 + 0.25 + 1.5) / 4)
    assert found.chance == pytest.approx(2 / 16)
    assert found.to_dict()["loss"] is None


@pytest.fixture(scope="module")
def matches(tmp_path_factory):
    file = tmp_path_factory.mktemp("human") / "matches.jsonl"
    file.write_text(
        human_lines([f"match {n}" for n in range(9)])
        + human_lines([f"other {n}" for n in range(9)], seed=1, agrees=False)
    )
    return read_human(file)


def test_people_who_play_as_the_player_does(matches):
    found = judge_by_people(PubEvalPlayer(), matches, held_out=0.4)
    apart = matches.held_out(0.4)
    assert found.human["mean"] == 1
    assert found.human["groups"] == apart.sum()
    assert found.matches == len(set(matches.decisions.game[apart].tolist()))
    best = (matches.best == matches.decisions.chosen)[apart]
    assert 0.2 < best.mean() < 0.8  # the engine agrees in half of the matches
    assert found.engine["mean"] == pytest.approx(best.mean())
    assert found.people["mean"] == pytest.approx(best.mean())
    assert sum(share["groups"] for share in found.categories.values()) == apart.sum()
    assert "as the people      1.000" in str(found)


def test_what_other_matches_have_too_is_told_apart(matches):
    found = judge_by_people(RandomPlayer(), matches, held_out=0.4)
    apart, decisions = matches.held_out(0.4), matches.decisions
    seen = set()
    new = 0
    for at in range(len(decisions)):
        position = (decisions.before[at].tobytes(), tuple(sorted(decisions.dice[at].tolist())))
        if not apart[at]:
            seen.add(position)
    for at in np.flatnonzero(apart):
        position = (decisions.before[at].tobytes(), tuple(sorted(decisions.dice[at].tolist())))
        new += position not in seen
    assert 0 < new < apart.sum()
    assert found.human_unseen is not None
    assert found.human_unseen["groups"] == new
    # Nothing is known of other matches if all are kept apart.
    assert judge_by_people(RandomPlayer(), matches, held_out=1).human_unseen is None


def test_no_match_kept_apart_is_an_error(matches):
    with pytest.raises(ValueError, match="of 18 matches none is among the share 0"):
        judge_by_people(RandomPlayer(), matches, held_out=0)


def test_a_player_is_asked_about_some_at_a_time_and_answers_the_same(matches):
    some = matches.decisions
    told = []
    found = choices(
        PubEvalPlayer(),
        some.before,
        some.dice,
        some.finals,
        some.lengths,
        watch=lambda done, of: told.append((done, of)),
    )
    assert (found == some.chosen).all()
    assert len(told) > 1
    assert told[-1] == (len(some), len(some))


def test_a_report_is_written_whole(tmp_path):
    found = judge_by_benchmark(PubEvalPlayer(), benchmark(1))
    write_json(tmp_path / "new" / "report.json", found, data="some.bm")
    told = json.loads((tmp_path / "new" / "report.json").read_text())
    assert (told["data"], told["player"], told["rating"]) == ("some.bm", "pubeval", found.rating)
    assert told["standard_error"] is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]
