"""Writer of the zarr store ``activations.zarr``, which can be read while a run writes it.

A record is the activation of one port at one training step. Records are on the disk when :meth:`Activations.flush`
returns. The activation of a record is written before its training step, which marks the record as complete, so that no
incomplete record is read while a run writes, nor after a kill. A power cut may leave damaged records after the last flush,
which a run deletes when it resumes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from sedd_graph.errors import UserError
from sedd_graph.inputs.confine import require_inside
from sedd_graph.store.arrays import array_of, empty, extend
from sedd_graph.store.durable import DeferringStore
from sedd_graph.store.files import disk_faults
from sedd_graph.store.recover import STEPS, copy_of, recover
from sedd_graph.store.writer import Writer

__all__ = ["Activations", "TapSpec"]

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class TapSpec:
    """Settings for saving the activations of one output port during training."""

    path: str
    """Path of the port's group in the store: its dotted path in the graph with slashes, such as ``trunk/0/x``."""
    every: int
    """Training steps between two records."""
    dtype: str
    """Name of the numpy dtype in which activations are stored, such as ``float16``."""
    rows: int | None
    """Number of batch rows per record, from the first; None for all rows."""
    chunk: int
    """Records per chunk of the zarr array."""


class Activations:
    """Writer of the zarr store of saved activations, which writes in a background thread.

    The group of a port has two arrays: ``value`` [record, b, ...], the activations (b: rows of the batch, then the
    other axes of the port), and ``step`` int64 [record], the training step of each record. The length of ``step`` is
    the number of complete records; ``value`` is never shorter.

    Args:
        path: The folder ``activations.zarr``, which is opened or created.
        taps: The output ports whose activations are saved, with their settings.
        queue: Largest number of writes that wait in memory.
        resume_step: Training step from which a run resumes; later records are deleted, and damaged ones are replaced
            by NaN (:func:`sedd_graph.store.recover.recover`). None changes nothing.
        say: Function that prints a line for the user.

    Raises:
        UserError: The store contains something other than an array under one of the paths, or a link out of the run
            folder, the parent of ``path`` (:func:`sedd_graph.inputs.confine.require_inside`).
        EnvironmentFault: The disk cannot be written.
    """

    def __init__(
        self,
        path: Path,
        taps: Sequence[TapSpec],
        *,
        queue: int = 16,
        resume_step: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        require_inside(path.parent, path.name, deep=True)
        self.taps = {t.path: t for t in taps}
        self.path = path
        self._arrays: dict[str, tuple[zarr.Array[Any], zarr.Array[Any]]] = {}
        self._pending: dict[str, list[tuple[int, Array]]] = {t.path: [] for t in taps}
        with disk_faults("activations.zarr", path):
            if resume_step is not None:
                for tap in taps:
                    recover(path, tap.path, every=tap.every, rows=tap.chunk, step=resume_step, say=say)
            self._store = DeferringStore(path, array="value")
            self._root = zarr.open_group(self._store, mode="a", zarr_format=3)
            for name in self.taps:
                if f"{name}/step" in self._root and f"{name}/value" in self._root:
                    self._arrays[name] = array_of(self._root, f"{name}/value"), array_of(self._root, f"{name}/step")
        self._queued = {name: steps.shape[0] for name, (_, steps) in self._arrays.items()}
        self._writer = Writer(depth=queue)

    def due(self, step: int) -> list[str]:
        """Return the paths of the output ports whose activations are saved at training step ``step``."""
        return [name for name, tap in self.taps.items() if step % tap.every == 0]

    def put(self, name: str, step: int, value: Array) -> None:
        """Add one record to the write queue; block only while the queue is full.

        Args:
            name: Path of the port, as in :attr:`TapSpec.path`.
            step: Training step of the record.
            value: Activations [b, ...] (b: rows of the batch), copied and converted to :attr:`TapSpec.dtype`.
        """
        tap = self.taps[name]
        with np.errstate(over="ignore"):  # values beyond the range of float16 become infinite
            self._pending[name].append((step, np.array(value[: tap.rows], dtype=tap.dtype, order="C")))
        if (self._queued.get(name, 0) + len(self._pending[name])) % tap.chunk == 0:
            self._enqueue(name)

    def _enqueue(self, *names: str) -> None:
        for name in names:
            records, self._pending[name] = self._pending[name], []
            if records:
                self._queued[name] = self._queued.get(name, 0) + len(records)
                self._writer.put(partial(self._append, name, records))

    def _append(self, name: str, records: list[tuple[int, Array]]) -> None:
        steps = np.asarray([s for s, _ in records], dtype=np.int64)
        values = np.stack([v for _, v in records])
        with disk_faults("activations.zarr", self.path):
            if name not in self._arrays:
                group = self._root.require_group(name)
                # if only one of the arrays exists, it has no whole record, so overwriting loses nothing
                value = empty(group, "value", values, rows=self.taps[name].chunk)
                self._arrays[name] = value, empty(group, "step", steps, rows=STEPS, attributes=copy_of(value))
            value, marks = self._arrays[name]
            if value.shape[1:] != values.shape[1:]:
                shapes = f"{value.shape[1:]}, not {values.shape[1:]}"
                raise UserError(f"activations.zarr/{name} holds records of shape {shapes}")
            count = marks.shape[0]  # rows beyond it are part of a record that was not written as a whole
            extend(value, count, values)
            extend(marks, count, steps)

    def flush(self) -> None:
        """Block until all records passed to :meth:`put` are on the disk, those of incomplete chunks included."""
        self._enqueue(*self.taps)
        self._writer.flush()
        self._sync()

    def close(self) -> None:
        """Write all records passed to :meth:`put` to the disk, then stop the background thread."""
        try:
            self._enqueue(*self.taps)
        finally:
            self._writer.close()
        self._sync()

    def _sync(self) -> None:
        """Flush the chunks written so far: only then, since a run that resumes deletes the records after its checkpoint."""
        with disk_faults("activations.zarr", self.path):
            self._store.flush()
