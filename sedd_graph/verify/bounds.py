"""Numerical test of declared Lipschitz bounds, with inputs and weights of several scales.

A contraction is a map with a Lipschitz constant below 1, which a derived inverse iterates to its fixed point. Measured
slopes are lower bounds on that constant, so a slope above the declared bound refutes the declaration.

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
    """Largest slope of a map that was found, a lower bound on its Lipschitz constant.

    Attributes:
        slope: Distance of two outputs divided by the distance of their inputs, or spectral norm of a Jacobian.
        where: Description of the inputs and weights at which it was found.
    """

    slope: float
    where: str


def largest_slope(fixture: BlockFixture, dtype: torch.dtype, d: Contraction) -> Probe:
    """Return the largest slope found of a contraction x -> r(x) / scale, a lower bound on its Lipschitz constant.

    Slopes are measured for all weights in :data:`WEIGHTS` and input scales in :data:`SCALES`, with the sequence lengths
    :data:`LENGTHS` in turn. They are the spectral norm of the Jacobian of each row, by power iteration, and the
    distance of the outputs of two rows divided by the distance of the rows. A slope of NaN counts as infinite with the
    first weights, those of an ordinary instance, and is ignored with the others.

    Args:
        fixture: The block that contains the contraction.
        dtype: Data type of the evaluation.
        d: The contraction, a step of the block's derived inverse that solves ``value = scale * x + r(x)`` for x.

    Raises:
        ValueError: The first axis of x is not the batch.
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
