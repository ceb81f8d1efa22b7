"""Range guard of exact arithmetic: values on the grid must stay in the range in which sums are exact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sedd_graph.diffusion.grid import Grid
from sedd_graph.engine.host_number import LateNumbers, reads

__all__ = ["RangeGuard"]


class RangeGuard:
    """Check that the values of a block stayed in the range in which exact arithmetic is exact (:attr:`Grid.limit`).

    Args:
        grid: The grid; None in ordinary arithmetic, where nothing is checked.
        label: Name of the block.
    """

    def __init__(self, grid: Grid | None, label: str) -> None:
        self._grid, self._where = grid, f"block {label!r}"
        self._late = LateNumbers()

    def checked(self, outputs: Sequence[Tensor], largest: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs of the last layer if no value has left the range.

        On a CPU, a value out of range raises an error at once. On another device that would require waiting for the
        device; instead all outputs become NaN, and a call two calls later raises the error.

        Args:
            outputs: Outputs of the last layer.
            largest: For each layer, the largest magnitude of its values on the grid: scalar tensors, float32 [].

        Returns:
            The outputs; NaN if a value is out of range on a device other than a CPU.

        Raises:
            DivergedError: A value is out of range, in this call on a CPU, or two calls before on another device.
        """
        if self._grid is None or outputs[0].is_meta:
            return list(outputs)
        worst = torch.stack(list(largest)).max()
        if reads(worst.device):
            self._grid.check_range([worst], self._where)
            return list(outputs)
        for before in self._late.take():
            self._grid.require_range(before, self._where)
        self._late.put(worst)
        return self._grid.spoilt(outputs, worst)
