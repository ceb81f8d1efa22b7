"""MAUVE (arXiv 2102.01454), the similarity of two sets of texts, by the package ``mauve-text`` (extra ``mauve``).

The texts are represented by hidden states of the judge, so that ``mauve-text`` loads no model of its own.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_graph.errors import MissingExtraError

__all__ = ["SCALING", "SEED", "mauve", "package"]

SCALING, SEED = 5, 25
"""Scaling constant c of the paper, and seed of k-means. Both equal the current defaults of ``mauve-text``."""


def package() -> Any:
    """Import and return the module ``mauve``. Raises :class:`MissingExtraError` if it is not installed."""
    try:
        return importlib.import_module("mauve")
    except ImportError:
        raise MissingExtraError("mauve-text", extra="mauve", purpose="MAUVE") from None


def mauve(p: npt.NDArray[np.float32], q: npt.NDArray[np.float32]) -> dict[str, float]:
    """Return the MAUVE scores of two sets of texts, given a feature vector of each text.

    Args:
        p: Features of the n texts of the first set, float32 [n, d], d being the number of features of a text.
        q: Features of the m texts of the second set, float32 [m, d].

    Returns:
        ``mauve`` in [0, 1], which is 1 if both sets have the same histogram over the k-means clusters; ``mauve_star``,
        the same score with smoothed histograms (arXiv 2212.14578); and ``mauve_clusters``, the number of clusters,
        about min(n, m) / 10.
    """
    found = package().compute_mauve(p_features=p, q_features=q, mauve_scaling_factor=SCALING, seed=SEED, verbose=False)
    return {
        "mauve": float(found.mauve),
        "mauve_star": float(found.mauve_star),
        "mauve_clusters": int(found.num_buckets),
    }
