"""How far vectors may be off before tokens are read back wrong. Axes: v states, d channels, b vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.component.base import Component
from sedd_graph.component.check import Check
from sedd_graph.engine.network import Network

__all__ = ["check_margins", "margin", "read_back"]

CHUNK = 2**22  # distances held at a time
LIMIT = 2**33  # products that a build spends on one table


@torch.no_grad()
def margin(table: Tensor) -> float:
    """Half the least distance between two rows of ``table`` [v, d], v >= 2: what any vector may be off by, in the Euclidean norm, and
    the row nearest to it still be its own (and no more: half way between the nearest two, it is not known which).

    Takes v^2 d products, some rows at a time. Raises :class:`ValueError` where numbers are not finite, or there is one row.
    """
    rows = table.detach().double()
    if rows.dim() != 2 or len(rows) < 2 or not bool(rows.isfinite().all()):
        raise ValueError(f"margin: two or more rows of finite numbers are needed, not {list(table.shape)}")
    rows = rows - rows.mean(0)  # distances stay, and fewer digits are lost in squares
    half = rows.square().sum(1) / 2
    least = torch.inf
    for start in range(0, len(rows), step := max(1, CHUNK // len(rows))):
        some = rows[start : start + step]
        near = half - some @ rows.T  # less |row|^2 / 2: half the square of the distance
        near[torch.arange(len(some)), torch.arange(start, start + len(some))] = torch.inf
        # the products say which row is nearest, subtraction how near: of two that are all but equal the first loses the digits
        least = min(least, float((some - rows[near.argmin(1)]).norm(dim=1).min()))
    return least / 2


@torch.no_grad()
def read_back(table: Tensor, vectors: Tensor) -> Tensor:
    """The row of ``table`` [v, d] nearest to each of ``vectors`` [b, d], int64 [b]: the greatest e x - |e|^2 / 2, which the dot product
    alone is only where all rows are as long."""
    rows = table.detach().double()
    return (vectors.double() @ rows.T - rows.square().sum(1) / 2).argmax(-1)


def check_margins(network: Network) -> list[Check]:
    """Of each token embedding, as it stands, whose table is not too large to be gone through."""
    found = []
    for path, part in network.model.named_modules():
        if not isinstance(part, Component) or part.kind != "embedding" or "table" not in part.outputs:
            continue
        table = part(torch.zeros(1, 1, dtype=torch.int64, device=network.device))[part.outputs.index("table")]
        if len(table) < 2 or len(table) ** 2 * table.shape[1] > LIMIT:
            continue
        half = margin(table)
        claim = "tokens are read back from vectors with any error below half the least distance"
        how = f"nearest of {len(table):,} rows, as they start, Euclidean"
        found.append(Check(f"{path}.margin", claim, True if half > 0 else None, f"{half:.4g}", how))
    return found
