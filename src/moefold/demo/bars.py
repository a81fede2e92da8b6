"""Progress of a long job on the terminal: the whole with the time left, and the step at hand."""

from types import TracebackType
from typing import final

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@final
class Bars:
    """Two bars that advance together, in whatever unit the work is counted in.

    Where the output is not a terminal nothing is drawn, and `say` prints its lines one by one.

    Args:
        console: where to draw.
        title: what the whole is called.
    """

    def __init__(self, console: Console, title: str = "everything") -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # Steps of one bar take seconds; estimate from the last few minutes, not seconds.
            speed_estimate_period=240,
        )
        self._whole = self._progress.add_task(title, total=None)
        self._step = self._progress.add_task("", total=None, visible=False)

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def expect(self, total: float) -> None:
        """Say how much work there is in all."""
        self._progress.update(self._whole, total=total)

    def step(self, what: str, total: float | None = None) -> None:
        """Begin a step, of that much work if it is part of the whole."""
        self._progress.reset(self._step, total=total, description=what, visible=True)

    def advance(self, work: float) -> None:
        """Work done since the last call."""
        self._progress.advance(self._step, work)
        self._progress.advance(self._whole, work)

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
