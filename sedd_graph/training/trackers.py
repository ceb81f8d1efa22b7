"""The trackers of a run: ``metrics.jsonl`` always, and those that ``train.trackers`` names."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sedd_graph.errors import MissingExtraError
from sedd_graph.store.files import JsonLines
from sedd_graph.training.interfaces import Tracker

__all__ = ["FINAL", "Trackers"]

FINAL = "final_"
"""Prefix of the names of a run's last evaluation."""


class _Jsonl:
    """``metrics.jsonl``: one JSON object per record."""

    def __init__(self, run: Path) -> None:
        self._lines = JsonLines(run / "metrics.jsonl")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._lines.append({"step": step, **metrics})

    def text(self, step: int, name: str, text: str) -> None:
        self._lines.append({"step": step, name: text})

    def resume(self, step: int) -> None:
        def stays(record: Mapping[str, Any]) -> bool:
            at = record.get("step")
            return isinstance(at, int) and at <= step and not any(key.startswith(FINAL) for key in record)

        self._lines.keep(stays)

    def close(self) -> None:
        self._lines.close()


def _present(package: str) -> bool:
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None  # no origin: a mere folder of that name


class Trackers:
    """All trackers of a run, ``metrics.jsonl`` among them.

    Args:
        run: Run folder.
        name: Name of the blueprint.
        others: Trackers beside ``metrics.jsonl``. One that raises is dropped with a warning.

    Raises:
        MissingExtraError: The package of a tracker is absent.
    """

    def __init__(self, run: Path, name: str, others: Sequence[Tracker]) -> None:
        for tracker in others:
            package = tracker.package
            if package is not None and not _present(package):
                raise MissingExtraError(package, extra=package, purpose=f"the tracker {package!r}")
        self._own = _Jsonl(run)
        self._others: list[Tracker] = []
        for tracker in others:
            try:
                tracker.start(run, name)
                self._others.append(tracker)
            except Exception as error:  # not logged in, no network, another version: anything
                _warn(tracker, "did not start", error)

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._others):
            try:
                action(tracker)
            except Exception as error:
                self._others.remove(tracker)
                _warn(tracker, "failed", error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers by name at a training step."""
        self._own.log(step, metrics)
        self._each(lambda t: t.log(step, metrics))

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text, such as a sample, at a training step."""
        self._own.text(step, name, text)
        self._each(lambda t: t.text(step, name, text))

    def resume(self, step: int) -> None:
        """Drop records after ``step``, which will be logged again."""
        self._own.resume(step)
        self._each(lambda t: t.resume(step))

    def close(self) -> None:
        """Close all trackers. Never raises: records are on disk, and the result of a run does not depend on trackers."""
        self._each(lambda t: t.close())
        with contextlib.suppress(OSError):
            self._own.close()


def _warn(tracker: Tracker, what: str, error: Exception) -> None:
    name = tracker.package or type(tracker).__qualname__
    first = (str(error).strip() or type(error).__name__).split("\n")[0]
    warnings.warn(f"the tracker {name!r} {what} and is dropped; training continues without it: {first}", stacklevel=4)
