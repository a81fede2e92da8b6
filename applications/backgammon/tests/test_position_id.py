"""Ids and keys, by hand and against gnubg."""

import numpy as np
import pytest

from moefold_backgammon.board import start, swapped
from moefold_backgammon.position_id import (
    decode_keys,
    decode_match_ids,
    decode_position_ids,
    encode_keys,
    encode_position_ids,
)
from random_positions import from_play, placed


def test_the_id_of_the_start_is_the_one_everybody_knows():
    assert encode_position_ids(start()[None]) == ["4HPwATDgc/ABMA"]
    assert (decode_position_ids(["4HPwATDgc/ABMA"])[0] == start()).all()


def test_the_bits_by_hand():
    board = np.zeros((2, 25), np.int8)
    board[0, 0], board[0, 2], board[1, 24] = 2, 1, 1
    # Opponent 1100 1 0, so far 110010, then 22 zeros; player 24 zeros, 1 at bit 52, a zero.
    bits = "110010" + "0" * 22 + "0" * 24 + "10"
    bits += "0" * (80 - len(bits))
    packed = [int(bits[at : at + 8][::-1], 2) for at in range(0, 80, 8)]
    letters = "".join(chr(65 + (byte >> 4)) + chr(65 + (byte & 15)) for byte in packed)
    assert encode_keys(board[None]) == [letters]
    assert (decode_keys([letters])[0] == board).all()


def test_what_is_written_is_read_back():
    boards = np.concatenate([from_play(2000, 0), placed(2000, 1)])
    assert (decode_keys(encode_keys(boards)) == boards).all()
    assert (decode_position_ids(encode_position_ids(boards)) == boards).all()


def test_the_same_as_gnubg():
    gnubg_nn = pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    boards = np.concatenate([from_play(500, 2), placed(500, 3)])
    assert encode_keys(boards) == [gnubg_nn.key_of_board(one) for one in boards.tolist()]
    ids = encode_position_ids(boards)
    assert ids == [gnubg_nn.position_id(one) for one in boards.tolist()]
    assert decode_position_ids(ids).tolist() == [
        [list(side) for side in gnubg_nn.board_from_position_id(one)] for one in ids
    ]


def test_the_opponent_comes_first():
    board = placed(1, 5)
    assert encode_keys(board) != encode_keys(swapped(board))


def test_none_are_none():
    empty = np.zeros((0, 2, 25), np.int8)
    assert encode_keys(empty) == encode_position_ids(empty) == []
    assert decode_keys([]).shape == decode_position_ids([]).shape == (0, 2, 25)


@pytest.mark.parametrize(
    ("decode", "text", "says"),
    [
        (decode_keys, "ABC", "key 1 is 'ABC'; a key has 20 letters"),
        (decode_keys, "Q" * 20, "key 1 is 'QQQQ.*must be from A to P"),
        (decode_keys, "P" * 20, r"place 1 stands for \[80, 0\] men .* has 15 at most"),
        (decode_position_ids, "4HPwATDgc/ABM", "position id 1 is '4HPwATDgc/ABM'; .* 14 letters"),
        (decode_position_ids, "4HPwATDgc?ABMA", r"position id 1 is '4HPwATDgc\?ABMA'"),
        (decode_position_ids, "AAAAAAAAAAAAgA", "nothing follows the last place"),
        (decode_match_ids, "MIDmAAAAAAA", "match id 1 is 'MIDmAAAAAAA'; a match id has 12"),
    ],
)
def test_what_is_no_id_is_refused(decode, text, says):
    good = {
        decode_keys: "OAHDPAABDAOAHDPAABDA",
        decode_position_ids: "4HPwATDgc/ABMA",
        decode_match_ids: "MIDmAAAAAAAE",
    }
    with pytest.raises(ValueError, match=says):
        decode([good[decode], text])


def test_too_many_men_have_no_id():
    board = start()
    board[1, 0] = 1
    with pytest.raises(ValueError, match=r"board 0 has \[15, 16\] men"):
        encode_keys(board[None])


def a_match_id(*fields):
    """Bits of a match id from (value, width), the lowest first, as letters."""
    import base64

    number, at = 0, 0
    for value, width in fields:
        number |= value << at
        at += width
    return base64.b64encode(number.to_bytes(9, "little")).decode()


def test_the_fields_of_a_match_id():
    text = a_match_id(
        *[(2, 4), (1, 2), (1, 1), (1, 1), (1, 3), (0, 1), (1, 1), (2, 2)],
        *[(6, 3), (3, 3), (13, 15), (4, 15), (12, 15)],
    )
    states = decode_match_ids([text, "MIDmAAAAAAAE"])
    assert states.cube.tolist() == [4, 1]
    assert states.cube_owner.tolist() == [1, 3]
    assert states.on_roll.tolist() == [1, 0]
    assert states.crawford.tolist() == [True, False]
    assert states.game_state.tolist()[0] == 1
    assert states.turn.tolist()[0] == 0
    assert states.doubled.tolist() == [True, False]
    assert states.resigned.tolist()[0] == 2
    assert states.dice.tolist()[0] == [6, 3]
    assert states.length.tolist()[0] == 13
    assert states.scores.tolist()[0] == [4, 12]


def test_a_match_id_with_a_die_of_seven_is_refused():
    text = a_match_id(*[(0, 15)], *[(7, 3), (3, 3)])
    with pytest.raises(ValueError, match=r"match id 0, .* has the dice \[7, 3\]"):
        decode_match_ids([text])
