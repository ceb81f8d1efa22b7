"""``activations.zarr`` and ``samples.zarr``: plain zarr v3, readable by anyone while a run goes on.

An array grows along its first axis. A record's chunk is written first, and the array is extended over it only then, so
a reader (and whoever opens it after a kill) sees whole records only. Zarr's local store renames each file into place.
Chunks are written one at a time: zarr would write several at once, and go on with the others when one has failed.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from sedd_graph.errors import UserError
from sedd_graph.store.files import disk_faults, new_folder, part_folder
from sedd_graph.store.writer import Writer

__all__ = ["Activations", "TapSpec", "array_of", "document_lengths", "stores", "write_samples"]

Array = npt.NDArray[Any]
CHUNK = 2**18
"""Tokens per chunk of samples: 2 MiB."""


@dataclasses.dataclass(frozen=True)
class TapSpec:
    """How one saved port is kept: ``path`` is ``trunk/0/x``, ``chunk`` counts records per chunk."""

    path: str
    every: int
    dtype: str
    rows: int | None
    chunk: int


class Activations:
    """One array per saved port, [record, batch, axes...], beside ``step`` (int64): the training step of each record.

    ``value`` is never shorter than ``step``: the length of ``step`` is the number of whole records.
    """

    def __init__(self, path: Path, taps: Sequence[TapSpec], *, queue: int = 16, resume_step: int | None = None) -> None:
        """Open or make the store. ``resume_step`` drops what was recorded after that step of training."""
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
                self._forget_after(resume_step)
        self._handed_over = {name: marks.shape[0] for name, (_, marks) in self._arrays.items()}
        self._writer = Writer(depth=queue)

    def _forget_after(self, step: int) -> None:
        """Drop records of a time line that a resumed run will go through again."""
        for value, marks in self._arrays.values():
            keep = int((np.asarray(marks[:]) <= step).sum())
            marks.resize((keep,))  # first: what it counts must be there
            value.resize((keep, *value.shape[1:]))

    def due(self, step: int) -> list[str]:
        """Paths of the ports to be recorded at this step."""
        return [name for name, tap in self.taps.items() if step % tap.every == 0]

    def put(self, name: str, step: int, value: Array) -> None:
        """Hand over a copy of one record; waits only while the queue is full."""
        tap = self.taps[name]
        with np.errstate(over="ignore"):  # beyond float16 lies infinity, which is what is kept
            self._pending[name].append((step, np.array(value[: tap.rows], dtype=tap.dtype, order="C")))
        if (self._handed_over.get(name, 0) + len(self._pending[name])) % tap.chunk == 0:
            self._hand_over(name)

    def _hand_over(self, name: str) -> None:
        records, self._pending[name] = self._pending[name], []
        if records:
            self._handed_over[name] = self._handed_over.get(name, 0) + len(records)
            self._writer.put(lambda: self._append(name, records))

    def _append(self, name: str, records: list[tuple[int, Array]]) -> None:
        steps = np.asarray([s for s, _ in records], dtype=np.int64)
        values = np.stack([v for _, v in records])
        with disk_faults("activations.zarr", self.path):
            if name not in self._arrays:
                chunks = (self.taps[name].chunk, *values.shape[1:])
                group = self._root.require_group(name)
                # nothing is lost: without the other, the one that may be there has no whole record
                self._arrays[name] = (
                    group.create_array(
                        "value", shape=(0, *values.shape[1:]), chunks=chunks, dtype=values.dtype, overwrite=True
                    ),
                    group.create_array("step", shape=(0,), chunks=(1024,), dtype="int64", overwrite=True),
                )
            value, marks = self._arrays[name]
            if value.shape[1:] != values.shape[1:]:
                raise UserError(
                    f"activations.zarr/{name} holds records of shape {value.shape[1:]}, not {values.shape[1:]}"
                )
            count = marks.shape[0]  # what a kill left beyond this was not whole
            _extend(value, count, values)
            _extend(marks, count, steps)

    def flush(self) -> None:
        """Write all records that were put, chunks that are not full included."""
        for name in self.taps:
            self._hand_over(name)
        self._writer.flush()

    def close(self) -> None:
        """As :meth:`flush`, and stop."""
        try:
            for name in self.taps:
                self._hand_over(name)
        finally:
            self._writer.close()


def array_of(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """Return the array called ``name``. Raises :class:`UserError` if it is something else."""
    found = group[name]
    if not isinstance(found, zarr.Array):
        raise UserError(f"{group.store_path}: {name} is not an array")
    return found


def _extend(array: zarr.Array[Any], count: int, data: Array) -> None:
    """Write ``data`` behind the first ``count`` rows, then make the array so long: nobody sees a row before it is whole."""
    shape = (count + len(data), *array.shape[1:])
    metadata: Any = dataclasses.replace(array.metadata, shape=shape)
    wider = zarr.Array(zarr.AsyncArray(metadata, array.store_path))
    rows = array.chunks[0]
    for start in range(count - count % rows, shape[0], rows):
        first, last = max(start, count), min(start + rows, shape[0])
        wider[first:last] = data[first - count : last - count]
    array.resize(shape)


def document_lengths(tokens: npt.NDArray[np.int64], *, pad: int | None, end: int | None) -> npt.NDArray[np.int64]:
    """int64 [row] of int64 [row, position]: the tokens of a row up to and with its first separator ``end``, where it has
    one, and without the padding ``pad`` behind the text."""
    _, width = tokens.shape
    text = np.ones_like(tokens, dtype=np.bool_) if pad is None else tokens != pad
    lengths: npt.NDArray[np.int64] = width - np.argmax(text[:, ::-1], axis=1).astype(np.int64)
    lengths[~text.any(axis=1)] = 0
    if end is not None:
        ends = tokens == end
        first = np.where(ends.any(axis=1), np.argmax(ends, axis=1) + 1, width)
        np.minimum(lengths, first, out=lengths)
    return lengths


def stores(folder: Path, stem: str) -> list[Path]:
    """``stem.zarr``, ``stem-2.zarr``, ... in ``folder``: the newest first."""
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
    """Write one batch of samples: ``arrays`` [row, ...] by name (``tokens`` and ``lengths``, or ``x`` and ``nats``), ``text`` [row] and
    ``trajectory`` [step, row, position] where given; ``attributes`` hold sampler, seed and revision.

    Written under a temporary name and renamed; a path that exists gets a number. Returns the path written.
    """

    def fill(root: zarr.Group) -> None:
        for name, data in arrays.items():
            _whole(root, name, data, rows=max(1, CHUNK // max(1, math.prod(data.shape[1:]))))
        if trajectory is not None:
            _whole(root, "trajectory", trajectory, rows=1)
        if text is None:
            return
        with warnings.catch_warnings():
            # zarr warns that strings of variable length are not in the v3 specification yet
            warnings.simplefilter("ignore")
            words = root.create_array("text", shape=(len(text),), chunks=(max(1, len(text)),), dtype=str)
            words[:] = np.asarray(list(text), dtype=object)

    return _new_group(path, fill, attributes)


def _new_group(path: Path, fill: Callable[[zarr.Group], None], attributes: Mapping[str, Any]) -> Path:
    """A zarr group that is there whole or not at all. Returns where it went."""
    with disk_faults(path.name, path.parent), part_folder(path) as part:
        root = zarr.open_group(str(part), mode="a", zarr_format=3)  # "w" would make the folder anew, without its lock
        fill(root)
        root.attrs.update(dict(attributes))
        final = new_folder(path)
        final.rmdir()
        part.rename(final)
    return final


def _whole(root: zarr.Group, name: str, data: Array, *, rows: int) -> None:
    array = root.create_array(name, shape=(0, *data.shape[1:]), chunks=(rows, *data.shape[1:]), dtype=data.dtype)
    _extend(array, 0, data)
