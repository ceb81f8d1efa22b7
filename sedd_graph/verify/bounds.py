"""Refutation of declared Lipschitz bounds: how far a contraction moves at points near and far, with weights large and small.

What is measured is a lower bound on the Lipschitz constant, so that a number above the declared bound refutes it.

Axes: b rows, n elements of one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_graph.engine.fixed_point import Map
from sedd_graph.inverse import Contraction
from sedd_graph.verify.block_fixture import BlockFixture, batch_axis
from sedd_graph.verify.volume import difference, pullback

__all__ = ["Probe", "largest_slope"]

SCALES = 0.1, 1.0, 100.0
"""Standard deviations of the inputs."""
WEIGHTS = (1.0, 1.0), (30.0, 1.0), (1.0, 16.0), (1.0, -16.0)
"""For each set of weights, the factors on the noise that is added to them and on all of them after that."""
LENGTHS = 1, 3
"""Numbers of positions of a row."""
ROWS = 3
"""Number of rows, all different."""
POWERS = 4
"""Number of steps of the power iteration."""


class Probe(NamedTuple):
    """Largest ratio of distances found.

    Attributes:
        slope: How many times as far the outputs are apart as the points.
        where: The point, in words.
    """

    slope: float
    where: str


def largest_slope(fixture: BlockFixture, dtype: torch.dtype, d: Contraction) -> Probe:
    """Return the largest slope of a contraction's map that is found, a lower bound on its Lipschitz constant.

    At each point of a grid (:data:`SCALES`, :data:`WEIGHTS`, :data:`LENGTHS`) it is the spectral norm of the Jacobian of
    each row by power iteration, and the distance of the images of two points relative to their own. Points at which the map
    is not finite count only with the weights of an ordinary instance.

    Args:
        fixture: The block.
        dtype: Data type of the evaluation.
        d: The contraction.
    """
    found = [Probe(0.0, "")]
    for index, (spread, factor) in enumerate(WEIGHTS):
        layer = fixture.initialised(fixture.layer(dtype, index, spread=spread, factor=factor), fixture.inputs(dtype))
        for turn, scale in enumerate(SCALES):
            for length in LENGTHS[(index + turn) % 2 :][:1]:
                inputs = fixture.inputs(dtype, ROWS, length, seed=index)
                inputs = [x * scale if x.is_floating_point() else x for x in inputs]
                run = fixture.run(layer, None, inputs)
                run.forward()
                at = run.values[fixture.layout.index[d.target]]
                axis = batch_axis(fixture.layout.program.types[d.target])
                if axis != 0:
                    raise ValueError(f"{d.target} does not have the batch on axis 0")
                where = f"inputs {scale:g}-fold, weights {factor:g}-fold with noise {spread:g}-fold, length {length}"
                for slope in _slopes(run.remainder(d), at):
                    if slope == slope or index == 0:  # NaN refutes an ordinary instance
                        found.append(Probe(slope if slope == slope else float("inf"), where))
    return max(found)


@torch.no_grad()
def _slopes(g: Map, at: Tensor) -> Iterator[float]:
    """Yield the largest slope of the Jacobian at a row, and that between the points of two rows, in the map of one row."""
    rows = at.flatten(1)

    def function(x: Tensor) -> Tensor:
        return g(x.view_as(at)).flatten(1)

    v = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(rows.dtype)
    for _ in range(POWERS):
        v = v / v.norm(dim=1, keepdim=True).clamp(min=1e-30)
        v = pullback(function, rows, difference(function, rows, v).to(rows.dtype))
    # ||J^T J v|| for a unit v is at most the squared norm; taken with the norm of J v, which is exact
    v = v / v.norm(dim=1, keepdim=True).clamp(min=1e-30)
    yield float(difference(function, rows, v).norm(dim=1).max())
    others = rows.roll(1, 0)
    apart = (rows - others).norm(dim=1).clamp(min=1e-30)
    yield float(((function(rows) - function(others)).norm(dim=1) / apart).max())
