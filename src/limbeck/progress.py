"""What a long job shows while it runs: a live bar on a terminal, plain lines elsewhere, always on standard error.

::

    with make_progress("matrix", total=2441) as progress:
        progress.begin(0)                                   # or where a resumed job stands
        progress.update(120, {"loss": 12.3, "lr": 1e-4})    # floats are shortened, strings shown as they are
        progress.note("checkpoint written")                 # a line of its own
"""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

_silent = False


def silence() -> None:
    """Say nothing from now on: one of several processes speaks for all."""
    global _silent
    _silent = True


def console() -> Console:
    """Return a console on standard error: for tables and messages that are not a command's result."""
    return Console(stderr=True, quiet=_silent)


def say(message: str) -> None:
    """Print one line on standard error."""
    if not _silent:
        print(message, file=sys.stderr, flush=True)


class PlainProgress:
    """Plain lines: the first update, then at most one every `every` seconds, and the last.

    Args:
        title: What is being done.
        total: The count at which it is done; None where only the end will tell.
        every: Least seconds between two lines.
    """

    def __init__(self, title: str, total: int | None, *, every: float = 10.0):
        self.title, self.total, self.every = title, total, every
        self._last_line = float("-inf")
        self._start, self._started = 0, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the display; errors go through."""

    def begin(self, done: int) -> None:
        """Start the clock at `done`: the time left is judged by what comes after."""
        self._start, self._started = done, time.monotonic()

    def update(self, done: int, figures: Mapping[str, float | str] | None = None) -> None:
        """Tell that `done` of the total is done, with figures to show."""
        now = time.monotonic()
        if (self.total is None or done < self.total) and now - self._last_line < self.every:
            return
        self._last_line = now
        count = f"{done}" if self.total is None else f"{done}/{self.total}"
        parts = [f"{self.title} {count}", *_shown(figures or {}), self._time_left(done)]
        say("  ".join(part for part in parts if part))

    def note(self, message: str) -> None:
        """Print a line of its own."""
        say(message)

    def _time_left(self, done: int) -> str:
        if self.total is None or done <= self._start or done >= self.total:
            return ""
        seconds = (time.monotonic() - self._started) / (done - self._start) * (self.total - done)
        return f"{duration(seconds)} left"


class LiveProgress(PlainProgress):
    """One bar that redraws itself and stays as its last state; notes scroll by above it."""

    def __init__(self, title: str, total: int | None):
        super().__init__(title, total)
        self._console = console()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
        )
        self._task = self._bar.add_task(title, total=total, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Draw the last state; errors go through."""
        self._bar.stop()

    def begin(self, done: int) -> None:
        """Start the clock and the bar at `done`."""
        super().begin(done)
        self._bar.update(self._task, completed=done)

    def update(self, done: int, figures: Mapping[str, float | str] | None = None) -> None:
        """Move the bar to `done` and show figures behind it."""
        parts = [*_shown(figures or {}), self._time_left(done)]
        self._bar.update(self._task, completed=done, figures="  ".join(part for part in parts if part))

    def note(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(Text(message))


def make_progress(title: str, total: int | None, *, every: float = 10.0) -> PlainProgress:
    """Return the display that suits standard error: live on a terminal, else plain lines `every` so many seconds."""
    if sys.stderr.isatty() and not _silent:
        return LiveProgress(title, total)
    return PlainProgress(title, total, every=every)


def _shown(figures: Mapping[str, float | str]) -> list[str]:
    return [f"{name} {value if isinstance(value, str) else format(value, '.4g')}" for name, value in figures.items()]


def duration(seconds: float) -> str:
    """Write a time as people say it: ``"42s"``, ``"3m05s"``, ``"2h10m"``, ``"3d04h"``."""
    whole = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02d}{small_unit}"
    return f"{whole}s"
