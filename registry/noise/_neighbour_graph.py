"""Graph of nearest neighbours among token embeddings: edges, transition rates and spectral gap.

The rates are symmetric and are scaled by Sinkhorn iteration, so that no token is left at a total rate above 1. The
graph is stored as lists of edges, never as an n x n table. Axes: n tokens, d embedding width, e edges, k neighbours.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from sedd_graph.errors import UserError

__all__ = ["Exchange", "components", "edges", "exchange", "nearest"]

CHUNK = 1024
"""Number of tokens whose distances to all other tokens are in memory at a time."""
SLOWEST = 1e-3
"""Smallest accepted spectral gap: the slowest mode must decay by a factor e within 1/SLOWEST transitions of each
token."""
DENSE = 256
"""Largest number of tokens whose eigenvalues are computed from a dense table."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Symmetric transition rates between neighbouring tokens, as a compressed sparse row (CSR) matrix.

    Attributes:
        start: int64 [n + 1], the offset of each token's first edge in ``to`` and ``rate``.
        to: int64 [e], the token that each edge leads to.
        rate: float64 [e], the transition rate of each edge.
        leave: float64 [n], the sum of the rates of each token's edges, at most 1.
        gap: Spectral gap, the decay rate of the slowest mode.
    """

    start: Tensor
    to: Tensor
    rate: Tensor
    leave: Tensor
    gap: float


def nearest(points: Tensor, k: int) -> Tensor:
    """Find the nearest neighbours of each point by Euclidean distance.

    Args:
        points: Points, float32 [n, d].
        k: Number of neighbours, less than n.

    Returns:
        Indices of the ``k`` nearest other points of each point, in no order, int64 [n, k].
    """
    n = len(points)
    length = points.square().sum(1)
    found = torch.empty(n, k, dtype=torch.int64)
    for first in range(0, n, CHUNK):
        part = torch.addmm(length, points[first : first + CHUNK], points.T, alpha=-2)
        rows = torch.arange(len(part))
        part[rows, first + rows] = math.inf
        found[first : first + CHUNK] = part.topk(k, largest=False, sorted=False).indices
    return found


def edges(near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the edges of A + A^T, where A is the 0/1 matrix of ``near`` [n, k]: from, to and weight (1 or 2), sorted."""
    n, k = near.shape
    a, b = torch.arange(n).repeat_interleave(k), near.reshape(-1)
    code, count = torch.unique(torch.cat([a * n + b, b * n + a]), return_counts=True)
    return code // n, code % n, count.double()


def components(n: int, a: Tensor, b: Tensor) -> int:
    """Count the connected components of the graph with edges ``a`` - ``b``."""
    label = torch.arange(n)
    while True:
        new = label.scatter_reduce(0, a, label[b], "amin")
        new = new[new]
        if torch.equal(new, label):
            return len(torch.unique(label))
        label = new


def _balance(n: int, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Return rates w_a w_b weight that sum to 1 for each token together with w_a^2 (Sinkhorn on A + A^T + I, which is symmetric).

    The diagonal gives total support, so the iteration converges for any graph; it absorbs the remaining error.
    """
    w = torch.ones(n, dtype=torch.float64)
    for _ in range(1000):
        total = w * (w + torch.zeros_like(w).index_add_(0, a, weight * w[b]))
        w = w / total.sqrt()
        if float((total - 1).abs().max()) < 1e-6:
            break
    return w[a] * w[b] * weight


def _gap(found: Exchange, leave: Tensor) -> float:
    """Return the spectral gap, by the implicitly restarted Lanczos method (ARPACK), to a relative error of 1e-6.

    The eigenvalues of the rate matrix are in [-2, 0]. The largest is that of the constant mode, 0, and the second is minus
    the gap. The constant mode is moved to -2, since a relative error of 0 cannot be reached. A gap that 200 restarts do not
    resolve is far below :data:`SLOWEST`, and counts as 0.
    """
    from scipy.sparse import csr_array, diags_array
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    n = len(leave)
    table = csr_array((found.rate.numpy(), found.to.numpy(), found.start.numpy()), shape=(n, n))
    table = table - diags_array(leave.numpy())
    if n <= DENSE:
        return -float(np.linalg.eigvalsh(table.toarray())[-2])
    moved = LinearOperator((n, n), matvec=lambda x: table @ x - 2 * x.mean(), dtype=np.float64)
    first = np.random.default_rng(0).standard_normal(n)
    try:
        (largest,) = eigsh(moved, k=1, which="LA", v0=first - first.mean(), ncv=64, maxiter=200, tol=1e-6, return_eigenvectors=False)  # fmt: skip
    except ArpackNoConvergence:
        return 0.0
    return -float(largest)


def exchange(points: Tensor, k: int, *, even: float) -> Exchange:
    """Build the graph of nearest neighbours and its symmetric transition rates.

    Sinkhorn iteration scales the rates so that no token is left at a total rate above 1.

    Args:
        points: Embeddings, float32 [n, d].
        k: Number of neighbours of each token; limited to n - 1.
        even: Share of transitions that go to a uniformly drawn token, in [0, 1]. The returned rates and gap do not
            include these transitions; the errors below depend on them.

    Returns:
        The graph with its rates and spectral gap; the gap is 0 for a disconnected graph.

    Raises:
        UserError: The graph is disconnected and ``even`` is 0, or the spectral gap of the process with the uniform
            transitions included is below 1e-3.
    """
    n = len(points)
    a, b, count = edges(nearest(points, min(k, n - 1)))
    pieces = components(n, a, b)
    if pieces > 1 and even == 0:
        raise UserError(
            f"neighbours: the graph of {k} nearest neighbours falls into {pieces:,} pieces, so the process has no unique prior; "
            "raise 'neighbours', or set 'even', the share of moves to a uniformly drawn token, to a value such as 0.01"
        )
    rate = _balance(n, a, b, count)
    leave = torch.zeros(n, dtype=torch.float64).index_add_(0, a, rate)
    start = torch.nn.functional.pad(torch.bincount(a, minlength=n).cumsum(0), (1, 0))
    found = Exchange(start, b, rate, leave, math.nan)
    gap = 0.0 if pieces > 1 else _gap(found, leave)
    if (1 - even) * gap + even < SLOWEST:
        moves = f"in {1 / gap:.3g} moves of each token" if gap > 0 else "in no number of moves that can be resolved"
        raise UserError(
            f"neighbours: the graph mixes too slowly: its slowest mode decays by a factor e {moves}, more than "
            f"{1 / SLOWEST:g}; raise 'neighbours' or 'even'"
        )
    return dataclasses.replace(found, gap=max(gap, 0.0))
