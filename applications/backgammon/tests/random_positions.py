"""Positions to try things on: from games of random plays, and of men put anywhere."""

import numpy as np

from moefold_backgammon.board import start, swapped, winner_points
from moefold_backgammon.plays import plays


def dice(count, seed):
    return np.random.default_rng(seed).integers(1, 7, (count, 2)).astype(np.int8)


def from_play(count, seed, games=400):
    """Positions of games whose plays are drawn at random; they reach every stage of the game."""
    draw = np.random.default_rng(seed)
    boards = np.stack([start()] * games)
    seen = []
    for _ in range(-(-count // games)):
        seen.append(boards.copy())
        finals, lengths = plays(boards, draw.integers(1, 7, (games, 2)))
        taken = np.cumsum(lengths) - lengths + draw.integers(0, np.maximum(lengths, 1))
        boards[lengths > 0] = finals[taken[lengths > 0]]
        over = winner_points(boards) > 0
        boards = swapped(boards)
        boards[over] = start()
    return np.concatenate(seen)[:count]


def placed(count, seed):
    """Men of both sides anywhere: on few points or many, at home only, on the bar."""
    draw = np.random.default_rng(seed)
    boards = np.zeros((count, 2, 25), np.int8)
    for board in boards:
        holds = draw.integers(0, 2, 24)  # which side a point can belong to
        most, home = draw.integers(1, 25), draw.random() < 0.3
        for side in (0, 1):
            points = np.flatnonzero(holds == side)
            points = 23 - points if side == 0 else points
            points = points[points < 6] if home else draw.permutation(points)[:most]
            if not len(points) or draw.random() < 0.4:
                points = np.append(points, 24)
            np.add.at(board[side], draw.choice(points, draw.integers(1, 16)), 1)
    return boards
