"""Shuffled order of training rows, which depends only on the seed and the epoch. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from sedd_graph.data.bijection import Bijection

__all__ = ["Ordered", "Source", "Units"]

Index = npt.NDArray[np.int64]


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=_Dataclass)
R_co = TypeVar("R_co", bound=_Dataclass, covariant=True)


class Units(NamedTuple):
    """Units in which a loss is reported, for example nats per token and bits per character."""

    nats: str
    """Denominator of the loss in nats, such as ``token``."""
    bits: str
    """Denominator of the loss in bits, such as ``character``."""
    ratio: float
    """Conversion between the two denominators, such as the mean number of characters per token. Bits per character are
    then nats per token, divided by ``log(2) * ratio``."""


class Source(Protocol[R_co]):
    """Protocol of a source of rows, which returns batches of rows by index."""

    @property
    def count(self) -> int:
        """Number of rows per epoch."""

    @property
    def phases(self) -> int:
        """Number of ways to cut the data into rows, which differ in the offset (in tokens) of the first row.

        One of them is drawn for each epoch. 1 if the rows are the same in every epoch.
        """

    @property
    def many(self) -> bool:
        """True for a source beyond memory, whose rows may be so many that their permutation is not stored either.

        It is then computed for each row (:class:`~sedd_graph.data.bijection.Bijection`).
        """

    def take(self, index: Index, phase: int) -> R_co:
        """Return a batch of rows.

        Args:
            index: Indices of the b rows of the batch, int64 [b], in [0, count).
            phase: Offset in tokens at which row 0 begins, in [0, phases).

        Returns:
            A dataclass of NumPy arrays [b, ...].
        """


class _Seeded(Protocol):
    @property
    def seed(self) -> int: ...


class Ordered(Generic[R]):
    """Base class of data sets, which return batches of shuffled training rows and of held-out rows.

    A batch is a dataclass of NumPy arrays [b, ...], where b is the number of rows in the batch.

    Attributes:
        config: The ``data`` section of the blueprint, with the seed of the order.
        train: Source of the training rows.
        heldout: Source of the held-out rows.
    """

    config: _Seeded
    train: Source[R]
    heldout: Source[R]

    def __post_init__(self) -> None:
        self._orders: dict[int, tuple[int, Callable[[Index], Index]]] = {}

    def _order(self, epoch: int) -> tuple[int, Callable[[Index], Index]]:
        """Return the offset of an epoch, and the function from places in its order to rows.

        Two epochs are cached, since a batch may span both.
        """
        if epoch not in self._orders:
            generator = np.random.Generator(np.random.Philox(key=[self.config.seed, epoch]))
            phase = int(generator.integers(0, self.train.phases))
            while len(self._orders) >= 2:
                del self._orders[next(iter(self._orders))]
            if self.train.many:
                order: Callable[[Index], Index] = Bijection(self.train.count, generator)
            else:
                order = generator.permutation(self.train.count).__getitem__
            self._orders[epoch] = phase, order
        return self._orders[epoch]

    def batch(self, position: int, rows: int, *, start: int = 0, stop: int | None = None) -> R:
        """Return the training rows ``start`` to ``stop`` (exclusive) of a global batch.

        The result depends only on the seed and the arguments, so that a global batch has the same rows however it is
        split over processes.

        Args:
            position: Index of the global batch's first row, counted from the start of training over all epochs.
            rows: Number of rows of the global batch.
            start: Index of the first returned row within the global batch.
            stop: Index after the last returned row within the global batch; ``rows`` by default.

        Returns:
            A dataclass of arrays [stop - start, ...].
        """
        count = self.train.count
        wanted = np.arange(position + start, position + (rows if stop is None else stop))
        if not len(wanted):
            return self.train.take(wanted, 0)
        parts = []
        for epoch in range(int(wanted[0]) // count, int(wanted[-1]) // count + 1):
            phase, order = self._order(epoch)
            mine = wanted[(wanted >= epoch * count) & (wanted < (epoch + 1) * count)] - epoch * count
            parts.append(self.train.take(order(mine), phase))
        if len(parts) == 1:
            return parts[0]
        names = [f.name for f in dataclasses.fields(parts[0])]
        return type(parts[0])(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))

    def held_out_batches(self, rows: int, *, batches: int | None = None) -> list[range]:
        """Return the held-out rows of each batch of an evaluation, in order.

        Args:
            rows: Rows per batch; the last batch of the held-out part may have fewer.
            batches: Largest number of batches, selected at even distances; None selects all batches.
        """
        total = math.ceil(self.heldout.count / rows)
        chosen = range(total) if batches is None or batches >= total else np.linspace(0, total - 1, batches).astype(int)
        return [range(int(n) * rows, min((int(n) + 1) * rows, self.heldout.count)) for n in chosen]

    def held_out(self, rows: int, *, batches: int | None = None) -> Iterator[R]:
        """Yield batches of held-out rows as dataclasses of arrays [rows, ...]; arguments as of :meth:`held_out_batches`."""
        for chosen in self.held_out_batches(rows, batches=batches):
            yield self.heldout.take(np.arange(chosen.start, chosen.stop), 0)
