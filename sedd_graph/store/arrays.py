"""``activations.zarr`` and ``samples.zarr``: plain zarr v3, readable by anyone while a run goes on.

An array grows along its first axis. A record's chunk is written first, and the array is extended over it only then, so
a reader (and whoever opens it after a kill) sees whole records only. Zarr's local store renames each file into place.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from sedd_graph.errors import UserError
from sedd_graph.store.files import disk_faults, new_folder
from sedd_graph.store.writer import Writer

__all__ = ["Activations", "TapSpec", "write_samples"]

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class TapSpec:
    """How one saved port is kept: ``path`` is ``trunk/0/x``, ``chunk`` counts records per chunk."""

    path: str
    every: int
    dtype: str
    rows: int | None
    chunk: int


class Activations:
    """One array per saved port, [record, batch, axes...], beside ``step`` (int64): the training step of each record."""

    def __init__(self, path: Path, taps: Sequence[TapSpec], *, queue: int = 16, resume_step: int | None = None) -> None:
        self.taps = {t.path: t for t in taps}
        self.path = path
        self._pending: dict[str, list[tuple[int, Array]]] = {t.path: [] for t in taps}
        with disk_faults("activations.zarr", path):
            self._root = zarr.open_group(str(path), mode="a", zarr_format=3)
        if resume_step is not None:
            self._forget_after(resume_step)
        self._writer = Writer(depth=queue)

    def _forget_after(self, step: int) -> None:
        """Drop records of a time line that a resumed run will go through again."""
        for name in self.taps:
            if name in self._root and "step" in self._root[name]:
                group = self._root[name]
                marks = np.asarray(group["step"][:])
                # a kill while the array was extended leaves marks of 0, which no training step has
                keep = int(((marks > 0) & (marks <= step)).cumprod().sum())
                group["value"].resize((keep, *group["value"].shape[1:]))
                group["step"].resize((keep,))

    def due(self, step: int) -> list[str]:
        """Paths of the ports to be recorded at this step."""
        return [name for name, tap in self.taps.items() if step % tap.every == 0]

    def put(self, name: str, step: int, value: Array) -> None:
        """Hand over one record; waits only while the queue is full."""
        tap = self.taps[name]
        self._pending[name].append((step, np.ascontiguousarray(value[: tap.rows]).astype(tap.dtype)))
        if len(self._pending[name]) >= tap.chunk:
            self._hand_over(name)

    def _hand_over(self, name: str) -> None:
        records, self._pending[name] = self._pending[name], []
        if records:
            self._writer.put(lambda: self._append(name, records))

    def _append(self, name: str, records: list[tuple[int, Array]]) -> None:
        steps = np.asarray([s for s, _ in records], dtype=np.int64)
        values = np.stack([v for _, v in records])
        with disk_faults("activations.zarr", self.path):
            if name not in self._root:
                group = self._root.require_group(name)
                group.create_array(
                    "value",
                    shape=(0, *values.shape[1:]),
                    chunks=(self.taps[name].chunk, *values.shape[1:]),
                    dtype=values.dtype,
                )
                group.create_array("step", shape=(0,), chunks=(1024,), dtype="int64")
            group = self._root[name]
            array, marks = group["value"], group["step"]
            if array.shape[1:] != values.shape[1:]:
                raise UserError(
                    f"activations.zarr/{name} holds records of shape {array.shape[1:]}, not {values.shape[1:]}"
                )
            count = marks.shape[0]  # what a kill left beyond this was not whole
            array.resize((count + len(values), *array.shape[1:]))
            array[count : count + len(values)] = values
            # ``step`` is extended last: its length is the number of whole records
            marks.resize((count + len(values),))
            marks[count:] = steps

    def flush(self) -> None:
        """Write all records that were put, chunks that are not full included."""
        for name in self.taps:
            self._hand_over(name)
        self._writer.flush()

    def close(self) -> None:
        for name in self.taps:
            self._hand_over(name)
        self._writer.close()


def write_samples(
    path: Path,
    tokens: npt.NDArray[np.int64],
    text: Sequence[str],
    *,
    lengths: npt.NDArray[np.int64] | None = None,
    trajectory: npt.NDArray[np.int64] | None = None,
    attributes: Mapping[str, Any],
) -> Path:
    """Keep one batch of samples: arrays ``tokens`` [row, position], ``lengths`` [row], ``text`` [row] and, where given,
    ``trajectory`` [step, row, position]; ``attributes`` tell sampler, seed and revision.

    Written under a temporary name and renamed; a path that exists gets a number. Returns where it went.
    """
    final = new_folder(path)
    part = final.with_name(f".{final.name}.part")
    with disk_faults(final.name, final.parent):
        shutil.rmtree(part, ignore_errors=True)
        try:
            root = zarr.open_group(str(part), mode="w", zarr_format=3)
            root.create_array("tokens", data=tokens)
            kept = lengths if lengths is not None else np.full(len(tokens), tokens.shape[1], dtype=np.int64)
            root.create_array("lengths", data=kept)
            with warnings.catch_warnings():
                # zarr warns that strings of variable length are not in the v3 specification yet
                warnings.simplefilter("ignore")
                words = root.create_array("text", shape=(len(text),), dtype=str)
                words[:] = np.asarray(list(text), dtype=object)
            if trajectory is not None:
                root.create_array("trajectory", data=trajectory, chunks=(1, *trajectory.shape[1:]))
            root.attrs.update(dict(attributes))
            final.rmdir()
            part.rename(final)
        except BaseException:
            if final.is_dir() and not any(final.iterdir()):
                final.rmdir()
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return final
