"""Numerical test of declared Lipschitz bounds, with inputs and weights of several scales.

A contraction is a map with a Lipschitz constant below 1, which a derived inverse iterates to its fixed point. Measured
slopes are lower bounds on that constant, so a slope above the declared bound refutes the declaration.

Axes: b rows, n elements of one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_graph.engine.fixed_point import Map
from sedd_graph.inverse import Contraction
from sedd_graph.verify.block_fixture import JACOBIAN, BlockFixture, batch_axis
from sedd_graph.verify.volume import difference, jacobian, pullback

__all__ = ["Probe", "largest_slope"]

SCALES = 0.1, 1.0, 100.0
"""Standard deviations of the inputs."""
WEIGHTS = (1.0, 1.0), (30.0, 1.0), (1.0, 16.0), (1.0, -16.0)
"""For each set of weights, the factors on the noise that is added to them and on all of them after that."""
LENGTHS = 1, 3
"""Numbers of positions of a row."""
ROWS = 3
"""Number of rows, all different."""
STEPS, FEW = 32, 8
"""Numbers of steps of the Lanczos iteration, and of those where the whole Jacobian is computed at one row as well."""


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
    :data:`LENGTHS` in turn. They are the spectral norm of the Jacobian of each row, by Lanczos iteration, and the
    distance of the outputs of two rows divided by the distance of the rows. With each set of weights the spectral norm
    of the whole Jacobian is computed at one row, if that has at most
    :data:`~sedd_graph.verify.block_fixture.JACOBIAN` elements. A slope of NaN counts as infinite with the first
    weights, those of an ordinary instance, and is ignored with the others.

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
        whole = True
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
                n = at[0].numel()
                slopes = [*_slopes(run.remainder(d), at, FEW if n <= JACOBIAN else STEPS)]
                if whole and n <= JACOBIAN:
                    whole = False
                    copies = fixture.run(layer, None, fixture.row(inputs, 0, n))
                    copies.forward()
                    slopes.append(_norm(copies.remainder(d), copies.values[fixture.layout.index[d.target]]))
                for slope in slopes:
                    if slope == slope or index == 0:  # NaN refutes an ordinary instance
                        found.append(Probe(slope if slope == slope else float("inf"), where))
    return max(found)


@torch.no_grad()
def _slopes(g: Map, at: Tensor, steps: int) -> Iterator[float]:
    """Yield the largest slope of the Jacobian at a row, and that between the points of two rows, in the map of one row."""
    rows, function = at.flatten(1), _flat(g, at)
    v = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(rows.dtype)
    basis, images = list[Tensor](), list[Tensor]()
    for _ in range(min(steps, rows.shape[1])):
        for _ in range(2):  # full orthogonalisation, twice
            for other in basis:
                v = v - (v * other).sum(1, keepdim=True) * other
            v = v / v.norm(dim=1, keepdim=True).clamp(min=1e-30)
        basis.append(v)
        images.append(difference(function, rows, v).to(rows.dtype))
        v = pullback(function, rows, images[-1])
    # the norm of J on the span of the basis is at most that of J
    yield _largest(torch.stack(images, 2))
    others = rows.roll(1, 0)
    apart = (rows - others).norm(dim=1).clamp(min=1e-30)
    yield float(((function(rows) - function(others)).norm(dim=1) / apart).max())


@torch.no_grad()
def _norm(g: Map, at: Tensor) -> float:
    """Return the spectral norm of the Jacobian at a row, of which ``at`` has as many copies as elements."""
    return _largest(jacobian(_flat(g, at), at.flatten(1)[0]))


def _flat(g: Map, at: Tensor) -> Callable[[Tensor], Tensor]:
    """Return ``g`` as a function from rows [b, n] to rows [b, n]."""
    return lambda x: g(x.view_as(at)).flatten(1)


def _largest(matrices: Tensor) -> float:
    """Return the largest spectral norm of matrices; NaN if they are not finite, where LAPACK has none."""
    if not bool(matrices.isfinite().all()):
        return math.nan
    return float(torch.linalg.matrix_norm(matrices, 2).max())
