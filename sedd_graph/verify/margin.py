"""Margin of an embedding table: the error up to which the nearest embedding is still that of the original token.

Axes: v tokens, d channels, b vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.component.base import Component
from sedd_graph.component.check import Check
from sedd_graph.engine.network import Network

__all__ = ["check_margins", "margin", "read_back"]

CHUNK = 2**22
"""Maximum number of pairwise distances in memory at a time."""
LIMIT = 2**33
"""Maximum number of multiplications (v^2 d) per table in :func:`check_margins`; larger tables are skipped."""


@torch.no_grad()
def margin(table: Tensor) -> float:
    """Return half the minimum Euclidean distance between two rows of an embedding table.

    A row with any error of smaller Euclidean norm is still nearest to the original row. Takes v^2 d multiplications, in
    chunks.

    Args:
        table: Embedding table, float [v, d], v >= 2.

    Raises:
        ValueError: The table has fewer than two rows, or entries that are not finite.
    """
    rows = table.detach().double()
    if rows.dim() != 2 or len(rows) < 2 or not bool(rows.isfinite().all()):
        raise ValueError(f"margin: two or more rows of finite numbers are needed, not {list(table.shape)}")
    rows = rows - rows.mean(0)  # keeps the distances and more digits of the squares
    half = rows.square().sum(1) / 2
    least = torch.inf
    for start in range(0, len(rows), step := max(1, CHUNK // len(rows))):
        some = rows[start : start + step]
        near = half - some @ rows.T  # half the squared distance, minus |row|^2 / 2
        near[torch.arange(len(some)), torch.arange(start, start + len(some))] = torch.inf
        # products find the nearest row; its distance is taken by subtraction, which keeps the digits of nearly equal rows
        least = min(least, float((some - rows[near.argmin(1)]).norm(dim=1).min()))
    return least / 2


@torch.no_grad()
def read_back(table: Tensor, vectors: Tensor) -> Tensor:
    """Return the token whose embedding is nearest to each vector, in Euclidean distance.

    The nearest row e to a vector x maximises e . x - norm(e)^2 / 2. The dot product alone is enough only if all rows
    have the same norm.

    Args:
        table: Embedding table, float [v, d].
        vectors: Vectors to decode, float [b, d].

    Returns:
        Token ids, int64 [b].
    """
    rows = table.detach().double()
    return (vectors.double() @ rows.T - rows.square().sum(1) / 2).argmax(-1)


def check_margins(network: Network) -> list[Check]:
    """Measure the margin of each embedding table: half the minimum Euclidean distance between two of its rows.

    Tables with fewer than two rows are skipped, and those that need more than :data:`LIMIT` (2^33) multiplications.

    Args:
        network: The network.

    Returns:
        One check for each table. It holds if the margin is positive; with margin 0 it is a note (``holds`` is None).
    """
    found = []
    for path, part in network.model.named_modules():
        if not isinstance(part, Component) or part.kind != "embedding" or "table" not in part.outputs:
            continue
        table = part(torch.zeros(1, 1, dtype=torch.int64, device=network.device))[part.outputs.index("table")]
        if len(table) < 2 or len(table) ** 2 * table.shape[1] > LIMIT:
            continue
        half = margin(table)
        claim = "with any error below half the least distance of embeddings, the nearest one is the right token"
        how = f"nearest of {len(table):,} rows, untrained, Euclidean"
        found.append(Check(f"{path}.margin", claim, True if half > 0 else None, f"{half:.4g}", how))
    return found
