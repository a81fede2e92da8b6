"""A person plays against a player of ours in the terminal.

    your roll: 3 1
    > hint
      1  8/5 6/5        +0.00
      2  24/23 13/10    -0.61
    > 8/5 6/5

A play is typed as it is written everywhere: `13/9 6/5`, `bar/22`, `6/off(2)`. Only legal plays are
taken. `hint` shows what a net prefers: differences of its values, which are its log-odds that the
first is the better of the two; they are no points.

Shapes: `2 25` men by side and point, [opponent, mover].
"""

from collections.abc import Callable
from itertools import count

import numpy as np
from jaxtyping import Int8

from moefold_backgammon.board import start, swapped, winner_points
from moefold_backgammon.dice import BLOCK, game_dice
from moefold_backgammon.draw import draw
from moefold_backgammon.notation import find_play, play_text
from moefold_backgammon.players import NetPlayer, Player
from moefold_backgammon.plays import plays

HINTS = 5
"""Plays that a hint shows if no number is typed."""

HELP = """\
  13/9 6/5   play, from/to for each man; also bar/22, 6/off, 8/4(2) for two men
  hint [n]   what the net prefers
  plays      every legal play
  board      the board again
  quit       leave the game"""

WON = {1: "the game", 2: "a gammon", 3: "a backgammon"}


def play_game(
    opponent: Player,
    *,
    hints: NetPlayer | None = None,
    seed: int,
    game: int = 0,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = print,
) -> int | None:
    """Plays one game between a person and a player.

    Args:
        opponent: who plays against the person.
        hints: whose preferences a hint shows; no hints if not said.
        seed: of the dice.
        game: number of the game, which with the seed decides the dice; the person begins the games
            with even numbers.
        read: asks for a line, given a prompt.
        write: shows lines.

    Returns:
        The points of the person: 1 to 3 won, -1 to -3 lost; None if the person left.
    """
    board = start()
    write("type help for what can be typed")
    for turn in count():
        dice = _roll(seed, game, turn)
        person = (turn + game) % 2 == 0
        finals, _ = plays(board[None], np.array([dice], np.int8))
        if person:
            write(draw(board))
        write(f"{'your roll' if person else opponent.name + ' rolls'}: {dice[0]} {dice[1]}")
        if not len(finals):
            write("  no man can move")
        elif person:
            taken = _ask(board, dice, finals, hints, read, write)
            if taken is None:
                return None
            board = finals[taken]
        else:
            after = finals[_choose(opponent, board, dice, finals)]
            write(f"  {play_text(board, after, dice)}")
            board = after
        points = int(winner_points(board[None])[0])
        if points:
            write(f"{'you win' if person else opponent.name + ' wins'} {WON[points]}")
            return points if person else -points
        board = swapped(board)
    raise AssertionError("a game has no last turn")


def show_hint(
    board: Int8[np.ndarray, "2 25"],
    dice: tuple[int, int],
    finals: Int8[np.ndarray, "plays 2 25"],
    hints: NetPlayer,
    *,
    most: int = HINTS,
) -> list[str]:
    """The plays that a net prefers as lines: place, play, value less that of the best.

    Args:
        board: [opponent, mover].
        dice: what was rolled.
        finals: the position after each play.
        hints: the net.
        most: how many lines.
    """
    values = hints.scores(finals)
    order = np.argsort(-values, kind="stable")[:most]
    lines = []
    for place, at in enumerate(order, start=1):
        less = values[at] - values[order[0]]
        lines.append(f"  {place:>2}  {play_text(board, finals[at], dice):<24} {less:+.2f}")
    return lines


def _ask(
    board: Int8[np.ndarray, "2 25"],
    dice: tuple[int, int],
    finals: Int8[np.ndarray, "plays 2 25"],
    hints: NetPlayer | None,
    read: Callable[[str], str],
    write: Callable[[str], None],
) -> int | None:
    """The play that the person types; None to leave."""
    while True:
        try:
            typed = read("> ").strip()
        except EOFError:
            return None
        match typed.lower().split():
            case []:
                continue
            case ["quit" | "exit" | "q"]:
                return None
            case ["help" | "?"]:
                write(HELP)
            case ["board"]:
                write(draw(board))
            case ["plays"]:
                write("\n".join(f"  {play_text(board, final, dice)}" for final in finals))
            case ["hint", *rest]:
                most = int(rest[0]) if rest and rest[0].isdigit() else HINTS
                lines = ["  there is no net to ask for a hint"]
                if hints is not None:
                    lines = show_hint(board, dice, finals, hints, most=most)
                write("\n".join(lines))
            case _:
                try:
                    return find_play(board, finals, typed)
                except ValueError as error:
                    write(f"  {error}")


def _choose(
    player: Player,
    board: Int8[np.ndarray, "2 25"],
    dice: tuple[int, int],
    finals: Int8[np.ndarray, "plays 2 25"],
) -> int:
    if len(finals) == 1:
        return 0
    lengths = np.array([len(finals)])
    return int(player.choose(board[None], np.array([dice], np.int8), finals, lengths)[0])


def _roll(seed: int, game: int, turn: int) -> tuple[int, int]:
    first, second = game_dice(seed, game, turn // BLOCK)[turn % BLOCK].tolist()
    return first, second


__all__ = ["play_game", "show_hint"]
