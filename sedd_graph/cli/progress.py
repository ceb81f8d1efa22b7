"""Progress display on the console: progress bars on a terminal, one plain line per long task elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sedd_graph.cli.terminal import printable, say
from sedd_graph.component.progress import Advance, Observer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["PATIENCE", "Bars", "Lines", "console_observer"]

PATIENCE = 10.0
"""Default number of seconds after which :class:`Lines` prints a line about a task."""
REPEAT = 900.0
"""Longest time between two lines of :class:`Lines` about a task, seconds."""
REFRESH = 0.1
"""Minimum number of seconds between two updates of a progress bar."""


def console_observer() -> Observer | None:
    """Return the progress display of this process: bars if standard output is a terminal, else plain lines.

    Under torchrun, returns None in all processes except rank 0.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        return None
    return Bars() if sys.stdout.isatty() else Lines(lambda line: say(line, sys.stderr))


class Bars:
    """Progress bars, one per running task, with rate and remaining time. A bar disappears when its task ends.

    Printed lines appear above the bars.

    Args:
        console: The rich console on which bars are drawn; standard output by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console, self._running = console, 0
        self._progress: Progress | None = None

    @contextlib.contextmanager
    def task(self, name: str, *, total: int | None, done: int, unit: str) -> Iterator[Advance]:
        """Return a context manager that shows a progress bar for one task while the ``with`` block runs.

        The value of ``with ... as advance`` is a function: ``advance(count)`` moves the bar by ``count`` units of work.

        Args:
            name: Name of the task, such as "sampling".
            total: Units of work of the whole task; None if unknown.
            done: Units at which the bar starts, as in a resumed run.
            unit: Name of one unit of work, in the singular.
        """
        bars = self._progress = self._progress or self._made()
        if not self._running:
            bars.start()
        self._running += 1
        number = bars.add_task(printable(name), total=total, completed=done, unit=printable(unit), before=done)
        waiting, shown = 0, time.monotonic()

        def advance(count: int = 1) -> None:
            nonlocal waiting, shown
            waiting += count
            if (now := time.monotonic()) - shown >= REFRESH:  # work may report far more often than a bar can show
                bars.advance(number, waiting)
                waiting, shown = 0, now

        try:
            yield advance
        finally:
            bars.remove_task(number)
            self._running -= 1
            if not self._running:
                bars.stop()

    def _made(self) -> Progress:
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn

        class Numbers(ProgressColumn):
            """Units done, of how many, rate and time left."""

            def render(self, task: Task) -> str:
                total = None if task.total is None else int(task.total)
                before, unit = task.fields["before"], task.fields["unit"]
                return _described(int(task.completed), before, total, task.elapsed or 0.0, unit)

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            Numbers(),
        )
        return Progress(*columns, console=self._console, transient=True)


class Lines:
    """Plain-text progress display: prints lines about each task that lasts longer than ``patience`` seconds.

    A task is due for another line when its running time is ten times that at its last line, or :data:`REPEAT`
    seconds after its last line if that is earlier. With the defaults, lines are due about 10, 100, 1000 and 1900 s
    after the start.

    Args:
        say: Function that prints a line.
        patience: Running time of a task at which its first line is due, seconds.
        clock: Function that returns the current time, seconds.
    """

    def __init__(
        self, say: Callable[[str], None], *, patience: float = PATIENCE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._patience, self._clock = say, patience, clock

    @contextlib.contextmanager
    def task(self, name: str, *, total: int | None, done: int, unit: str) -> Iterator[Advance]:
        """Return a context manager that prints lines about one task if it lasts longer than ``patience`` seconds.

        The value of ``with ... as advance`` is a function: ``advance(count)`` reports that ``count`` more units of work
        are done. A line that is due is printed by the next call of ``advance``, with the number of units done. If no
        line was printed that way, the end of the task prints one with its duration.

        Args:
            name: Name of the task, such as "sampling".
            total: Units of work of the whole task; None if unknown.
            done: Units that are done at the start, as in a resumed run.
            unit: Name of one unit of work, in the singular.
        """
        began, now, due = self._clock(), done, self._patience

        def advance(count: int = 1) -> None:
            nonlocal now, due
            now += count
            seconds = self._clock() - began
            if seconds > due:
                due = min(10 * seconds, seconds + REPEAT)
                self._say(f"{name}: {_described(now, done, total, seconds, unit)}")

        yield advance
        if due == self._patience and (seconds := self._clock() - began) > self._patience:
            self._say(f"{name}: done in {seconds:,.0f} s")


def _described(now: int, before: int, total: int | None, seconds: float, unit: str) -> str:
    """Return units done, of how many, rate and time left: ``40 of 120 steps, 3.9/s, 0:00:20 left``."""
    if now == 0 and total is None:
        return ""  # a task without units
    units = f"{unit}es" if unit.endswith("ch") else f"{unit}s"
    parts = [f"{now:,} {units}" if total is None else f"{now:,} of {total:,} {units}"]
    if seconds > 0 and now > before:
        rate = (now - before) / seconds
        parts.append(f"{rate:,.{0 if rate >= 100 else 1}f}/s")
        if total is not None:
            parts.append(f"{datetime.timedelta(seconds=round((total - now) / rate))} left")
    return ", ".join(parts)
