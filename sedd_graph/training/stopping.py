"""What ends a training run before its last step: signals, and the clock of its time limit."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

__all__ = ["STOPPING", "Clock", "Signals"]

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""Names of the signals that end training after the step with a checkpoint: Ctrl-C, and those that clusters send before
they take a machine back. Windows has no SIGHUP and no SIGUSR1."""


class Signals:
    """Context that records the first signal of :data:`STOPPING`, to end after the step.

    A second SIGINT raises KeyboardInterrupt, except while the last checkpoint is written (:attr:`writing`); other later
    signals change nothing, since a cluster may send several. Signals that the process was started to ignore, as SIGHUP by
    ``nohup``, are still ignored.
    """

    def __init__(self) -> None:
        self.caught: str | None = None
        self.writing = False
        """True while the last checkpoint is written, which no signal of :data:`STOPPING` interrupts."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in STOPPING if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on)
        return self

    def _on(self, number: int, frame: Any) -> None:
        if self.caught is not None and number == signal.SIGINT and not self.writing:
            raise KeyboardInterrupt
        self.caught = self.caught or signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Clock:
    """Training time of a run in seconds; time between :meth:`pause` and :meth:`go` is excluded."""

    def __init__(self, seconds: float) -> None:
        self._before, self._started = seconds, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def pause(self) -> None:
        self._before = self.seconds

    def go(self) -> None:
        self._started = time.perf_counter()
