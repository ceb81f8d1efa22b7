"""Where metrics go: ``metrics.jsonl`` always; tensorboard, trackio and wandb where asked for, behind one small protocol.

The three are optional extras and are imported only when used. A package that is not there is said before training
starts. Any other fault of a tracker, at its start, in the middle or at its end, is warned of once and the tracker is
dropped: a stranger's service never ends a run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sedd_graph.errors import MissingExtraError
from sedd_graph.store.files import JsonLines

__all__ = ["FINAL", "Tracker", "Trackers", "open_trackers"]

FINAL = "final_"
"""How the names of a run's last evaluation begin."""


class Tracker(Protocol):
    """What a tracker can do."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers by name."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text by name."""

    def resume(self, step: int) -> None:
        """Training goes on from ``step``: what was logged after it will be logged again."""

    def close(self) -> None:
        """Everything is on its way when this returns."""


class _Jsonl(Tracker):
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


class _TensorBoard(Tracker):
    def __init__(self, run: Path, name: str) -> None:
        self._folder = str(run / "tensorboard")
        self._open(None)

    def _open(self, purge_step: int | None) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(self._folder, purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def resume(self, step: int) -> None:
        self._writer.close()
        self._open(step + 1)  # tensorboard passes over older events from this step on

    def close(self) -> None:
        self._writer.close()


class _Trackio(Tracker):
    """Into trackio's own place (``TRACKIO_DIR``): one dashboard shows the runs of a name side by side."""

    def __init__(self, run: Path, name: str) -> None:
        self._module = importlib.import_module("trackio")
        self._run = self._module.init(project=name, name=run.name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._module.finish()


class _Wandb(Tracker):
    """As wandb is set up (``wandb login``, ``WANDB_MODE``, ...); its files lie in the run folder."""

    def __init__(self, run: Path, name: str) -> None:
        self._run = importlib.import_module("wandb").init(project=name, name=run.name, dir=str(run))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[Path, str], Tracker]] = {"tensorboard": _TensorBoard, "trackio": _Trackio, "wandb": _Wandb}


class Trackers:
    """All of a run's trackers as one. Faults of ``metrics.jsonl`` are the run's own, those of the others are not."""

    def __init__(self, run: Path, name: str, kinds: Sequence[str]) -> None:
        for kind in kinds:  # each is its package's name, and its extra's
            if not _present(kind):
                raise MissingExtraError(kind, extra=kind, purpose=f"the tracker {kind!r}")
        self._own = _Jsonl(run)
        self._others: dict[str, Tracker] = {}
        for kind in kinds:
            try:
                self._others[kind] = _KINDS[kind](run, name)
            except Exception as error:  # not logged in, no network, another version: anything
                _warn(kind, "did not start", error)

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for kind, tracker in list(self._others.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._others[kind]
                _warn(kind, "failed", error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers by name at a training step."""
        self._own.log(step, metrics)
        self._each(lambda t: t.log(step, metrics))

    def text(self, step: int, name: str, text: str) -> None:
        """A text (a sample) at a training step."""
        self._own.text(step, name, text)
        self._each(lambda t: t.text(step, name, text))

    def resume(self, step: int) -> None:
        """Training goes on from ``step``: drop what was logged after it, which will be logged again."""
        self._own.resume(step)
        self._each(lambda t: t.resume(step))

    def close(self) -> None:
        """Never raises: what has been logged is on disk, and a run's result does not hang on its trackers."""
        self._each(lambda t: t.close())
        with contextlib.suppress(OSError):
            self._own.close()


def _warn(kind: str, what: str, error: Exception) -> None:
    first = (str(error).strip() or type(error).__name__).split("\n")[0]
    warnings.warn(f"the tracker {kind!r} {what} and is dropped; training goes on without it: {first}", stacklevel=4)


def open_trackers(run: Path, name: str, kinds: Sequence[str]) -> Trackers:
    """``metrics.jsonl`` in the folder ``run`` and the trackers ``kinds``, where the run is called ``name``.

    Raises :class:`MissingExtraError` where a tracker's package is absent; a tracker that fails otherwise is warned of.
    """
    return Trackers(run, name, kinds)
