"""Paired test of two runs on the same held-out rows.

The rows differ in difficulty far more than two models do. The difference of two bounds row by row therefore has a much
smaller standard error than either bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_graph.evaluation.estimate import ratio

__all__ = ["ROWS_FILE", "Difference", "RowBounds", "difference", "row_bounds"]

ROWS_FILE = "evaluation_rows.json"
"""File name, in a run folder, of the bound of each held-out row."""


@dataclasses.dataclass(frozen=True)
class RowBounds:
    """Bound of each held-out row of a run. Axes: n rows.

    Attributes:
        nats: The bound, nats, float64 [n].
        tokens: Number of evaluated tokens, int64 [n].
        data: What the rows are, as recorded with the evaluation.
    """

    nats: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    data: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference of two bounds on the same rows.

    Attributes:
        nats_per_token: The first bound minus the second.
        standard_error: Its standard error over rows.
        p_value: Two-sided p-value of a difference of zero, by the normal distribution.
        rows: Number of rows.
    """

    nats_per_token: float
    standard_error: float
    p_value: float
    rows: int


def row_bounds(found: Mapping[str, Any]) -> RowBounds | None:
    """Return the bounds of rows from the content of :data:`ROWS_FILE`; None if it has none, or is damaged."""
    try:
        nats = np.asarray(found["row_nats"], dtype=np.float64)
        tokens = np.asarray(found["row_tokens"], dtype=np.int64)
        data = found["protocol"]["data"]
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    whole = nats.ndim == 1 and nats.shape == tokens.shape and len(nats) > 1 and isinstance(data, dict)
    return RowBounds(nats, tokens, data) if whole and np.isfinite(nats).all() else None


def difference(one: RowBounds, other: RowBounds) -> Difference | None:
    """Return the difference of two bounds, or None if they are not bounds on the same rows."""
    if one.data != other.data or not np.array_equal(one.tokens, other.tokens):
        return None
    value, error = ratio(one.nats - other.nats, one.tokens)
    if error > 0:
        p = math.erfc(abs(value) / error / math.sqrt(2))
    else:
        p = 1.0 if value == 0 else 0.0
    return Difference(value, error, p, len(one.nats))
