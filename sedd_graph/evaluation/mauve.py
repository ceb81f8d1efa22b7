"""MAUVE (arXiv 2102.01454), the similarity of two sets of texts, by the package ``mauve-text`` (extra ``mauve``).

Features come from the judge, so that the package loads no model of its own.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_graph.errors import MissingExtraError

__all__ = ["SCALING", "SEED", "mauve", "package"]

SCALING, SEED = 5, 25
"""The constant c of the paper and the seed of k-means: the package's defaults, passed explicitly so that they stay."""


def package() -> Any:
    """Return the module ``mauve``. Raises :class:`MissingExtraError` where it is not installed."""
    try:
        return importlib.import_module("mauve")
    except ImportError:
        raise MissingExtraError("mauve-text", extra="mauve", purpose="MAUVE") from None


def mauve(p: npt.NDArray[np.float32], q: npt.NDArray[np.float32]) -> dict[str, float]:
    """Compare two sets of features.

    Args:
        p: float32 [n, width].
        q: float32 [m, width].

    Returns:
        ``mauve`` in [0, 1], 1 where ``p`` and ``q`` fall into the same clusters equally often; ``mauve_star``, the same
        with smoothed histograms (arXiv 2212.14578); and ``mauve_clusters``, min(n, m) / 10.
    """
    found = package().compute_mauve(p_features=p, q_features=q, mauve_scaling_factor=SCALING, seed=SEED, verbose=False)
    return {
        "mauve": float(found.mauve),
        "mauve_star": float(found.mauve_star),
        "mauve_clusters": int(found.num_buckets),
    }
