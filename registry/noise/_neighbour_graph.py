"""The graph of nearest neighbours among embeddings: who is near whom, how they exchange, and how fast that mixes.

All of it is sparse: lists of edges, never a table of tokens x tokens. Axes: n tokens, d numbers of an embedding, e edges.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from sedd_graph.errors import UserError

__all__ = ["Exchange", "exchange", "nearest"]

CHUNK = 1024
"""Tokens whose distances to all others are held at a time."""
SLOWEST = 1e-3
"""A graph whose slowest mode needs more than 1/SLOWEST moves of each token to die by a factor e is refused."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Symmetric rates between neighbours as compressed rows: ``start`` int64 [n + 1], ``to`` int64 [e], ``rate`` float64 [e].

    ``leave`` float64 [n] is the sum of each token's rates, at most 1; ``gap`` the rate at which the slowest mode dies.
    """

    start: Tensor
    to: Tensor
    rate: Tensor
    leave: Tensor
    gap: float

    def times(self, x: Tensor) -> Tensor:
        """The rates, without what leaves, times ``x`` float64 [n]."""
        return x.new_zeros(len(x)).index_add_(0, self._from, self.rate * x[self.to])

    @functools.cached_property
    def _from(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.leave)), self.start.diff())


def nearest(points: Tensor, k: int) -> Tensor:
    """The ``k`` nearest others of each of ``points`` float32 [n, d] by Euclidean distance, int64 [n, k]."""
    n = len(points)
    length = points.square().sum(1)
    found = torch.empty(n, k, dtype=torch.int64)
    for first in range(0, n, CHUNK):
        part = torch.addmm(length, points[first : first + CHUNK], points.T, alpha=-2)
        rows = torch.arange(len(part))
        part[rows, first + rows] = math.inf
        found[first : first + CHUNK] = part.topk(k, largest=False, sorted=False).indices
    return found


def _edges(near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A + A^T of the neighbours ``near`` [n, k], A their 0/1 table: from, to, and 1 or 2, in order of (from, to)."""
    n, k = near.shape
    a, b = torch.arange(n).repeat_interleave(k), near.reshape(-1)
    code, count = torch.unique(torch.cat([a * n + b, b * n + a]), return_counts=True)
    return code // n, code % n, count.double()


def _pieces(n: int, a: Tensor, b: Tensor) -> int:
    """How many pieces the graph with edges ``a`` - ``b`` falls into."""
    label = torch.arange(n)
    while True:
        new = label.scatter_reduce(0, a, label[b], "amin")
        new = new[new]
        if torch.equal(new, label):
            return len(torch.unique(label))
        label = new


def _balance(n: int, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Rates w_a w_b weight, with w such that with w_a^2 for staying they sum to 1 (Sinkhorn on A + 1, which is symmetric).

    With the diagonal there is total support, so it converges for any graph; what it still misses is made up by staying.
    """
    w = torch.ones(n, dtype=torch.float64)
    for _ in range(1000):
        total = w * (w + torch.zeros_like(w).index_add_(0, a, weight * w[b]))
        w = w / total.sqrt()
        if float((total - 1).abs().max()) < 1e-6:
            break
    return w[a] * w[b] * weight


def _gap(found: Exchange, leave: Tensor) -> float:
    """The least decay rate but 0 (whose mode is even), by Lanczos with full reorthogonalisation; to about 1e-4 of it.

    A Ritz value is never below it: mixing is never said to be slower than it is.
    """
    n = len(leave)
    steps = min(n - 1, 400)
    even = torch.full((n,), n**-0.5, dtype=torch.float64)
    basis = even.new_zeros(steps + 1, n)
    basis[0] = even
    v = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    diagonal: list[float] = []
    beside: list[float] = []
    gap = math.inf
    for step in range(1, steps + 1):
        for _ in range(2):
            v = v - basis[:step].T @ (basis[:step] @ v)
        size = float(v.norm())
        if size < 1e-10:
            break
        if step > 1:
            beside.append(size)
        basis[step] = v / size
        v = found.times(basis[step]) - leave * basis[step]
        diagonal.append(float(v @ basis[step]))
        if step % 20 == 0 or step == steps:
            new = _top(diagonal, beside)
            if abs(gap - new) < 1e-5 * new:
                return new
            gap = new
    return _top(diagonal, beside)


def _top(diagonal: list[float], beside: list[float]) -> float:
    table = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    side = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    return -float(torch.linalg.eigvalsh(table + torch.diag(side, 1) + torch.diag(side, -1))[-1])


def exchange(points: Tensor, k: int, *, even: float) -> Exchange:
    """The exchange among the ``k`` nearest neighbours (all others, where there are no more) of ``points`` float32 [n, d].

    Raises :class:`UserError` where the graph falls apart or mixes too slowly and no share ``even`` of moves makes up for it.
    """
    n = len(points)
    a, b, count = _edges(nearest(points, min(k, n - 1)))
    pieces = _pieces(n, a, b)
    if pieces > 1 and even == 0:
        raise UserError(
            f"neighbours: the graph of {k} nearest neighbours falls into {pieces:,} pieces, so that noise has no one law; "
            "raise 'neighbours', or set 'even' to the share of moves that go anywhere, such as 0.01"
        )
    rate = _balance(n, a, b, count)
    leave = torch.zeros(n, dtype=torch.float64).index_add_(0, a, rate)
    start = torch.nn.functional.pad(torch.bincount(a, minlength=n).cumsum(0), (1, 0))
    found = Exchange(start, b, rate, leave, math.nan)
    gap = 0.0 if pieces > 1 else _gap(found, leave)
    if (1 - even) * gap + even < SLOWEST:
        raise UserError(
            f"neighbours: the graph mixes too slowly: its slowest mode needs {1 / max(gap, 1e-300):.3g} moves of each token to "
            f"die by a factor e, more than {1 / SLOWEST:g}; raise 'neighbours' or 'even'"
        )
    return dataclasses.replace(found, gap=max(gap, 0.0))
