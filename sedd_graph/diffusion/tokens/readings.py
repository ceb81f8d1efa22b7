"""Numbers and weights of each position that follow from the network's outputs there, a few positions at a time.

A step of a sampler needs a few numbers of each position (such as the probability that it changes), and the weights of new
states at those that change. Tensors of the size of the vocabulary are therefore held for a chunk of positions only: the
numbers of all positions first, and the weights again where a position changes. They are computed once if the outputs of all
rows fit into a chunk, or where many positions change: the weights of all are then held in one tensor. Axes: b batch, l length, n states, g groups of positions of one row, m positions of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sedd_graph.diffusion.draws import NewStates, Where
from sedd_graph.diffusion.tokens.groups import Groups, group, group_size
from sedd_graph.diffusion.tokens.stage import Outputs, whole_rows

__all__ = ["Law", "Readings"]

Law = Callable[[Mapping[str, Tensor], Tensor, Tensor, Tensor], tuple[tuple[Tensor, ...], Tensor]]
"""Type of functions from outputs at positions, [g, m, n], the tokens there, int64 [g, m], their rows, int64 [g], and their
places in the rows, int64 [g, m], to some numbers of each position, [g, m] each, and the weights of new states, [g, m, n], not
normalised."""

NUMBERS, NUMBERS_ON_GPU = 2**22, 2**27
"""Largest numbers of values of a tensor of the size of the vocabulary; on a CPU, 32 MiB in float64 stay in reused memory."""
HELD, HELD_ON_GPU = 2**28, 2**31
"""Largest numbers of weights that are held where many positions change: 1 GiB in float32, 8 GiB on a GPU."""
PARTS = 8
"""A batch has at least this many chunks, if it has several."""


class Readings:
    """Chunks of positions in which the outputs of a network are read.

    Args:
        free: Positions that may change, bool [b, l].
        states: Number of states, n.
        tabular: Whether formulas take a table for each row (:attr:`~sedd_graph.diffusion.tokens.kernel.Kernel.tabular`), so
            that rows are not taken apart.

    Attributes:
        whole: Whether the outputs of all rows fit into one chunk.
        size: Number of positions that are read at a time.
        group_size: Number of positions of a group.
    """

    def __init__(self, free: Tensor, states: int, *, tabular: bool) -> None:
        self._shape, self._tabular = free.shape, tabular
        on_gpu = free.device.type == "cuda"
        limit, self._held = (NUMBERS_ON_GPU, HELD_ON_GPU) if on_gpu else (NUMBERS, HELD)
        positions = free.numel()
        self.whole = positions * states <= limit
        self.size = max(1, min(limit // states, positions if self.whole else -(-positions // PARTS)))
        self.group_size = group_size(free.shape[1])

    @property
    def apart(self) -> bool:
        """Whether positions are read in groups, not row by row."""
        return not (self.whole or self._tabular)

    def used(self, where: Tensor) -> Tensor:
        """Return the number of groups that the positions ``where``, bool [b, l], take, int64 []."""
        return ((where.sum(1) + self.group_size - 1) // self.group_size).sum()

    def most(self, only: bool) -> int:
        """Return the largest number of groups; ``only``: at most one position of each row is read."""
        rows, length = self._shape
        return rows if only else rows * -(-length // self.group_size)

    def scan(
        self, outputs: Outputs, law: Law, where: Tensor, *, count: int, one: bool, hold: bool = False
    ) -> tuple[tuple[Tensor, ...], NewStates]:
        """Evaluate a law at some positions.

        Args:
            outputs: Outputs of the network.
            law: The law.
            where: The positions, bool [b, l].
            count: Upper bound on the number of groups that these positions take.
            one: Whether there is at most one position in each row.
            hold: Whether the weights of all these positions are held, in float32, since many are needed; not if they are
                more than :data:`HELD`.

        Returns:
            The numbers of the positions, [b, l] each, 0 elsewhere; and the function that returns the weights of new states.
        """
        if not self.apart:
            groups, count, chunk = whole_rows(where), len(where), max(1, self.size // max(1, where.shape[1]))
        elif one:
            place = where.to(torch.uint8).argmax(1, keepdim=True)
            row = torch.arange(len(where), device=where.device)
            groups, chunk = Groups(row, row, place, where.any(1, keepdim=True)), self.size
        else:
            groups, chunk = group(where, 1)[0], max(1, self.size // self.group_size)
        dense: list[Tensor] = []
        table: Tensor | None = None
        for start in range(0, count, chunk):
            part = Groups(*(v[start : start + chunk] for v in groups))
            numbers, weights = law(outputs.at(part), outputs.x[part.row[:, None], part.place], part.row, part.place)
            if not start:
                # a law in float64 takes twice the memory: the table, and a chunk of at most a sixteenth of it
                small = weights.dtype == torch.float32 or 2 * PARTS * chunk <= count
                hold = not self.apart or (hold and small and count * weights[0].numel() <= self._held)
            if hold:
                table = _put(table, weights.float() if self.apart else weights, start, count)
            dense = dense or [where.new_zeros(where.shape, dtype=v.dtype) for v in numbers]
            for found, value in zip(dense, numbers, strict=True):
                found[part.row[:, None], part.place] = value
            del weights
        slot = _slots(groups, count, where) if self.apart and table is not None else None

        def weights_at(at: Where) -> Tensor:
            if slot is not None and table is not None:
                return table.flatten(0, 1)[slot[at.row, at.place]]
            if table is not None:
                return table[at.row, at.place]
            groups = Groups(at.row, at.row, at.place[:, None], torch.ones_like(at.place[:, None], dtype=torch.bool))
            return law(outputs.at(groups), outputs.x[at.row, at.place][:, None], at.row, groups.place)[1][:, 0]

        return tuple(torch.where(where, v, torch.zeros_like(v)) for v in dense), weights_at


def _put(table: Tensor | None, weights: Tensor, start: int, count: int) -> Tensor:
    """Return a table of ``count`` groups with the weights of those from ``start`` on, of which there may be more."""
    weights = weights[: count - start]
    if len(weights) == count:
        return weights
    table = weights.new_empty(count, *weights.shape[1:]) if table is None else table
    table[start : start + len(weights)] = weights
    return table


def _slots(groups: Groups, count: int, where: Tensor) -> Tensor:
    """Return the index of each position, int64 [b, l], among those of the first ``count`` groups; unspecified elsewhere."""
    row, place, valid = groups.row[:count, None], groups.place[:count], groups.valid[:count]
    index = torch.where(valid, row * where.shape[1] + place, where.numel())  # padding is dropped
    order = torch.arange(index.numel(), device=where.device).view_as(index)
    slots = order.new_zeros(where.numel() + 1).scatter(0, index.flatten(), order.flatten())
    return slots[:-1].view(where.shape)
