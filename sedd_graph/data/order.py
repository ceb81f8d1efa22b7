"""The order of training rows, a function of the seed and the position alone. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["Ordered", "Source", "Units"]

Index = npt.NDArray[np.int64]


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=_Dataclass)
R_co = TypeVar("R_co", bound=_Dataclass, covariant=True)


class Units(NamedTuple):
    """Units of a reported loss, such as nats per token and bits per character."""

    nats: str
    """Unit that nats are counted per, such as ``token``."""
    bits: str
    """Unit that bits are counted per, such as ``character``."""
    ratio: float
    """Number of ``bits`` units per ``nats`` unit, such as characters per token."""


class Source(Protocol[R_co]):
    """Protocol of rows by index."""

    @property
    def count(self) -> int:
        """Number of rows per epoch."""

    @property
    def phases(self) -> int:
        """Number of different offsets of the first row; 1 where rows are not cut from a stream."""

    def take(self, index: Index, phase: int) -> R_co:
        """Return rows as a dataclass of arrays [b, ...].

        Args:
            index: Indices of the rows, int64 [b].
            phase: Offset of the first row from the start of the data (in tokens for text), less than :attr:`phases`.
        """


class _Seeded(Protocol):
    @property
    def seed(self) -> int: ...


class Ordered(Generic[R]):
    """Base class of data sets, which returns batches of training and held-out rows.

    A batch is a dataclass of arrays [b, ...].
    """

    config: _Seeded
    train: Source[R]
    heldout: Source[R]

    def __post_init__(self) -> None:
        self._orders: dict[int, tuple[int, Index]] = {}

    def _order(self, epoch: int) -> tuple[int, Index]:
        """Return the offset of an epoch and the order of its rows. Two epochs are cached, since a batch may span both."""
        if epoch not in self._orders:
            generator = np.random.Generator(np.random.Philox(key=[self.config.seed, epoch]))
            phase = int(generator.integers(0, self.train.phases))
            while len(self._orders) >= 2:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = phase, generator.permutation(self.train.count)
        return self._orders[epoch]

    def batch(self, position: int, rows: int, *, start: int = 0, stop: int | None = None) -> R:
        """Return rows ``start`` to ``stop`` of a global batch of training rows.

        The result depends on the seed and the arguments alone, so that every split of a batch over processes has the same rows.

        Args:
            position: Index of the batch's first row in the order of rows, which continues over epochs without end.
            rows: Number of rows of the global batch.
            start: First row within the batch.
            stop: End of the rows within the batch; ``rows`` by default.
        """
        count = self.train.count
        wanted = np.arange(position + start, position + (rows if stop is None else stop))
        if not len(wanted):
            return self.train.take(wanted, 0)
        parts = []
        for epoch in range(int(wanted[0]) // count, int(wanted[-1]) // count + 1):
            phase, order = self._order(epoch)
            mine = wanted[(wanted >= epoch * count) & (wanted < (epoch + 1) * count)] - epoch * count
            parts.append(self.train.take(order[mine], phase))
        if len(parts) == 1:
            return parts[0]
        names = [f.name for f in dataclasses.fields(parts[0])]
        return type(parts[0])(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))

    def held_out(self, rows: int, *, batches: int | None = None) -> Iterator[R]:
        """Yield batches of ``rows`` held-out rows in order; the last may be shorter.

        ``batches`` limits their number to batches that are spread evenly.
        """
        total = math.ceil(self.heldout.count / rows)
        chosen = range(total) if batches is None or batches >= total else np.linspace(0, total - 1, batches).astype(int)
        for number in chosen:
            first = int(number) * rows
            yield self.heldout.take(np.arange(first, min(first + rows, self.heldout.count)), 0)
