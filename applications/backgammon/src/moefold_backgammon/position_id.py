"""Position ids, keys and match ids: a position or the state of a match in a few letters.

The men are written as bits: for each place as many ones as men and a zero, first the 25 places of
the opponent, then those of the player on roll, from the ace point to the bar. The bits of a byte
are read from the lowest.

- *position id*, as gnubg shows it: the 10 bytes in base 64, 14 letters, `4HPwATDgc/ABMA`
- *key*, as in benchmark files: 20 letters A to P, two for a byte, the higher half first

Shapes: `n 2 25` men by side and point, the opponent first.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int8, Int32, UInt8

from moefold_backgammon.board import MEN

BYTES = 10
"""Bytes of a position: 30 men at most and 50 zeros are 80 bits."""

MATCH_BYTES = 9


def decode_position_ids(ids: Sequence[str]) -> Int8[np.ndarray, "n 2 25"]:
    """The positions of ids such as `4HPwATDgc/ABMA`.

    Raises:
        ValueError: one is no position id.
    """
    return _boards(_from_base64(ids, BYTES, "position id"), ids)


def encode_position_ids(boards: Int8[np.ndarray, "n 2 25"]) -> list[str]:
    """The ids of positions."""
    return [base64.b64encode(row.tobytes())[:14].decode() for row in _bytes(boards)]


def decode_keys(keys: Sequence[str]) -> Int8[np.ndarray, "n 2 25"]:
    """The positions of keys of 20 letters from A to P.

    Raises:
        ValueError: one is no key.
    """
    for number, key in enumerate(keys):
        if len(key) != 2 * BYTES or not key.isascii():
            raise ValueError(f"key {number} is {key!r}; a key has {2 * BYTES} letters from A to P")
    letters = np.frombuffer("".join(keys).encode(), np.uint8).reshape(-1, BYTES, 2) - ord("A")
    wrong = np.flatnonzero((letters > 15).any(axis=(1, 2)))
    if len(wrong):
        raise ValueError(f"key {wrong[0]} is {keys[wrong[0]]!r}; its letters must be from A to P")
    return _boards(letters[..., 0] << 4 | letters[..., 1], keys)


def encode_keys(boards: Int8[np.ndarray, "n 2 25"]) -> list[str]:
    """The keys of positions."""
    packed = _bytes(boards)
    letters = (np.stack([packed >> 4, packed & 15], axis=2) + ord("A")).astype(np.uint8)
    return [row.tobytes().decode() for row in letters]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MatchStates:
    """What match ids say, of `n` moments.

    Attributes:
        cube: what the cube shows: 1, 2, 4, ...
        cube_owner: 0 or 1 for a player, 3 while the cube is in the middle.
        on_roll: the player on roll, 0 or 1.
        crawford: whether this is the Crawford game.
        game_state: 0 no game, 1 playing, 2 over, 3 resigned, 4 dropped.
        turn: the player who has to decide, 0 or 1.
        doubled: whether a double is offered.
        resigned: points that a resignation offers, 0 for none.
        dice: what was rolled; 0 0 before the roll.
        length: points that win the match; 0 for money.
        scores: of player 0 and of player 1.
    """

    cube: Int32[np.ndarray, " n"]
    cube_owner: Int8[np.ndarray, " n"]
    on_roll: Int8[np.ndarray, " n"]
    crawford: Bool[np.ndarray, " n"]
    game_state: Int8[np.ndarray, " n"]
    turn: Int8[np.ndarray, " n"]
    doubled: Bool[np.ndarray, " n"]
    resigned: Int8[np.ndarray, " n"]
    dice: Int8[np.ndarray, "n 2"]
    length: Int32[np.ndarray, " n"]
    scores: Int32[np.ndarray, "n 2"]


FIELDS = {
    "cube": 4,
    "cube_owner": 2,
    "on_roll": 1,
    "crawford": 1,
    "game_state": 3,
    "turn": 1,
    "doubled": 1,
    "resigned": 2,
    "die": 3,
    "other_die": 3,
    "length": 15,
    "score": 15,
    "other_score": 15,
}
"""Bits of each field of a match id, in their order, the lowest bit first; 66 of 72."""


def decode_match_ids(ids: Sequence[str]) -> MatchStates:
    """What gnubg's match ids such as `MIDmAAAAAAAE` say.

    Raises:
        ValueError: one is no match id.
    """
    bits = np.unpackbits(_from_base64(ids, MATCH_BYTES, "match id"), axis=1, bitorder="little")
    values, at = {}, 0
    for name, width in FIELDS.items():
        values[name] = bits[:, at : at + width].astype(np.int32) @ (1 << np.arange(width))
        at += width
    dice = np.stack([values["die"], values["other_die"]], axis=1)
    wrong = np.flatnonzero((dice > 6).any(axis=1))
    if len(wrong):
        raise ValueError(
            f"match id {wrong[0]}, {ids[wrong[0]]!r}, has the dice {dice[wrong[0]].tolist()}; a "
            f"die shows 1 to 6"
        )
    return MatchStates(
        cube=(1 << values["cube"]).astype(np.int32),
        crawford=values["crawford"] == 1,
        doubled=values["doubled"] == 1,
        dice=dice.astype(np.int8),
        length=values["length"].astype(np.int32),
        scores=np.stack([values["score"], values["other_score"]], axis=1).astype(np.int32),
        **{
            name: values[name].astype(np.int8)
            for name in ("cube_owner", "on_roll", "game_state", "turn", "resigned")
        },
    )


def _from_base64(ids: Sequence[str], size: int, kind: str) -> UInt8[np.ndarray, "n bytes"]:
    letters = -(-size * 8 // 6)
    decoded = []
    for number, one in enumerate(ids):
        try:
            data = base64.b64decode(one + "=" * (-letters % 4), validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if len(one) != letters or len(data) != size:
            raise ValueError(
                f"{kind} {number} is {one!r}; a {kind} has {letters} letters of base 64"
            )
        decoded.append(data)
    return np.frombuffer(b"".join(decoded), np.uint8).reshape(-1, size)


def _boards(packed: UInt8[np.ndarray, "n 10"], names: Sequence[str]) -> np.ndarray:
    """Men from bits: the place of a one is the number of zeros before it."""
    bits = np.unpackbits(packed, axis=1, bitorder="little")
    places = np.cumsum(bits == 0, axis=1)
    row, at = np.nonzero(bits)
    place = places[row, at]
    men = np.zeros((len(bits), 51), np.int8)
    np.add.at(men, (row, np.minimum(place, 50)), 1)
    boards = men[:, :50].reshape(-1, 2, 25)
    wrong = np.flatnonzero((men[:, 50] > 0) | (boards.sum(axis=2) > MEN).any(axis=1))
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"{names[at]!r} at place {at} stands for {boards[at].sum(axis=1).tolist()} men in 25 "
            f"places each; a side has {MEN} at most, and nothing follows the last place"
        )
    return boards


def _bytes(boards: Int8[np.ndarray, "n 2 25"]) -> UInt8[np.ndarray, "n 10"]:
    """Bits from men: a man is a one after all men before it and the zeros of the places before."""
    places = boards.reshape(-1, 50)
    over = np.flatnonzero((boards.sum(axis=2, dtype=np.int64) > MEN).any(axis=1))
    if len(over):
        men = boards[over[0]].sum(axis=1, dtype=np.int64).tolist()
        raise ValueError(f"board {over[0]} has {men} men; a side has {MEN} at most")
    ends = np.cumsum(places, axis=1, dtype=np.int64) + np.arange(50)  # the zero of each place
    bits = np.ones((len(places), 8 * BYTES), np.uint8)
    np.put_along_axis(bits, ends, 0, axis=1)
    bits[np.arange(8 * BYTES) > ends[:, -1:]] = 0
    return np.packbits(bits, axis=1, bitorder="little")


__all__ = [
    "MatchStates",
    "decode_keys",
    "decode_match_ids",
    "decode_position_ids",
    "encode_keys",
    "encode_position_ids",
]
