"""Activations along a sampling run: the values of chosen ports at each evaluation of the network, in a zarr group.

Axes: b rows that run together, r rows of one evaluation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from torch import Tensor

from sedd_graph.blueprint.schema import SaveSpec
from sedd_graph.component.axes import PortType
from sedd_graph.engine.network import Observer
from sedd_graph.engine.positionwise_suffix import length_dim
from sedd_graph.errors import UserError
from sedd_graph.runs.open import Run
from sedd_graph.runs.tape import Array
from sedd_graph.store.activations import Activations, TapSpec
from sedd_graph.store.durable import publish
from sedd_graph.store.files import disk_faults, numbered, part_folder

__all__ = ["Recorder", "observed", "recording"]

_INPUTS = {"tokens": "int32", "sigma": "float64"}
"""Inputs of the network that are saved with the activations, and their dtypes."""
QUEUE = 16
"""Largest number of records that wait to be written."""


class _Port(NamedTuple):
    """A saved port: its dotted path, its settings in one part of the run, and the index of its position axis."""

    name: str
    tap: TapSpec
    length: int | None


class Recorder:
    """Records the saved activations of a run, part by part.

    Args:
        run: The opened run folder, whose graph saves at least one port.
        folder: The zarr group, which exists.
        tape: Path of the tape.

    Attributes:
        tape: Path of the tape.
        path: Path of the group in the end; None before.
        records: Number of evaluations of the network so far.
    """

    def __init__(self, run: Run, folder: Path, tape: Path) -> None:
        self.tape, self.records = tape, 0
        self.path: Path | None = None
        self._run, self._folder, self._parts = run, folder, 0

    @contextlib.contextmanager
    def part(self, rows: Sequence[int], positions: int | None) -> Iterator[None]:
        """Context manager that records the evaluations of the network within it, as one part.

        Args:
            rows: Numbers of the rows that run together, b.
            positions: Largest number of positions of a row; None where rows have none.
        """
        name, network = str(self._parts), self._run.engine.network
        ports = [_port(name, *tap) for tap in self._run.report.graph.taps]
        taps = [port.tap for port in ports]
        taps += [TapSpec(f"{name}/{given}", 1, dtype, None, 1) for given, dtype in _INPUTS.items()]
        store = Activations(self._folder, taps, queue=QUEUE)
        self._parts += 1
        network.observer = self._observer(store, ports, len(rows), positions)
        try:
            yield
        finally:
            network.observer = None
            store.close()
        group = zarr.open_group(str(self._folder), mode="a", zarr_format=3)
        if name in group:
            group[name].attrs["rows"] = list(rows)

    def _observer(self, store: Activations, ports: Sequence[_Port], count: int, positions: int | None) -> Observer:
        part, first = str(self._parts - 1), self.records

        def observe(inputs: Mapping[str, Tensor], saved: Mapping[str, Tensor], rows: Tensor | None) -> None:
            at = np.arange(count) if rows is None else rows.cpu().numpy()
            number = self.records - first
            self.records += 1
            for port in ports:
                value = saved[port.name][: len(at)].detach().float().cpu().numpy()
                store.put(port.tap.path, number, _spread(value, at, count, port.length, positions, np.nan))
            for name in _INPUTS.keys() & inputs.keys():
                value = inputs[name][: len(at)].detach().cpu().numpy()
                dim, rest = (1, -1) if name == "tokens" else (None, np.nan)
                store.put(f"{part}/{name}", number, _spread(value, at, count, dim, positions, rest))

        return observe


def _port(part: str, path: str, save: SaveSpec, type_: PortType) -> _Port:
    tap = TapSpec(f"{part}/{path.replace('.', '/')}", 1, save.dtype, save.rows, save.chunk)
    try:
        return _Port(path, tap, length_dim(type_))
    except ValueError:  # an axis that depends on the length in another way
        return _Port(path, tap, None)


def _spread(value: Array, rows: Array, count: int, length: int | None, positions: int | None, rest: float) -> Array:
    """Return the values of some rows, [r, ...], in an array of all, [b, ...], with ``rest`` elsewhere."""
    shape = [count, *value.shape[1:]]
    if length is not None and positions is not None:
        shape[length] = max(positions, value.shape[length])
    found = np.full(shape, rest, dtype=value.dtype)
    index: tuple[Any, ...] = (rows, *(slice(size) for size in value.shape[1:]))
    found[index] = value
    return found


@contextlib.contextmanager
def recording(run: Run, tape: Path | None) -> Iterator[Recorder | None]:
    """Context manager that writes the saved activations of a run beside a tape, once the block has ended well.

    The zarr group is ``tape-activations.zarr`` for ``tape.zarr``; if it exists, a number is added.

    Args:
        run: The opened run folder.
        tape: Path of the tape, which :attr:`Recorder.tape` may change within the block; None: nothing is recorded.

    Raises:
        UserError: The graph saves no port, or the network was not evaluated as a whole.
    """
    if tape is None:
        yield None
        return
    if not run.report.graph.taps:
        raise UserError("--activations: the blueprint saves no port: name ports, such as --activations trunk/x")
    first = _beside(tape)
    with disk_faults(first.name, first.parent), part_folder(first) as part:
        zarr.open_group(str(part), mode="a", zarr_format=3)
        recorder = Recorder(run, part, tape)
        yield recorder
        if not recorder.records:
            raise UserError(
                "--activations: this model is evaluated in blocks or layer by layer, and not as a whole: its activations "
                "are not seen"
            )
        recorder.path = publish(part, numbered(_beside(recorder.tape)))


def _beside(tape: Path) -> Path:
    return tape.with_name(f"{tape.name.removesuffix('.zarr')}-activations.zarr")


@contextlib.contextmanager
def observed(recorder: Recorder | None, rows: Sequence[int], positions: int | None) -> Iterator[None]:
    """Context manager that records one part of a run, if there is a recorder; arguments are those of its ``part``."""
    with contextlib.nullcontext() if recorder is None else recorder.part(rows, positions):
        yield
