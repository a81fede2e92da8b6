"""A player of ours behind a socket, as gnubg's external player.

gnubg connects to a player that listens and sends it every position it must act in:

    set player 0 external localhost:PORT

It sends a `board:` line and a zero byte, and takes one line for an answer: a play in text, which
may be empty if no man can move, `roll` before the dice, and `take` to a double. A play that it does
not understand counts as none, *without a word*; so a position that cannot be answered is answered
by a line that begins with "Error: ", which stops the game and is shown.

Our players value plays only. They never double, and take every double; switch the cube off
(`set cube use off`) for a fair game.
"""

import socketserver
import threading
from types import TracebackType
from typing import Self, final

import numpy as np

from moefold_backgammon.fibs_board import read_line
from moefold_backgammon.notation import play_text
from moefold_backgammon.players import Player
from moefold_backgammon.plays import plays


@final
class ExternalPlayer:
    """A server that lets a player of ours play in gnubg; a context manager.

    It answers any number of connections, so that gnubg may have it on both sides.

    Args:
        player: who plays.
        host: the address to listen on; only this machine can reach the one that is set.
        port: the port to listen on; any that is free if 0.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, player: Player, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server = _Server((host, port), player)
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """Host and port, as gnubg wants them after `set player 0 external`."""
        host, port = self._server.server_address[:2]
        return f"{host}:{port}"

    def serve(self) -> None:
        """Answers until interrupted."""
        try:
            self._server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            self._server.server_close()

    def __enter__(self) -> Self:
        """Answers in the background."""
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._thread is not None:
            self._thread.join()


def answer(line: str, player: Player) -> str:
    """What to say to a line of gnubg, without the end of the line.

    Args:
        line: a `board:` line.
        player: who plays.
    """
    if not line.startswith("board:"):
        return f"Error: {line[:60]!r} is not understood; send a line that begins with board:"
    try:
        asked = read_line(line)
        if asked.doubled:
            return "take"
        if asked.dice is None:
            return "roll"
        return _play(asked.board, asked.dice, player)
    except (ValueError, RuntimeError) as error:
        return f"Error: {' '.join(str(error).split())}"


def _play(board: np.ndarray, dice: tuple[int, int], player: Player) -> str:
    before, rolled = board[None], np.array([dice], dtype=np.int8)
    finals, lengths = plays(before, rolled)
    if not len(finals):
        return ""
    chosen = int(player.choose(before, rolled, finals, lengths)[0])
    return play_text(board, finals[chosen], dice)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], player: Player) -> None:
        super().__init__(address, _Connection)
        self._player = player
        self._thinking = threading.Lock()  # a player answers one question at a time

    def answer(self, line: str) -> str:
        with self._thinking:
            return answer(line, self._player)


class _Connection(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        try:
            for received in self.rfile:
                line = received.decode("latin-1").strip("\0\r\n\t ")  # gnubg sends a zero byte too
                if line in ("exit", "quit"):
                    return
                if line:
                    self.wfile.write(self.server.answer(line).encode() + b"\n")
        except ConnectionError:
            return  # gnubg is gone, which ends the game for it and not for us


__all__ = ["ExternalPlayer", "answer"]
