"""Progress reports of long loops, passed to an observer such as the progress bar of the command line.

Without an observer, reports are ignored. Every package can use this module, since it imports nothing else of the
project::

    with progress("sampling", total=steps, unit="step") as advance:
        for step in range(steps):
            ...
            advance()

    for batch in track(batches, "evaluating", unit="batch"):
        ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import Protocol, TypeVar

__all__ = ["Advance", "Observer", "observed", "progress", "track"]

T = TypeVar("T")


class Advance(Protocol):
    """Protocol of the function ``advance(count)``, which reports that ``count`` more units of work are done."""

    def __call__(self, count: int = 1) -> None: ...


class Observer(Protocol):
    """Protocol of progress displays, such as a progress bar. Tasks may be nested."""

    def task(self, name: str, *, total: int | None, done: int, unit: str) -> contextlib.AbstractContextManager[Advance]:
        """Return a context manager that displays one task while the ``with`` block runs.

        The value of ``with ... as advance`` is the function that the task calls to report progress.

        Args:
            name: Name of the task as a participle, such as "sampling".
            total: Units of work of the whole task; None if unknown.
            done: Units that are done at the start, as in a resumed run.
            unit: Name of one unit of work, in the singular.
        """


_observer: ContextVar[Observer | None] = ContextVar("progress_observer", default=None)


@contextlib.contextmanager
def observed(observer: Observer | None) -> Iterator[None]:
    """Context manager that sends the progress reports of all code within the ``with`` block to a progress display.

    Args:
        observer: The progress display; None: progress is not displayed.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


@contextlib.contextmanager
def progress(name: str, *, total: int | None = None, done: int = 0, unit: str = "step") -> Iterator[Advance]:
    """Context manager that reports a task to the observer while the ``with`` block runs.

    The value of ``with ... as advance`` is a function: ``advance(count)`` reports that ``count`` more units of work are
    done.

    Args:
        name: Name of the task as a participle, such as "sampling".
        total: Units of work of the whole task; None if unknown.
        done: Units that are done at the start, as in a resumed run.
        unit: Name of one unit of work, in the singular.
    """
    observer = _observer.get()
    if observer is None:
        yield lambda count=1: None
    else:
        with observer.task(name, total=total, done=done, unit=unit) as advance:
            yield advance


def track(items: Iterable[T], name: str, *, total: int | None = None, unit: str = "step") -> Iterator[T]:
    """Yield ``items`` and report one unit of work as done after each.

    Args:
        items: The iterable.
        name: Name of the task as a participle, such as "evaluating".
        total: Number of items; by default ``len(items)`` if it is defined, else unknown.
        unit: Name of one item, in the singular.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(name, total=total, unit=unit) as advance:
        for item in items:
            yield item
            advance()
