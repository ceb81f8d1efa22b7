"""Writers of the zarr v3 stores ``activations.zarr`` and ``samples.zarr``, which can be read while a run writes them.

A record is the activation of one port at one training step. Arrays grow along their first axis, the index of the
record. The chunk of a record is written before the shape of the array is extended, so that readers see only complete
records, even after the writer was killed; zarr's local store writes each file atomically. Chunks are written one at a
time, since zarr would write several in parallel and continue with the others after a failure.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from sedd_graph.errors import UserError
from sedd_graph.store.files import disk_faults, new_folder, part_folder
from sedd_graph.store.writer import Writer

__all__ = ["Activations", "TapSpec", "array_of", "stores", "write_samples"]

Array = npt.NDArray[Any]
CHUNK = 2**18
"""Array elements per chunk of samples: 2 MiB of int64 tokens."""


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
        resume_step: Training step from which a run resumes; later records are deleted. None deletes nothing.

    Raises:
        UserError: The store contains something other than an array under one of the paths.
        EnvironmentFault: The disk cannot be written.
    """

    def __init__(self, path: Path, taps: Sequence[TapSpec], *, queue: int = 16, resume_step: int | None = None) -> None:
        self.taps = {t.path: t for t in taps}
        self.path = path
        self._arrays: dict[str, tuple[zarr.Array[Any], zarr.Array[Any]]] = {}
        self._pending: dict[str, list[tuple[int, Array]]] = {t.path: [] for t in taps}
        with disk_faults("activations.zarr", path):
            self._root = zarr.open_group(str(path), mode="a", zarr_format=3)
            for name in self.taps:
                if f"{name}/step" in self._root and f"{name}/value" in self._root:
                    self._arrays[name] = array_of(self._root, f"{name}/value"), array_of(self._root, f"{name}/step")
            if resume_step is not None:
                self._delete_after(resume_step)
        self._queued = {name: steps.shape[0] for name, (_, steps) in self._arrays.items()}
        self._writer = Writer(depth=queue)

    def _delete_after(self, step: int) -> None:
        """Delete the records after ``step``, which the resumed run will repeat."""
        for value, steps in self._arrays.values():
            count = int((np.asarray(steps[:]) <= step).sum())
            steps.resize((count,))  # before value, which must never be the shorter one
            value.resize((count, *value.shape[1:]))

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
                self._arrays[name] = (
                    _empty(group, "value", values, rows=self.taps[name].chunk),
                    _empty(group, "step", steps, rows=1024),
                )
            value, marks = self._arrays[name]
            if value.shape[1:] != values.shape[1:]:
                shapes = f"{value.shape[1:]}, not {values.shape[1:]}"
                raise UserError(f"activations.zarr/{name} holds records of shape {shapes}")
            count = marks.shape[0]  # rows beyond it are part of a record that was not written as a whole
            _extend(value, count, values)
            _extend(marks, count, steps)

    def flush(self) -> None:
        """Block until all records passed to :meth:`put` are written, those of incomplete chunks included."""
        self._enqueue(*self.taps)
        self._writer.flush()

    def close(self) -> None:
        """Write all records passed to :meth:`put`, then stop the background thread."""
        try:
            self._enqueue(*self.taps)
        finally:
            self._writer.close()


def array_of(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """Return an array of a zarr group.

    Args:
        group: The zarr group.
        name: Name of the array in the group.

    Raises:
        UserError: The group contains something other than an array under this name.
    """
    found = group[name]
    if not isinstance(found, zarr.Array):
        raise UserError(f"{group.store_path}: {name} is not an array")
    return found


def _extend(array: zarr.Array[Any], count: int, data: Array) -> None:
    """Write ``data`` after the first ``count`` rows, then extend the array, so that readers see only whole rows."""
    shape = (count + len(data), *array.shape[1:])
    metadata: Any = dataclasses.replace(array.metadata, shape=shape)
    wider = zarr.Array(zarr.AsyncArray(metadata, array.store_path))
    rows = array.chunks[0]
    for start in range(count - count % rows, shape[0], rows):
        first, last = max(start, count), min(start + rows, shape[0])
        wider[first:last] = data[first - count : last - count]
    array.resize(shape)


def stores(folder: Path, stem: str) -> list[Path]:
    """Return the paths of the zarr groups ``stem.zarr``, ``stem-2.zarr``, ... in a folder, newest first.

    Args:
        folder: The folder, such as a run folder.
        stem: Name of the groups without number and suffix, such as ``samples``.
    """
    found = []
    for path in folder.glob(f"{stem}*.zarr"):
        number = re.fullmatch(rf"{stem}(?:-(\d+))?\.zarr", path.name)
        if number and (path / "zarr.json").is_file():
            found.append((int(number[1] or 1), path))
    return [path for _, path in sorted(found, reverse=True)]


def write_samples(
    path: Path,
    arrays: Mapping[str, Array],
    *,
    text: Sequence[str] | None = None,
    trajectory: npt.NDArray[np.int32] | None = None,
    attributes: Mapping[str, Any],
) -> Path:
    """Write a batch of samples to a new zarr group, atomically.

    Args:
        path: Path of the group, such as ``samples.zarr``; if it exists, a number is added (``samples-2.zarr``).
        arrays: Arrays [row, ...] by name. For text: ``tokens`` int64 [row, position], and ``lengths`` int64 [row],
            the number of tokens of each row's text. For points: ``x`` float32 [row, ...], and ``nats`` float64 [row],
            -log p, if the process computes it.
        text: Text of each row; None for samples that are not text.
        trajectory: Tokens at the start (index 0) and after each sampler step, int32 [step, row, position]; None to
            store none.
        attributes: Attributes of the group as JSON values, such as sampler, seed and revision.

    Returns:
        The path of the new group.

    Raises:
        UserError: The path is invalid, such as a folder inside a file.
        EnvironmentFault: The disk cannot be written.
    """
    with disk_faults(path.name, path.parent), part_folder(path) as part:
        root = zarr.open_group(str(part), mode="a", zarr_format=3)  # "w" would replace the folder, which holds a lock
        for name, data in arrays.items():
            _extend(_empty(root, name, data, rows=max(1, CHUNK // max(1, math.prod(data.shape[1:])))), 0, data)
        if trajectory is not None:
            rows = max(
                1, CHUNK // max(1, math.prod(trajectory.shape[1:]))
            )  # a file for each step could be a million files
            _extend(_empty(root, "trajectory", trajectory, rows=rows), 0, trajectory)
        if text is not None:
            with warnings.catch_warnings():
                # zarr warns that strings of variable length are not in the v3 specification yet
                warnings.simplefilter("ignore")
                strings = root.create_array("text", shape=(len(text),), chunks=(max(1, len(text)),), dtype=str)
                strings[:] = np.asarray(list(text), dtype=object)
        root.attrs.update(dict(attributes))
        final = new_folder(path)
        final.rmdir()
        part.rename(final)
    return final


def _empty(group: zarr.Group, name: str, like: Array, *, rows: int) -> zarr.Array[Any]:
    """Create an array of no rows for rows such as those of ``like``, ``rows`` per chunk."""
    row = like.shape[1:]
    return group.create_array(name, shape=(0, *row), chunks=(rows, *row), dtype=like.dtype, overwrite=True)
