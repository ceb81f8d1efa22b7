"""Background thread that runs functions one after another, from a queue of bounded length."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

__all__ = ["Writer"]

_STOP = object()


class Writer:
    """Background thread that runs functions in the order in which :meth:`put` adds them to a queue.

    >>> with Writer() as writer:
    ...     writer.put(function)

    If a function raises an exception, the functions after it are not run, and each later :meth:`put`, :meth:`flush` or
    :meth:`close` raises the exception.

    Args:
        depth: Largest number of functions that wait in the queue.
    """

    def __init__(self, *, depth: int = 16) -> None:
        self._queue: queue.Queue[object] = queue.Queue(maxsize=depth)
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sedd_graph-writer", daemon=True)
        self._closed = False
        self._thread.start()

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            try:
                if work is _STOP:
                    return
                if self._fault is None:
                    work()  # type: ignore[operator]
            except BaseException as error:  # raised in the caller's thread
                self._fault = error
            finally:
                self._queue.task_done()

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault  # at every call, since a record is missing from here on

    def put(self, work: Callable[[], None]) -> None:
        """Add a function to the queue; block while the queue is full.

        Args:
            work: Function without arguments.

        Raises:
            RuntimeError: The writer is closed.
        """
        if self._closed:
            raise RuntimeError("the writer is closed")
        self._check()
        self._queue.put(work)

    def flush(self) -> None:
        """Block until all functions in the queue have run."""
        self._queue.join()
        self._check()

    def close(self) -> None:
        """Run the remaining functions in the queue, then stop the thread."""
        if not self._closed:
            self._closed = True
            self._queue.put(_STOP)
            self._thread.join()
        self._check()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
