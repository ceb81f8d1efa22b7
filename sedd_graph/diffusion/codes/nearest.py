"""Nearest row of a table for each vector, without errors of rounding, and the least distance between two rows.

The nearest row e to a vector x maximises the score e . x - |e|^2 / 2. The dot product alone is enough only if all rows
have the same norm. Products are computed in chunks, so that memory is bounded at any number of rows and vectors.

Axes: v rows of the table (tokens), d channels, n vectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.errors import DivergedError

__all__ = ["Codebook", "dot_error", "least_distance", "nearest", "nearest_others"]

CHUNK = 2**23
"""Maximum number of scores in memory at a time: 32 MiB in float32."""
PAIRS = 2**15
"""Maximum number of pairs of rows whose distance is computed by subtraction at a time in :func:`least_distance`."""
NOISE = 2.0**24
"""Ratio of half a squared distance to its rounding error above which products alone give the distance to 8 digits."""
_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}
"""Unit roundoff of float32 products, by ``torch.get_float32_matmul_precision()``."""


def dot_error(width: int, unit: float) -> float:
    """Return the relative rounding error of a computed score e . x - |e|^2 / 2: relative to |e| (|x| + |e|).

    The bound holds for any order of summation (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition,
    section 3.1), with eight more roundings: of both factors, of the half square, and of the difference.

    Args:
        width: Number of channels, d.
        unit: Unit roundoff, such as 2^-24 for float32.
    """
    terms = (width + 8) * unit
    return terms / (1 - terms) if terms < 1 else math.inf


class Codebook:
    """Table of distinct rows, prepared for decoding vectors to the indices of their nearest rows.

    Scores are computed in float32 (float64 for float64 vectors). Where the best two scores of a vector are nearer than
    their rounding errors (:func:`dot_error`), its scores are computed again in float64.

    Args:
        table: Rows, float [v, d].

    Raises:
        ValueError: The table has no rows, or entries that are not finite.
    """

    @torch.no_grad()
    def __init__(self, table: Tensor) -> None:
        if table.dim() != 2 or not len(table) or not bool(table.isfinite().all()):
            raise ValueError(f"nearest: a table of one or more finite rows is needed, not {list(table.shape)}")
        self._table = table.detach()
        self._centre = self._table.double().mean(0)
        self._prepared: dict[torch.dtype, tuple[Tensor, Tensor, float]] = {}

    def _rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """Return the centred rows, half their squared norms, and their largest norm."""
        if dtype not in self._prepared:
            rows = self._table.double() - self._centre  # keeps the distances, and more digits of the squares
            half = rows.square().sum(1) / 2
            largest = math.sqrt(2 * float(half.max()))
            self._prepared[dtype] = (rows.to(dtype), half.to(dtype), largest)
        return self._prepared[dtype]

    @torch.no_grad()
    def decode(self, vectors: Tensor) -> Tensor:
        """Return the index of the nearest row of each vector; of equally near rows, the first.

        Args:
            vectors: Vectors, float [..., d].

        Returns:
            Indices, int64 [...].

        Raises:
            DivergedError: A vector has an element that is NaN or infinite.
        """
        flat = vectors.detach().reshape(-1, self._table.shape[1])
        if not bool(flat.isfinite().all()):
            wrong = int((~flat.isfinite().all(1)).sum())
            raise DivergedError(f"decode: {wrong:,} of {len(flat):,} vectors are not finite, and have no nearest row")
        dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
        step = max(1, CHUNK // len(self._table))
        found = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
        with full_precision(flat):
            for start in range(0, len(flat), step):
                self._decode(flat[start : start + step], dtype, found[start : start + step])
        return found.view(vectors.shape[:-1])

    def _decode(self, some: Tensor, dtype: torch.dtype, found: Tensor) -> None:
        """Write to ``found`` [n] the indices for the vectors ``some`` [n, d]."""
        exact = some.double() - self._centre
        best, gap, error = self._best(exact.to(dtype), dtype)
        found.copy_(best)
        if dtype == torch.float64:
            return
        unsure = (~(gap > 2 * error)).nonzero()[:, 0]
        for start in range(0, len(unsure), step := max(1, CHUNK // (2 * len(self._table)))):
            at = unsure[start : start + step]
            found[at] = self._best(exact[at], torch.float64)[0]

    def _best(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each vector its best row, by how much its score exceeds the second best, and the error of a score."""
        rows, half, largest = self._rows(dtype)
        scores = torch.addmm(half, x, rows.T, beta=-1)
        top, best = scores.max(1)
        scores.scatter_(1, best[:, None], -math.inf)
        unit = 2.0**-53 if dtype == torch.float64 else _ROUNDOFF[torch.get_float32_matmul_precision()]
        norm = torch.linalg.vector_norm(x, dim=1).double()
        error = dot_error(rows.shape[1], unit) * largest * (norm + largest)
        return best, (top - scores.amax(1)).double(), error


