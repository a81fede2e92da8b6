"""PubEval: the same values and plays as elsewhere."""

import numpy as np
import pytest

from moefold_backgammon.board import in_contact, start, swapped
from moefold_backgammon.encoding import pubeval_inputs
from moefold_backgammon.plays import plays
from moefold_backgammon.pubeval import ALL_OFF, pubeval_scores, scores, weights
from random_positions import dice, from_play, placed


def test_the_start_by_hand():
    # Mover: 2 on 24, 5 on 13, 3 on 8, 5 on 6. The opponent holds points only, which are not seen.
    contact = weights("contact")
    at = {point: 5 * (24 - point) for point in (24, 13, 8, 6)}
    by_hand = (
        contact[at[24] + 2]
        + contact[at[13] + 2]
        + contact[at[13] + 4] * (5 - 3) / 2
        + contact[at[8] + 2]
        + contact[at[8] + 3]
        + contact[at[6] + 2]
        + contact[at[6] + 4] * (5 - 3) / 2
    )
    assert scores(start()[None], race=np.array([False]))[0] == pytest.approx(by_hand, abs=1e-12)


def test_ends_of_the_weights():
    assert weights("contact")[[0, 1, -2, -1]].tolist() == [0.25696, -0.66937, 5.62596, -2.75800]
    assert weights("race")[[0, 1, -2, -1]].tolist() == [0.0, -0.1716, 0.0, 3.4204]
    assert len(weights("contact")) == len(weights("race")) == 122
    with pytest.raises(ValueError, match="no weights for 'crashed'; it has them for contact and"):
        weights("crashed")


def test_the_position_before_the_play_decides_which_weights_count():
    # Two men of the opponent on the mover's 13, whose only man is on 14, or has passed to 12.
    before = np.zeros((2, 2, 25), np.int8)
    before[:, 0, 11] = 2
    before[0, 1, 13] = before[1, 1, 11] = 1
    assert in_contact(before).tolist() == [True, False]
    finals, lengths = plays(before, np.array([[2, 1], [2, 1]]))
    assert not in_contact(finals).any()
    inputs = pubeval_inputs(finals).astype(np.float64)
    found = pubeval_scores(before, finals, lengths)
    assert found[: lengths[0]] == pytest.approx(inputs[: lengths[0]] @ weights("contact"))
    assert found[lengths[0] :] == pytest.approx(inputs[lengths[0] :] @ weights("race"))


def test_all_off_is_best():
    done = np.zeros((2, 2, 25), np.int8)
    done[:, 0, 0], done[1, 1, 0] = 2, 1
    assert scores(done, race=np.array([True, True]))[0] == ALL_OFF
    assert scores(done, race=np.array([True, True]))[1] < ALL_OFF


def test_the_values_of_gnubgs_copy():
    gnubg_nn = pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    boards = np.concatenate([from_play(3000, 0), placed(2000, 1)])
    theirs = [gnubg_nn.pub_eval_score(one) for one in boards.tolist()]  # of the player not on roll
    ours = scores(swapped(boards), race=~in_contact(boards))
    # It adds 122 float32 numbers of up to 12.
    assert ours == pytest.approx(np.array(theirs), abs=1e-5)


def test_the_plays_of_gnubgs_copy():
    gnubg_nn = pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    boards, rolls = from_play(1500, 2), dice(1500, 3)
    finals, lengths = plays(boards, rolls)
    values = pubeval_scores(boards, finals, lengths)
    ends = np.cumsum(lengths)
    compared = 0
    for board, roll, end, length in zip(boards, rolls.tolist(), ends, lengths, strict=True):
        mine = values[end - length : end]
        if length < 2 or np.sort(mine)[-1] - np.sort(mine)[-2] < 1e-5:  # a tie, but for rounding
            continue
        theirs = after(board, gnubg_nn.pub_best_move(board.tolist(), *roll))
        assert (finals[end - length + mine.argmax()] == theirs).all()
        compared += 1
    assert compared >= 800


def after(board, moves):
    """The board after moves in gnubg-nn's flat list: 0-based, the bar 24, off -1."""
    made = board.copy()
    for source, to in zip(moves[::2], moves[1::2], strict=True):
        made[1, source] -= 1
        if to >= 0:
            made[1, to] += 1
            if made[0, 23 - to] == 1:
                made[0, 23 - to] = 0
                made[0, 24] += 1
    return made
