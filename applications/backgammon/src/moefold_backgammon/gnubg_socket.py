"""Debian's gnubg as a judge: a process of its own, asked one line at a time over a socket.

`external HOST:PORT` makes gnubg listen and answer lines. Such a question needs no more than 0.1 ms
of overhead, where a call of gnubg's own Python module costs 10 ms. It is asked

    board:...                                      for the best play, answered as text
    evaluation fibsboard board:... plies N ...     for five probabilities and an equity

Every question holds the whole position, so a gnubg that died is started again and asked again, and
nothing is lost but time. gnubg reads at most 256 characters and drops what follows the end of a
line, so that a second question must wait for the answer to the first.

Equities are without the cube, for money, gammons counting (no Jacoby rule).

Shapes: `n 2 25` men by decision, side and point: [opponent, player on roll].
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, final

import numpy as np
from jaxtyping import Int, Int8

from moefold_backgammon.fibs_board import write_line
from moefold_backgammon.notation import find_play

PROGRAMS = ("gnubg", "/usr/games/gnubg")
"""Where to look: on the path, and where Debian puts games."""

MOST_PLIES = 7
"""How deep gnubg can look; beyond 3 an answer takes minutes."""

START_SECONDS = 30.0
"""How long a gnubg may take until it listens; 0.2 s is usual."""

WATCH = 'read -r line || kill -9 "$1"'
"""A shell that ends gnubg when the pipe to it closes without a word: when we were killed, which
would leave a gnubg that listens for ever."""


class GnubgDied(RuntimeError):  # noqa: N818 - it is what happened
    """The process ended or does not answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What gnubg thinks of a position, for the player on roll.

    Attributes:
        probabilities: win, win a gammon or better, win a backgammon, lose a gammon or worse, lose a
            backgammon.
        equity: expected points without the cube.
    """

    probabilities: tuple[float, float, float, float, float]
    equity: float


@final
class Gnubg:
    """A gnubg process; a context manager, or to be closed by hand.

    Args:
        plies: how far it looks for the best play; 0 is one evaluation of each play.
        program: the gnubg to start; looked for if not said.
        timeout: seconds to wait for an answer, after which it counts as dead.

    Raises:
        RuntimeError: there is no gnubg, or it does not start to listen.
        ValueError: a depth below 0 or above 7.
    """

    def __init__(
        self, *, plies: int = 0, program: str | Path | None = None, timeout: float = 120.0
    ) -> None:
        _check_plies(plies)
        self.plies = plies
        self._program = find_gnubg(program)
        self._timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="gnubg-")
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._unread = b""
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The process; None if it has ended."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if running and self._process is not None else None

    def start(self) -> None:
        """Starts gnubg, ending the one before.

        Raises:
            GnubgDied: it does not listen; with what it printed.
            RuntimeError: it has been closed.
        """
        self.stop()
        home = Path(self._folder.name)
        if not home.is_dir():
            raise RuntimeError("this gnubg has been closed; make another")
        port = _free_port()
        commands = home / "commands"
        commands.write_text(
            "set jacoby off\n"
            f"set evaluation chequerplay evaluation plies {self.plies}\n"
            "set evaluation chequerplay evaluation cubeful off\n"
            f"external 127.0.0.1:{port}\n"
        )
        with (home / "printed").open("wb") as printed:
            self._process = subprocess.Popen(
                [self._program, "-t", "-q", "-r", "-c", str(commands)],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HOME": str(home)},  # where it would leave a folder .gnubg
                start_new_session=True,  # an interrupt from the keyboard is ours to handle
            )
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", WATCH, "sh", str(self._process.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._socket = self._connect(port)

    def stop(self) -> None:
        """Ends the process; `start` begins another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._watcher is not None:
            self._watcher.communicate(b"done\n")
            self._watcher = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._unread = b""

    def close(self) -> None:
        """Ends the process and removes its folder."""
        self.stop()
        self._folder.cleanup()

    def best_play(self, board: Int8[np.ndarray, "2 25"], dice: tuple[int, int]) -> str:
        """The play that gnubg would make, in its notation; empty if there is none.

        Args:
            board: [opponent, player on roll].
            dice: what the player rolled.

        Raises:
            GnubgDied: it ended, or does not answer.
            RuntimeError: it refuses the question.
        """
        return self._ask(write_line(board, dice)).strip()

    def evaluate(self, board: Int8[np.ndarray, "2 25"], *, plies: int | None = None) -> Evaluation:
        """The outcome that gnubg expects before the roll.

        Args:
            board: [opponent, player on roll].
            plies: how far it looks; as for plays if not said.

        Raises:
            GnubgDied: it ended, or does not answer.
            RuntimeError: it refuses the question.
            ValueError: a depth below 0 or above 7, to which it would say nothing.
        """
        depth = self.plies if plies is None else plies
        _check_plies(depth)
        answer = self._ask(f"evaluation fibsboard {write_line(board)} plies {depth} cubeless")
        try:
            win, gammon, backgammon, lose_gammon, lose_backgammon, equity = map(
                float, answer.split()
            )
        except ValueError:
            raise RuntimeError(f"gnubg answered {answer!r} instead of six numbers") from None
        return Evaluation(
            probabilities=(win, gammon, backgammon, lose_gammon, lose_backgammon), equity=equity
        )

    def _ask(self, question: str) -> str:
        if self._socket is None:
            raise GnubgDied("gnubg has been stopped; call start()")
        try:
            self._socket.sendall(question.encode() + b"\n")
            while b"\n" not in self._unread:
                received = self._socket.recv(4096)
                if not received:
                    raise ConnectionError("it closed the connection")
                self._unread += received
        except OSError as error:  # TimeoutError among them
            raise GnubgDied(
                f"gnubg did not answer {question!r}: {error}; it printed: {self._printed()!r}"
            ) from error
        answer, self._unread = self._unread.split(b"\n", 1)
        if answer.startswith(b"Error"):
            raise RuntimeError(f"gnubg refuses {question!r}: {answer.decode()}")
        return answer.decode()

    def _connect(self, port: int) -> socket.socket:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.pid is not None:
            try:
                return socket.create_connection(("127.0.0.1", port), timeout=self._timeout)
            except ConnectionRefusedError:
                time.sleep(0.02)
        printed = self._printed()
        self.stop()
        raise GnubgDied(
            f"{self._program} does not listen on port {port} of this machine; it printed: "
            f"{printed!r}"
        )

    def _printed(self) -> str:
        file = Path(self._folder.name) / "printed"
        return file.read_text(errors="replace")[-300:] if file.is_file() else ""


