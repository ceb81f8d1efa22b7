"""Record of the noise draws from which a likelihood bound is estimated, and the standard error of that estimate.

The noise levels of a batch may be stratified (spread evenly over [0, 1], and therefore not independent).

Axes: n rows, m draws, k noise levels of a row.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["NoiseDraws"]

Floats = npt.NDArray[np.float64]

_KNOTS, _DRAWS_PER_KNOT = 16, 16
_REPLICATES = 10
"""Least number of calls of ``add`` from which a variance between them is estimated."""


class NoiseDraws:
    """Record of noise draws over several batches: for each draw its row, noise level (or levels) and loss.

    Attributes:
        over: Name of the random variable that sets the noise level, such as ``time`` or ``masked`` (the fraction of
            masked tokens), see :data:`sedd_graph.engine.process.OnDraw`. ``time`` before the first draw.
        first: Index of the current batch's first row among the rows of all batches, from 0. After each batch the caller
            adds the number of its rows.
    """

    def __init__(self) -> None:
        self.over, self.first = "time", 0
        self._row: list[Tensor] = []
        self._t: list[Tensor] = []
        self._nats: list[Tensor] = []

    def add(self, over: str, t: Tensor | None, nats: Tensor) -> None:
        """Record one noise draw for each of the b rows of the current batch.

        This method can be passed as a callback of type :data:`~sedd_graph.engine.process.OnDraw`.

        Args:
            over: Name of the random variable that sets the noise level, such as ``time``.
            t: Noise levels in [0, 1], float [b], or [b, k] if a row has k levels. None if they are unknown; the draws
                are then not recorded.
            nats: Bound on -log p of each row for this draw, nats, float [b].
        """
        self.over = over
        if t is not None:
            self._row.append(self.first + torch.arange(len(nats)))
            self._t.append(t.double().cpu())
            self._nats.append(nats.double().cpu())

    def arrays(self) -> tuple[npt.NDArray[np.int64], Floats, Floats] | None:
        """Return row index int64 [m], noise level [m] or [m, k], and nats [m] of all draws; None if there are none."""
        if not self._row:
            return None
        return torch.cat(self._row).numpy(), torch.cat(self._t).numpy(), torch.cat(self._nats).numpy()

    def standard_error(self, nats: npt.ArrayLike, counts: npt.ArrayLike) -> float:
        """Return the standard error of sum(``nats``) / sum(``counts``) for stratified or independent noise levels.

        The squared standard error is the sum of two variances. Let f be the mean loss as a function of the noise level,
        fitted to the draws as a piecewise linear function by least squares. The first variance is that of the residuals
        (loss minus f), estimated over rows. The second is that of f at the drawn levels, summed over a batch, and
        estimated over the calls of :meth:`add` (one per batch and draw). It is small if the levels of a batch are
        stratified, since they are then spread evenly over [0, 1].

        With fewer than 10 calls of :meth:`add`, from which a variance has too few degrees of freedom, or fewer than 32
        recorded draws in all (one per row and call), f is not fitted, and the result is the standard error for
        independent levels.

        Args:
            nats: Loss of each row, averaged over its draws, float [n].
            counts: Number of tokens of each row, float [n].

        Returns:
            The standard error over independent rows and noise; NaN for a single row.
        """
        values, weights = np.asarray(nats, dtype=np.float64), np.asarray(counts, dtype=np.float64)
        total, rows = float(weights.sum()), len(values)
        if rows < 2 or total <= 0:
            return math.nan
        value = values.sum() / total
        rest = values - value * weights
        found = self._trend(weights, value)
        if found is None:
            return float(rest.std(ddof=1)) * math.sqrt(rows) / total
        trend, replicates = found
        scatter = (rest - trend).var(ddof=1) * rows
        return math.sqrt(scatter + replicates.var(ddof=1) * len(replicates)) / total

    def _trend(self, weights: Floats, value: float) -> tuple[Floats, Floats] | None:
        """Fit the loss as a function of the noise level.

        Args:
            weights: Number of tokens of each row, [n].
            value: Mean loss, nats per token.

        Returns:
            The part of each row's loss that is not scatter, less the mean, averaged over its draws, [n]; and the sum of
            the fitted loss over each batch and draw, less its share of all, [replicates]. None if there are too few
            draws.
        """
        arrays = self.arrays()
        if arrays is None or len(self._row) < _REPLICATES:
            return None
        row, _, nats = arrays
        knots = min(_KNOTS, len(row) // _DRAWS_PER_KNOT)
        if knots < 2:
            return None
        hats = np.concatenate([_hats(part.numpy(), knots) for part in self._t]) * weights[row, None]
        left, size, _ = np.linalg.svd(hats, full_matrices=False)
        left = left[:, size > 1e-9 * size[0]]
        loss = nats - value * weights[row]
        fit = left @ (left.T @ loss)
        # a fit takes some of the scatter of each draw, by its leverage (the correction HC2 of MacKinnon and White, 1985)
        scatter = (loss - fit) / np.sqrt((1 - (left**2).sum(1)).clip(0.1))
        draws = np.bincount(row, minlength=len(weights)).clip(1)
        trend: Floats = np.bincount(row, (loss - scatter) / draws[row], minlength=len(weights)).astype(np.float64)
        ends = np.cumsum([len(part) for part in self._row])[:-1]
        sums = np.array([part.sum() for part in np.split(fit / draws[row], ends)])
        tokens = np.array([part.sum() for part in np.split(weights[row] / draws[row], ends)])
        return trend, sums - sums.sum() / weights.sum() * tokens


def _hats(t: Floats, knots: int) -> Floats:
    """Return the piecewise linear basis functions at noise levels [b] or [b, k], averaged over k, [b, knots]."""
    places = t.reshape(len(t), -1)[..., None] * (knots - 1) - np.arange(knots)
    found: Floats = np.clip(1 - np.abs(places), 0, None).mean(1)
    return found
