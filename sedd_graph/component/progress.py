"""Progress of long work: a loop reports its steps here, and an observer, such as the command line's bar, shows them.

Without an observer nothing is shown. This module imports neither torch nor an interface, so every room may report::

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
    """A function that reports ``count`` further units of work as done."""

    def __call__(self, count: int = 1) -> None: ...


class Observer(Protocol):
    """Shows the progress of tasks; tasks may be nested."""

    def task(self, name: str, *, total: int | None, done: int, unit: str) -> contextlib.AbstractContextManager[Advance]:
        """Show a task until the context ends. The arguments are those of :func:`progress`."""


_observer: ContextVar[Observer | None] = ContextVar("progress_observer", default=None)


@contextlib.contextmanager
def observed(observer: Observer | None) -> Iterator[None]:
    """Report all progress within the context to ``observer``; None shows nothing."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


@contextlib.contextmanager
def progress(name: str, *, total: int | None = None, done: int = 0, unit: str = "step") -> Iterator[Advance]:
    """Report a task; the context's value is the function that reports its advance.

    Args:
        name: The work as a participle, such as "sampling".
        total: Units of the whole task; None where the number is not known.
        done: Units that were done before, as by a run that is resumed.
        unit: One unit of work, in the singular.
    """
    observer = _observer.get()
    if observer is None:
        yield lambda count=1: None
    else:
        with observer.task(name, total=total, done=done, unit=unit) as advance:
            yield advance


def track(items: Iterable[T], name: str, *, total: int | None = None, unit: str = "step") -> Iterator[T]:
    """Iterate over ``items`` and report each as one unit when the next is asked for. Arguments as of :func:`progress`.

    ``total`` is the length of ``items`` where they have one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(name, total=total, unit=unit) as advance:
        for item in items:
            yield item
            advance()
