"""Progress reaches the observer that is set, and costs nothing without one."""

import contextlib
from collections.abc import Iterator

import pytest

from sedd_graph.component.progress import Advance, observed, progress, track


class Recorder:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[object] = []

    @contextlib.contextmanager
    def task(self, name: str, *, total: int | None, done: int, unit: str) -> Iterator[Advance]:
        self.events.append((name, total, done, unit))
        try:
            yield lambda count=1: self.events.append(count)
        finally:
            self.events.append(f"end of {name}")


def test_tasks_are_reported_and_nested() -> None:
    recorder = Recorder()
    with observed(recorder), progress("training", total=5, done=3) as advance:
        advance()
        assert list(track("ab", "evaluating", unit="batch")) == ["a", "b"]
        advance(2)
    assert recorder.events == [
        ("training", 5, 3, "step"),
        1,
        ("evaluating", 2, 0, "batch"),
        1,
        1,
        "end of evaluating",
        2,
        "end of training",
    ]


def test_a_task_ends_with_an_error_or_an_early_exit() -> None:
    recorder = Recorder()
    with observed(recorder):
        with pytest.raises(KeyError), progress("proving"):
            raise KeyError
        for _ in track(iter("abc"), "tokenising", unit="document"):
            break
    assert recorder.events == [
        ("proving", None, 0, "step"),
        "end of proving",
        ("tokenising", None, 0, "document"),
        "end of tokenising",
    ]


def test_nothing_is_reported_without_an_observer() -> None:
    recorder = Recorder()
    with observed(recorder):
        pass
    with observed(None), progress("training", total=2) as advance:
        advance()
    assert list(track(range(3), "sampling")) == [0, 1, 2]
    assert recorder.events == []
