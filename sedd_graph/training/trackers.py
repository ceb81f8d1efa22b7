"""Log of a training run's metrics, in ``metrics.jsonl`` and by the trackers of ``train.trackers``."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sedd_graph.errors import MissingExtraError, SeddGraphError
from sedd_graph.store.files import free_name, sweep, write_bytes
from sedd_graph.store.json_lines import JsonLines
from sedd_graph.store.manifest import Entry, entry_of
from sedd_graph.training.checkpoint import METRICS
from sedd_graph.training.interfaces import Setting, Tracker

__all__ = ["FINAL", "Trackers"]

FINAL = "final_"
"""Prefix of metric names in the record of the evaluation after training."""


def _is_installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None  # without an origin it is only a folder of that name


class Trackers:
    """Log of a training run's metrics, which writes ``metrics.jsonl`` and passes each record to the trackers.

    Args:
        run: The run folder.
        name: Name of the blueprint.
        others: Trackers that also receive each record. A tracker that raises an exception is disabled with a warning.
        settings: Settings of the run, for the trackers (:meth:`~sedd_graph.training.interfaces.Tracker.describe`).

    Raises:
        MissingExtraError: The package of a tracker is not installed.
    """

    def __init__(
        self, run: Path, name: str, others: Sequence[Tracker], settings: Mapping[str, Setting] | None = None
    ) -> None:
        for tracker in others:
            package = tracker.package
            if package is not None and not _is_installed(package):
                raise MissingExtraError(package, extra=package, purpose=f"the tracker {package!r}")
        self._lines = JsonLines(run / METRICS)
        self._others: list[Tracker] = []
        for tracker in others:
            try:
                tracker.describe(dict(settings or {}))
                tracker.start(run, name)
                self._others.append(tracker)
            except Exception as error:  # services raise many classes: not logged in, no network, another version
                _warn(tracker, "did not start", error)

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._others):
            try:
                action(tracker)
            except Exception as error:
                self._others.remove(tracker)
                _warn(tracker, "failed", error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics at an optimizer step.

        Args:
            step: The optimizer step.
            metrics: Values by name.
        """
        self._lines.append({"step": step, **metrics})
        self._each(lambda t: t.log(step, metrics))

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text, such as a sample, at an optimizer step.

        Args:
            step: The optimizer step.
            name: Name of the text, such as ``sample``.
            text: The text.
        """
        self._lines.append({"step": step, name: text})
        self._each(lambda t: t.text(step, name, text))

    def resume(self, step: int, written: Entry | None, say: Callable[[str], None]) -> None:
        """Prepare the log for a run that resumes after ``step``.

        Delete the records of later steps, which will be logged again, the record of an evaluation after training, and
        lines that are not whole records. If records up to ``step`` are damaged, the file is copied first.

        Args:
            step: The step.
            written: Size and hash of ``metrics.jsonl`` when the checkpoint of ``step`` was written; None if unknown.
            say: Function that prints a line for the user.
        """
        path = self._lines.path
        sweep(path.parent, f".{path.name}.*.part")
        if written is not None and entry_of(path, size=written.bytes) != written:
            copy = free_name(path.with_name(f"damaged-{path.name}"))
            write_bytes(copy, path.read_bytes())
            lost = f"is not what was written up to step {step}: records are lost or changed"
            say(f"warning     {path} {lost}; the file as it was is now {copy.name}")
        odd = 0

        def remains(record: Mapping[str, Any]) -> bool:
            nonlocal odd
            at = record.get("step")
            odd += not isinstance(at, int)
            return isinstance(at, int) and at <= step and not any(key.startswith(FINAL) for key in record)

        if broken := self._lines.keep(remains) + self._lines.torn + odd:
            lines = f"{broken} line{'s' if broken > 1 else ''}"
            say(
                f"warning     {path}: {lines} without a whole record removed; records after step {step} are written again"
            )
        self._each(lambda t: t.resume(step))

    def close(self) -> None:
        """Close ``metrics.jsonl`` and all trackers. An exception of a tracker becomes a warning."""
        self._each(lambda t: t.close())
        with contextlib.suppress(OSError, SeddGraphError):  # the latter for what the disk refuses
            self._lines.close()


def _warn(tracker: Tracker, what: str, error: Exception) -> None:
    name = tracker.package or type(tracker).__qualname__
    first = (str(error).strip() or type(error).__name__).split("\n")[0]
    warnings.warn(f"the tracker {name!r} {what} and is disabled; training continues without it: {first}", stacklevel=4)