def nearest(table: Tensor, vectors: Tensor) -> Tensor:
    """Return the index of the row of ``table`` nearest to each vector, in Euclidean distance.

    Args:
        table: Rows, float [v, d].
        vectors: Vectors, float [..., d].

    Returns:
        Indices, int64 [...].

    Raises:
        ValueError: The table has no rows, or entries that are not finite.
        DivergedError: A vector has an element that is NaN or infinite.
    """
    return Codebook(table).decode(vectors)


@torch.no_grad()
def least_distance(table: Tensor) -> float:
    """Return the minimum Euclidean distance between two rows of a table; 0 if two rows are equal.

    A vector whose distance from a row is less than half of it is nearer to that row than to any other. The products of
    all pairs, v^2 d / 2 multiplications in float64, find the pairs that may be nearest; their distances are taken by
    subtraction, which keeps the digits of nearly equal rows.

    Args:
        table: Rows, float [v, d], v >= 2.

    Raises:
        ValueError: The table has fewer than two rows, or entries that are not finite.
    """
    exact = table.detach().double()
    if exact.dim() != 2 or len(exact) < 2 or not bool(exact.isfinite().all()):
        raise ValueError(f"least distance: two or more rows of finite numbers are needed, not {list(table.shape)}")
    rows = exact - exact.mean(0)
    half = rows.square().sum(1) / 2
    error = 4 * dot_error(rows.shape[1], 2.0**-53) * float(half.max())
    least = math.inf
    for start in range(0, len(rows), step := max(1, CHUNK // (2 * len(rows)))):
        some, others = rows[start : start + step], rows[start:]
        squares = torch.addmm(half[start:], some, others.T, alpha=-1) + half[start : start + step, None]  # / 2
        squares[torch.ones_like(squares, dtype=torch.bool).tril()] = math.inf  # each pair once
        smallest = float(squares.min())
        if smallest - error > least**2 / 2:
            continue
        pairs = (squares <= smallest + 2 * error).nonzero() + start
        if smallest > NOISE * error:  # all of them are at the same distance, to rounding
            pairs = pairs[:PAIRS]
        for one, other in (part.unbind(1) for part in pairs.split(PAIRS)):
            least = min(least, float((exact[one] - exact[other]).norm(dim=1).min()))
    return least


@torch.no_grad()
def nearest_others(table: Tensor, index: Tensor) -> Tensor:
    """Return for some rows of a table the index of the nearest other row; an equal row is nearest.

    Args:
        table: Rows, float [v, d], v >= 2.
        index: Indices of the rows, int64 [n].

    Returns:
        Indices, int64 [n].
    """
    rows = table.detach().double()
    rows = rows - rows.mean(0)
    half, found = rows.square().sum(1) / 2, torch.empty_like(index)
    step = max(1, CHUNK // (2 * len(rows)))
    for some, out in zip(index.split(step), found.split(step), strict=True):
        scores = torch.addmm(half, rows[some], rows.T, beta=-1)
        out.copy_(scores.scatter_(1, some[:, None], -math.inf).argmax(1))
    return found
