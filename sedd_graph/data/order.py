"""The order of rows: a pure function of the seed and the position. No torch."""

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
    """Units of a reported loss: nats per ``nats`` (such as token) and bits per ``bits`` (such as character).

    ``ratio`` is the number of the second per one of the first.
    """

    nats: str
    bits: str
    ratio: float


class Source(Protocol[R_co]):
    """Rows by index: ``count`` of them in every epoch, cut at one of ``phases`` offsets."""

    @property
    def count(self) -> int: ...

    @property
    def phases(self) -> int: ...

    def take(self, index: Index, phase: int) -> R_co: ...


class _Seeded(Protocol):
    @property
    def seed(self) -> int: ...


class Ordered(Generic[R]):
    """Training rows by position and held-out rows in order. A batch of rows is a dataclass of arrays [b, ...]."""

    config: _Seeded
    train: Source[R]
    heldout: Source[R]

    def __post_init__(self) -> None:
        self._orders: dict[int, tuple[int, Index]] = {}

    def _order(self, epoch: int) -> tuple[int, Index]:
        """Return the phase of an epoch and the order of its rows. Two are cached, since a batch may span two epochs."""
        if epoch not in self._orders:
            generator = np.random.Generator(np.random.Philox(key=[self.config.seed, epoch]))
            phase = int(generator.integers(0, self.train.phases))
            while len(self._orders) >= 2:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = phase, generator.permutation(self.train.count)
        return self._orders[epoch]

    def batch(self, position: int, rows: int, *, start: int = 0, stop: int | None = None) -> R:
        """Return rows ``start`` to ``stop`` of the global batch of ``rows`` that begins at ``position`` of the endless order.

        The result depends on the seed and the arguments alone, so that every split of a batch over processes gives the same rows.
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
        """Yield held-out rows in batches of ``rows``, the last one possibly shorter; ``batches`` takes that many, spread evenly."""
        total = math.ceil(self.heldout.count / rows)
        chosen = range(total) if batches is None or batches >= total else np.linspace(0, total - 1, batches).astype(int)
        for number in chosen:
            first = int(number) * rows
            yield self.heldout.take(np.arange(first, min(first + rows, self.heldout.count)), 0)
