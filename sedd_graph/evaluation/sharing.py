"""How the rows of an evaluation are divided into parts of one size and over processes, and how their numbers are collected.

Axes: n rows of the evaluation, m rows that are evaluated in one call.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sedd_graph.engine.host_number import ToHost

__all__ = ["ALONE", "RowNumbers", "Share", "Workers", "shares"]


class Workers(Protocol):
    """The processes that share an evaluation, such as :class:`sedd_graph.training.distributed.World`."""

    @property
    def rank(self) -> int:
        """Rank of this process, in [0, size)."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def sum_(self, value: Tensor) -> None:
        """Sum the tensor ``value`` over all processes, in place."""


@dataclasses.dataclass(frozen=True)
class _Alone:
    rank: int = 0
    size: int = 1

    def sum_(self, value: Tensor) -> None:
        pass


ALONE: Workers = _Alone()
"""One process."""


class Share(NamedTuple):
    """Rows of one batch that a process evaluates.

    Attributes:
        number: Index of the batch.
        parts: Rows of the batch that are evaluated at a time; beyond the batch they start again at its first row.
        kept: For each part, the number of its first rows that count; the others are padding.
    """

    number: int
    parts: Sequence[range]
    kept: Sequence[int]


def shares(batches: Sequence[range], at_once: int, workers: Workers, *, padded: bool) -> list[Share]:
    """Return the rows that this process evaluates.

    Every process evaluates equally many parts, since sharded weights are gathered by all processes together; parts beyond
    the last one are repeated, and do not count.

    Args:
        batches: The rows of each batch.
        at_once: Largest number of rows that are evaluated at a time.
        workers: The processes.
        padded: Whether all parts have ``at_once`` rows.
    """
    every = [
        (number, range(start, min(start + at_once, len(rows))))
        for number, rows in enumerate(batches)
        for start in range(0, len(rows), at_once)
    ]
    each = -(-len(every) // workers.size)
    first = workers.rank * each
    mine = [(*every[min(i, len(every) - 1)], i < len(every)) for i in range(first, first + each)]
    found = []
    for number, parts in itertools.groupby(mine, key=lambda part: part[0]):
        rows = list(parts)
        found.append(
            Share(
                number,
                [range(part.start, part.start + at_once) if padded else part for _, part, _ in rows],
                [len(part) if counts else 0 for _, part, counts in rows],
            )
        )
    return found


class RowNumbers:
    """Numbers of each row of an evaluation, by name, of which each process computes those of its rows.

    Args:
        batches: The rows of each batch.
    """

    def __init__(self, batches: Sequence[range]) -> None:
        self._starts = list(itertools.accumulate(map(len, batches), initial=0))
        self._found: dict[str, Tensor] = {}
        self._waiting: tuple[Share, dict[str, torch.Size], ToHost] | None = None

    def add(self, share: Share, values: Mapping[str, Tensor]) -> None:
        """Add the numbers of a share's rows. The device is waited for only when the next share is added.

        Args:
            share: The rows.
            values: Numbers by name, [m, ...] each, with the same names for all shares.
        """
        self._take()
        flat = ToHost(torch.cat([value.double().reshape(-1) for value in values.values()]))
        self._waiting = share, {name: value.shape for name, value in values.items()}, flat

    def _take(self) -> None:
        if self._waiting is None:
            return
        share, shapes, flat = self._waiting
        rows = [
            self._starts[share.number] + i for part, n in zip(share.parts, share.kept, strict=True) for i in part[:n]
        ]
        firsts = itertools.accumulate(map(len, share.parts), initial=0)
        kept = [first + i for first, n in zip(firsts, share.kept, strict=False) for i in range(n)]
        for (name, shape), value in zip(
            shapes.items(), flat.value.split([shape.numel() for shape in shapes.values()]), strict=True
        ):
            if name not in self._found:
                self._found[name] = torch.zeros(self._starts[-1], *shape[1:], dtype=torch.float64)
            self._found[name][rows] = value.view(shape)[kept]
        self._waiting = None

    def gather(self, workers: Workers, device: torch.device) -> dict[str, Tensor]:
        """Return the numbers of all rows by name, float64 [n, ...] on the CPU, in every process.

        Args:
            workers: The processes, all of which must call this method.
            device: Device of the tensors that they exchange.
        """
        self._take()
        if workers.size > 1:
            for name, value in self._found.items():
                total = value.to(device)
                workers.sum_(total)
                self._found[name] = total.cpu()
        return self._found

    def parts(self) -> Iterator[slice]:
        """Yield the rows of each batch among all rows."""
        return (slice(*ends) for ends in itertools.pairwise(self._starts))
