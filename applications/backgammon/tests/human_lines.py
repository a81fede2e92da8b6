"""Human decisions made up: PubEval plays both sides, and an engine agrees or does not."""

import json
import struct
from base64 import b64encode

import numpy as np

from moefold_backgammon.board import start, swapped
from moefold_backgammon.notation import play_text
from moefold_backgammon.players import best_of_each
from moefold_backgammon.plays import plays
from moefold_backgammon.position_id import encode_position_ids
from moefold_backgammon.pubeval import pubeval_scores


def match_id(dice):
    """With these dice and nothing else: they are bits 15 to 20 of nine bytes."""
    packed = (int(dice[0]) << 15) | (int(dice[1]) << 18)
    return b64encode(struct.pack("<Q", packed) + b"\0").decode()


def human_lines(matches, *, seed=0, agrees=True, turns=16):
    """Lines of a file: the first turns of a game in each match.

    Args:
        matches: their names.
        seed: of the dice.
        agrees: whether the engine lists the play that was made first; if not, another is.
        turns: of each game.
    """
    lines = []
    for number, name in enumerate(matches):
        board, draw = start(), np.random.default_rng([seed, number])
        for turn in range(turns):
            dice = draw.integers(1, 7, 2).astype(np.int8)
            finals, lengths = plays(board[None], dice[None])
            if len(finals):
                order = np.argsort(-pubeval_scores(board[None], finals, lengths), kind="stable")
                best = int(best_of_each(pubeval_scores(board[None], finals, lengths), lengths)[0])
                rolled = (int(dice[0]), int(dice[1]))
                texts = [play_text(board, finals[at], rolled) for at in order[:3]]
                played = play_text(board, finals[best], rolled)
                listed = texts if agrees else texts[1:] + texts[:1]
                line = {
                    "match": name,
                    "player": turn % 2,
                    "position": encode_position_ids(board[None])[0],
                    "match_id": match_id(dice),
                    "dice": "".join(map(str, rolled)),
                    "played": played,
                    "analysis": [[2, text, -0.01 * at] for at, text in enumerate(listed)],
                }
                lines.append(json.dumps(line))
                board = finals[best]
            board = swapped(board)
    return "".join(f"{line}\n" for line in lines)
