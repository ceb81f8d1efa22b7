"""Selected positions of a batch, in short rows: a loss that is a sum over positions is evaluated on them alone.

A group is a row of a few selected positions of one row of the batch (or of one block, where blocks have noise levels of
their own). Per-row quantities, such as total noise, are therefore those of one row, and kernels and objectives take a
draw and a batch of groups like any other. Axes: b batch, l length, k blocks of a row, u = b k blocks, g groups, m
positions of a group.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Batch, Draw

__all__ = ["Groups", "group", "group_size", "levels", "rows_of"]

LARGEST = 16
"""Largest number of positions of a group."""
FILLED = 32
"""A row has at least this many groups: on average half a group of each row is padding."""


class Groups(NamedTuple):
    """Groups of selected positions; a group is padded with copies of its first position.

    Attributes:
        row: Row of each group, int64 [g].
        unit: Block of each group, row * k + the block's number in the row, int64 [g].
        place: Positions in the row, int64 [g, m].
        valid: False at padding, bool [g, m].
    """

    row: Tensor
    unit: Tensor
    place: Tensor
    valid: Tensor

    def part(self, start: int, count: int) -> Groups:
        """Return ``count`` groups from ``start`` on; behind the last one, groups without valid positions."""
        missing = max(0, start + count - len(self.row))
        parts = [x[start : start + count] for x in self]
        if missing:
            parts = [torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) for x in parts]
        return Groups(*parts)


def group_size(width: int) -> int:
    """Return the number of positions of a group, m, for blocks (or rows) of ``width`` positions."""
    return min(LARGEST, max(1, width // FILLED))


def group(read: Tensor, blocks: int, size: int | None = None) -> tuple[Groups, Tensor]:
    """Collect the selected positions of a batch in groups.

    Shapes depend on the shape of ``read`` alone, so that nothing waits for a GPU: as many groups are returned as all
    positions would need, and the number of groups in use is a tensor.

    Args:
        read: The selected positions, bool [b, l].
        blocks: Number of blocks of a row, k, which divides l. A group has positions of one block.
        size: Largest number of positions of a group; None: :func:`group_size`.

    Returns:
        The groups, those in use first (all others have no valid position); and the number in use, int64 [].
    """
    (rows, length), width = read.shape, read.shape[1] // blocks
    size = group_size(width) if size is None else size
    units = read.reshape(rows * blocks, width)
    per_unit = (units.sum(1) + size - 1) // size
    first = per_unit.cumsum(0) - per_unit
    rank = units.long().cumsum(1) - 1
    most = rows * blocks * -(-width // size)
    slot = torch.where(units, first[:, None] * size + rank, most * size)  # the last is dropped
    flat = torch.full((most * size + 1,), -1, dtype=torch.int64, device=read.device)
    flat = flat.scatter(0, slot.reshape(-1), torch.arange(rows * length, device=read.device))
    table = flat[:-1].view(most, size)
    valid = table >= 0
    table = torch.where(valid, table, table[:, :1]).clamp(min=0)
    return Groups(table[:, 0] // length, table[:, 0] // width, table % length, valid), per_unit.sum()


def levels(draw: Draw) -> int:
    """Return the number of noise levels of each row of a draw, k: 1, or the number of blocks of a row."""
    return draw.sigma[0].numel() if len(draw.sigma) else 1


def rows_of(draw: Draw, batch: Batch, groups: Groups) -> tuple[Draw, Batch]:
    """Return the draw and the batch of groups of positions, as rows of m positions.

    Args:
        draw: One noisy row for each clean row; fields other than ``xt`` have an entry for each row, for each block or for
            each position.
        batch: The clean rows, b of them.
        groups: The groups.

    Returns:
        The draw, g rows of m noisy tokens; and the batch, in which padding is neither corrupted nor in the loss.
    """
    row, place, blocks = groups.row[:, None], groups.place, levels(draw)

    def taken(name: str, value: Tensor) -> Tensor:
        if name != "xt" and value.numel() == len(batch) * blocks:
            return value.reshape(-1)[groups.unit]
        return value[row, place] if value.shape[:2] == draw.xt.shape else value[groups.row]

    short = {f.name: taken(f.name, getattr(draw, f.name)) for f in dataclasses.fields(draw)}
    tokens, attend, corrupt, loss = (getattr(batch, f.name)[row, place] for f in dataclasses.fields(Batch))
    valid = groups.valid
    return type(draw)(**short), Batch(tokens, attend & valid, corrupt & valid, loss & valid)
