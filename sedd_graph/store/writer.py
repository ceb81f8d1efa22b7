"""A bounded background writer: work is handed over and done in order by one thread; nothing is lost or torn.

``put`` waits when too much is on its way, so memory is bounded; a fault of the thread is raised at the next ``put``,
``flush`` or ``close``.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

__all__ = ["Writer"]

_STOP = object()


class Writer:
    """``with Writer() as writer: writer.put(function)``. ``depth`` bounds how many pieces of work may wait."""

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
            except BaseException as error:  # raised again in the caller's thread
                self._fault = error
            finally:
                self._queue.task_done()

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault  # again at every call: a record is missing from here on

    def put(self, work: Callable[[], None]) -> None:
        """Hand over work; waits while the queue is full."""
        if self._closed:
            raise RuntimeError("the writer is closed")
        self._check()
        self._queue.put(work)

    def flush(self) -> None:
        """Wait until all that was handed over is done."""
        self._queue.join()
        self._check()

    def close(self) -> None:
        """Finish what was handed over and stop."""
        if not self._closed:
            self._closed = True
            self._queue.put(_STOP)
            self._thread.join()
        self._check()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
