"""Verification of the log-determinant of a derived inverse, against that of the Jacobian by autograd.

Axes: b rows, n elements of one sequence (all tensors of one row, flattened and concatenated), k copies of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.log_det import forward_with_log_det
from sedd_graph.engine.regions import RegionModule
from sedd_graph.errors import UserError
from sedd_graph.verify.block_fixture import BATCH, JACOBIAN, BlockFixture, batch_axis, relative_error
from sedd_graph.verify.volume import estimated_log_det, jacobian
from sedd_graph.verify.worst import worst

__all__ = ["Finding", "Pair", "check_log_det", "dtype_name"]

LENGTHS = 1, 3
"""Numbers of positions per row at which log-determinants are compared."""


class Finding(NamedTuple):
    """Result of a check: True if the claim holds (None for a note), the measured value, and how it was measured."""

    holds: bool | None
    value: str
    how: str


class Pair(NamedTuple):
    """Log-determinant of the derivation beside that of the Jacobian, and the tolerance of their difference, nats."""

    found: float
    expected: float
    tolerance: float

    @property
    def excess(self) -> float:
        """Difference beyond the tolerance; infinite if one of the numbers is not finite."""
        return worst(abs(self.found - self.expected) - self.tolerance)


def check_log_det(fixture: BlockFixture, dtype: torch.dtype, tolerance: Callable[[torch.dtype], float]) -> Finding:
    """Compare the log-determinant of the derived inverse with that of the Jacobian, at several lengths.

    Args:
        fixture: The block.
        dtype: Data type of the evaluation.
        tolerance: Relative tolerance in a data type.
    """
    return _LogDets(fixture, tolerance).compare(dtype)


class _LogDets:
    """Compares log-determinants of one block."""

    def __init__(self, fixture: BlockFixture, tolerance: Callable[[torch.dtype], float]) -> None:
        self.fixture, self.layout, self._tolerance = fixture, fixture.layout, tolerance

    def compare(self, dtype: torch.dtype) -> Finding:
        program, region = self.layout.program, self.fixture.region
        if program.unmeasured:
            names = ", ".join(d.path for d in program.unmeasured)
            return Finding(None, "not run", f"{names} declares no log-determinant")
        if program.mixed_rows:
            return Finding(None, "not run", program.mixed_rows)
        layer = self.fixture.initialised(self.fixture.layer(dtype), self.fixture.inputs(dtype))
        types = [t for name in self.layout.streams if (t := region.inputs[name]).kind == "float"]
        sizes = {length: self.fixture.elements(types, length) for length in LENGTHS}
        lengths = [length for length, n in sizes.items() if n <= JACOBIAN]
        if not lengths and dtype != torch.float64:
            return Finding(
                None, "not run", f"{sizes[LENGTHS[0]]:,} numbers per side at one position, in {dtype_name(dtype)}"
            )
        pairs = [pair for length in lengths or LENGTHS[:1] for pair in self._pairs(layer, dtype, length, bool(lengths))]
        far = max(pairs, key=lambda pair: pair.excess)
        n = max(sizes[length] for length in lengths) if lengths else sizes[LENGTHS[0]]
        reference = (
            "slogdet of the Jacobian by autograd" if lengths else "estimated by Lanczos quadrature with 16 probes"
        )
        how = f"{reference}, {dtype_name(dtype)}, {BATCH} rows of {_either(lengths or LENGTHS[:1])}, up to {n:,} numbers per side"
        shown = f"{far.found:.8g} against {far.expected:.8g} nats"
        return Finding(far.excess <= 0, shown if lengths else f"{shown} (+-{far.tolerance:.2g})", how)

    def _pairs(self, layer: RegionModule, dtype: torch.dtype, length: int, exact: bool) -> Iterator[Pair]:
        """Yield the log-determinant of each row, in a batch and alone, with that of its Jacobian."""
        fixture, region = self.fixture, self.fixture.region
        inputs, key = fixture.inputs(dtype, BATCH, length), fixture.key()
        together = fixture.run(layer, key, inputs)
        values = forward_with_log_det(together, BATCH, exact_up_to=JACOBIAN)
        streams = [n for n, t in region.inputs.items() if n in self.layout.streams and t.kind == "float"]
        for row in range(BATCH):
            alone = fixture.run(layer, key[row : row + 1], fixture.row(inputs, row))
            value = forward_with_log_det(alone, 1, exact_up_to=JACOBIAN)
            self._independent(together, alone, row, dtype)
            function, x = self._function(layer, key, inputs, row, streams)
            if exact:
                expected, error = float(torch.linalg.slogdet(jacobian(function, x)).logabsdet), 0.0
            else:
                expected, error = estimated_log_det(function, x)
            tolerance = 10 * self._tolerance(value.dtype) * max(1.0, abs(expected)) + error
            yield Pair(float(value), expected, tolerance)
            yield Pair(float(values[row]), expected, tolerance)

    def _independent(self, together: LayerRun, alone: LayerRun, row: int, dtype: torch.dtype) -> None:
        """Verify that the outputs of a row in a batch are those of the row alone."""
        for name in self.fixture.moved:
            value = self.layout.outputs[name]
            axis = batch_axis(self.fixture.region.output_types[name])
            found = together.values[value] if axis is None else together.values[value].narrow(axis, row, 1)
            error = relative_error([found], [alone.values[value]])
            if not error <= self._tolerance(dtype):
                raise UserError(
                    f"the output {name!r} of a row depends on the other rows of the batch: it changes by {error:.1e} of its "
                    "size. A log-determinant of each row needs rows that are independent"
                )

    def _function(
        self, layer: RegionModule, key: Tensor, inputs: Sequence[Tensor], row: int, streams: Sequence[str]
    ) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Return the map from the streams of one row to the outputs that depend on them, and the row.

        Both are flat: the streams, and the outputs, of real numbers are concatenated, [k, n].
        """
        fixture, region = self.fixture, self.fixture.region
        own = dict(zip(region.inputs, fixture.row(inputs, row), strict=True))
        ins = {name: batch_axis(region.inputs[name]) or 0 for name in streams}
        sizes = [own[name].numel() for name in streams]
        moved = [name for name in fixture.moved if region.output_types[name].kind == "float"]

        def function(x: Tensor) -> Tensor:
            rows = dict(zip(region.inputs, fixture.row(list(own.values()), 0, len(x)), strict=True))
            for name, part in zip(streams, x.split(sizes, dim=1), strict=True):
                shape = own[name].movedim(ins[name], 0).shape[1:]
                rows[name] = part.reshape(len(x), *shape).movedim(0, ins[name])
            made = RegionModule.forward(layer, key[row : row + 1].expand(len(x)), *rows.values())
            outputs = dict(zip(region.outputs, made, strict=False))
            return torch.cat(
                [outputs[name].movedim(batch_axis(region.output_types[name]) or 0, 0).flatten(1) for name in moved], 1
            )

        return function, torch.cat([own[name].movedim(ins[name], 0).flatten() for name in streams])


def _either(lengths: Sequence[int]) -> str:
    return " and ".join(map(str, lengths))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a data type without its module, such as ``float32``."""
    return str(dtype).removeprefix("torch.")
