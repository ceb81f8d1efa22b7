"""Progress of long work: loops report their steps, and an observer such as the progress bar of the command line shows them.

Without an observer nothing is shown. Every package may report, since this module imports nothing else of the project::

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
    """Function that reports ``count`` further units of work as done."""

    def __call__(self, count: int = 1) -> None: ...


class Observer(Protocol):
    """Protocol of classes that show the progress of tasks, which may be nested."""

    def task(self, name: str, *, total: int | None, done: int, unit: str) -> contextlib.AbstractContextManager[Advance]:
        """Return a context manager that shows a task from its beginning to its end. Arguments are as in :func:`progress`."""


_observer: ContextVar[Observer | None] = ContextVar("progress_observer", default=None)


@contextlib.contextmanager
def observed(observer: Observer | None) -> Iterator[None]:
    """Send all progress within the context to ``observer``; None shows nothing."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


@contextlib.contextmanager
def progress(name: str, *, total: int | None = None, done: int = 0, unit: str = "step") -> Iterator[Advance]:
    """Report a task until the context ends; the value of the context is the function that reports advances.

    Args:
        name: Name of the task as a participle, such as "sampling".
        total: Units of work of the whole task; None if unknown.
        done: Units that were done before, such as by the run that is resumed.
        unit: Name of one unit, in the singular.
    """
    observer = _observer.get()
    if observer is None:
        yield lambda count=1: None
    else:
        with observer.task(name, total=total, done=done, unit=unit) as advance:
            yield advance


def track(items: Iterable[T], name: str, *, total: int | None = None, unit: str = "step") -> Iterator[T]:
    """Iterate over ``items`` and report each as one unit of work when the next is requested.

    Arguments are as in :func:`progress`; ``total`` is by default the length of ``items`` if they have one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(name, total=total, unit=unit) as advance:
        for item in items:
            yield item
            advance()