@final
class GnubgPlayer:
    """A player that plays what gnubg says; see `players.Player`.

    Args:
        gnubg: the process to ask, which the caller closes.
        restarts: how often a question that gnubg died of is asked again, each time of a new gnubg.
    """

    def __init__(self, gnubg: Gnubg, *, restarts: int = 2) -> None:
        self.name = f"gnubg-{gnubg.plies}-ply"
        self._gnubg = gnubg
        self._restarts = restarts

    def choose(
        self,
        before: Int8[np.ndarray, "n 2 25"],
        dice: Int8[np.ndarray, "n 2"],
        finals: Int8[np.ndarray, "m 2 25"],
        lengths: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " n"]:
        """The place of gnubg's play among the plays of each decision.

        Raises:
            GnubgDied: gnubg dies of the same question again and again.
            RuntimeError: gnubg plays what is not among the plays.
        """
        ends = np.cumsum(lengths)
        chosen = np.zeros(len(lengths), dtype=np.int64)
        for at in np.flatnonzero(lengths > 1):
            plays = finals[ends[at] - lengths[at] : ends[at]]
            first, second = (int(die) for die in dice[at])
            text = self._ask(before[at], (first, second))
            try:
                chosen[at] = find_play(before[at], plays, text)
            except ValueError as error:
                raise RuntimeError(
                    f"gnubg played {text!r} with {first} and {second}: {error}"
                ) from error
        return chosen

    def _ask(self, board: Int8[np.ndarray, "2 25"], dice: tuple[int, int]) -> str:
        for _ in range(self._restarts):
            try:
                return self._gnubg.best_play(board, dice)
            except GnubgDied:
                self._gnubg.start()
        return self._gnubg.best_play(board, dice)


def find_gnubg(program: str | Path | None = None) -> str:
    """The gnubg to start.

    Raises:
        RuntimeError: there is none; says how to install it.
    """
    named = PROGRAMS if program is None else (str(program),)
    for name in named:
        found = shutil.which(name)
        if found is not None:
            return found
    raise RuntimeError(
        f"there is no program {' or '.join(named)}; install GNU Backgammon (on Debian: "
        f"apt-get install gnubg), or say where it is"
    )


def _check_plies(plies: int) -> None:
    if not 0 <= plies <= MOST_PLIES:
        raise ValueError(f"gnubg looks 0 to {MOST_PLIES} plies deep, not {plies}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


__all__ = ["Evaluation", "Gnubg", "GnubgDied", "GnubgPlayer", "find_gnubg"]
