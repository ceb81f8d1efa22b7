"""Where metrics go: ``metrics.jsonl`` always; tensorboard, trackio and wandb where asked for, behind one small protocol.

The three are optional extras and are imported only when used. A tracker that fails in the middle of a run warns once
and is dropped: it never ends the run.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sedd_graph.errors import MissingExtraError
from sedd_graph.store.files import JsonLines

__all__ = ["Tracker", "Trackers", "open_trackers"]


class Tracker(Protocol):
    """What a tracker can do."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


class _Jsonl:
    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._lines.append({"step": step, **metrics})

    def text(self, step: int, name: str, text: str) -> None:
        self._lines.append({"step": step, name: text})

    def close(self) -> None:
        self._lines.close()


def _load(name: str, package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingExtraError(name, extra=name, purpose=f"the tracker {name!r}") from None


class _TensorBoard:
    def __init__(self, run: Path, name: str) -> None:
        _load("tensorboard", "tensorboard")
        self._writer = _load("tensorboard", "torch.utils.tensorboard").SummaryWriter(str(run / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, run: Path, name: str) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run / "trackio"))
        self._module = _load("trackio", "trackio")
        self._run = self._module.init(project=name, name=run.name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Wandb:
    def __init__(self, run: Path, name: str) -> None:
        module = _load("wandb", "wandb")
        self._run = module.init(project=name, name=run.name, dir=str(run), mode=os.environ.get("WANDB_MODE"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[Path, str], Tracker]] = {"tensorboard": _TensorBoard, "trackio": _Trackio, "wandb": _Wandb}


class Trackers:
    """All of a run's trackers as one."""

    def __init__(self, run: Path, name: str, kinds: Sequence[str]) -> None:
        self._all: list[Tracker] = [_Jsonl(run / "metrics.jsonl"), *(_KINDS[k](run, name) for k in kinds)]

    def _each(self, action: Callable[[Tracker], None]) -> None:
        action(self._all[0])  # metrics.jsonl: its faults are the run's own
        for tracker in self._all[1:]:
            try:
                action(tracker)
            except Exception as error:  # a stranger's service may fail in any way
                warnings.warn(
                    f"tracker {type(tracker).__name__.lstrip('_')} failed and is dropped: {error}", stacklevel=3
                )
                self._all.remove(tracker)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers by name at a training step."""
        self._each(lambda t: t.log(step, metrics))

    def text(self, step: int, name: str, text: str) -> None:
        """A text (a sample) at a training step."""
        self._each(lambda t: t.text(step, name, text))

    def close(self) -> None:
        self._each(lambda t: t.close())


def open_trackers(run: Path, name: str, kinds: Sequence[str]) -> Trackers:
    """Raises :class:`MissingExtraError` where a tracker's package is absent."""
    return Trackers(run, name, kinds)
