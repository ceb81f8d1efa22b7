"""Training batches, samples of the forward process, and random numbers independent of how a global batch is split.

Axes: b batch (rows), l length (positions per row).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Batch", "Draw", "PointBatch", "Randomness", "nothing_hidden", "part_of", "repeated", "taken"]


def nothing_hidden(rows: int, length: int, device: torch.device | str) -> Tensor:
    """Return an attention mask that is True everywhere, bool [rows, length]: one value, expanded, with strides of 0.

    A node sees by the strides, without reading the mask, that all entries of a row are equal, and attends without a mask.
    """
    return torch.ones((), dtype=torch.bool, device=device).expand(rows, length)


def _shape(mask: Any) -> tuple[int, int]:
    return len(mask), mask.shape[1]


def _expanded(value: Tensor) -> bool:
    """Return whether a tensor is one value, expanded."""
    return value.dim() > 0 and not any(value.stride())


def taken(value: Tensor, index: Tensor) -> Tensor:
    """Return rows of a tensor [n, ...] by index, int64 [r]; one value that is expanded remains so."""
    return value[:1].expand(len(index), *value.shape[1:]) if _expanded(value) else value[index]


def repeated(value: Tensor, copies: int) -> Tensor:
    """Return a tensor [n, ...] as a whole ``copies`` times, [copies * n, ...]; one value that is expanded remains so."""
    if copies == 1:
        return value
    if _expanded(value):
        return value[:1].expand(copies * len(value), *value.shape[1:])
    return torch.cat([value] * copies)


def part_of(value: Tensor, part: range) -> Tensor:
    """Return the entries ``part`` of the first axis; beyond the last entry they start again at the first.

    Such entries pad a batch to the shape that compiled code has.

    Args:
        value: Tensor [n, ...], n > 0.
        part: Consecutive indices.

    Returns:
        [len(part), ...].
    """
    if part.stop <= len(value):
        return value[part.start : part.stop]
    return taken(value, torch.arange(part.start, part.stop, device=value.device) % len(value))


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of clean token rows x_0, with three masks over their positions.

    All three masks are False at padding. At a prompt ``attend`` is True, and ``corrupt`` and ``loss`` are False.

    Attributes:
        tokens: int64 [b, l], the clean tokens x_0.
        attend: bool [b, l], positions that the network may attend to; :func:`nothing_hidden` where it is True everywhere,
            as far as the host knows without waiting for a device.
        corrupt: bool [b, l], positions that the forward process may change.
        loss: bool [b, l], positions that the loss is summed over.
    """

    tokens: Tensor
    attend: Tensor
    corrupt: Tensor
    loss: Tensor

    @classmethod
    def of(cls, tokens: Tensor) -> Batch:
        """Return a batch without padding or prompts: all three masks are True everywhere.

        Args:
            tokens: Clean tokens, int64 [b, l].
        """
        every = torch.ones_like(tokens, dtype=torch.bool)
        return cls(tokens, nothing_hidden(len(tokens), tokens.shape[1], tokens.device), every, every)

    @classmethod
    def of_arrays(cls, tokens: Any, attend: Any, corrupt: Any, loss: Any) -> Batch:
        """Return a batch on the CPU of NumPy arrays, or of tensors on the CPU, such as those in page-locked memory.

        An attention mask that is True everywhere becomes :func:`nothing_hidden`.
        """
        hides = not np.all(attend.numpy() if isinstance(attend, Tensor) else attend)
        mask = torch.as_tensor(attend) if hides else nothing_hidden(*_shape(attend), "cpu")
        return cls(torch.as_tensor(tokens), mask, torch.as_tensor(corrupt), torch.as_tensor(loss))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def width(self) -> int:
        """Number of positions per row, l."""
        return self.tokens.shape[1]

    @property
    def counted(self) -> Tensor:
        """Number of positions of each row that contribute to the loss (``loss & corrupt``), int64 [b]."""
        return (self.loss & self.corrupt).sum(-1)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with all tensors on ``device``."""
        tokens, attend, corrupt, loss = self.tokens, self.attend, self.corrupt, self.loss
        hides = not _expanded(attend)
        attend = attend.to(device, non_blocking=True) if hides else nothing_hidden(*_shape(attend), device)
        tokens, corrupt, loss = (x.to(device, non_blocking=True) for x in (tokens, corrupt, loss))
        return Batch(tokens, attend, corrupt, loss)

    def rows(self, start: int, stop: int) -> Batch:
        """Return the batch of rows ``start`` (inclusive) to ``stop`` (exclusive)."""
        return Batch(*(getattr(self, f.name)[start:stop] for f in dataclasses.fields(self)))

    def take(self, index: Tensor) -> Batch:
        """Return the batch of rows by index, int64 [r]."""
        return Batch(*(taken(getattr(self, f.name), index) for f in dataclasses.fields(self)))

    def part(self, part: range) -> Batch:
        """Return the batch of the rows ``part``, as :func:`part_of` does."""
        return Batch(*(part_of(getattr(self, f.name), part) for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class PointBatch:
    """A batch of real-valued data points, for training a normalizing flow; every entry contributes to the loss.

    Attributes:
        x: float32 [b, ...], one data point per row.
    """

    x: Tensor

    @classmethod
    def of_arrays(cls, x: Any) -> PointBatch:
        """Return a batch on the CPU of a NumPy array, or of a tensor on the CPU."""
        return cls(torch.as_tensor(x))

    def __len__(self) -> int:
        return len(self.x)

    @property
    def width(self) -> int:
        """Number of entries of one data point."""
        return self.x[0].numel()

    @property
    def counted(self) -> Tensor:
        """Number of entries of each data point that contribute to the loss (all of them), int64 [b]."""
        return torch.full((len(self.x),), self.width, device=self.x.device)

    def to(self, device: torch.device | str) -> PointBatch:
        """Return the batch with its tensor on ``device``."""
        return PointBatch(self.x.to(device, non_blocking=True))

    def part(self, part: range) -> PointBatch:
        """Return the batch of the rows ``part``, as :func:`part_of` does."""
        return PointBatch(part_of(self.x, part))


@dataclasses.dataclass(frozen=True)
class Draw:
    """Noisy rows x_t of a batch, sampled from the forward process, with their times and noise levels.

    An objective may sample c noisy rows for each clean row. The first axis of every tensor then has c * b rows: the
    batch as a whole, repeated c times. Under an objective that noises blocks separately, ``t``, ``sigma``, ``dsigma``
    and ``weight`` are [b, k], with one entry for each of the k blocks of a row.

    Attributes:
        xt: int64 [b, l], the noisy tokens x_t.
        t: float32 [b], times in [0, 1]. Under an objective that draws the number of masks instead of a time, the
            fraction of maskable tokens that are masked.
        sigma: float32 [b], total noise sigma(t).
        dsigma: float32 [b], the derivative of sigma(t) in t; 1 if the bound is not an integral over t.
        weight: float32 [b], the importance weight of the sample in a Monte Carlo estimate of the bound on -log p(x_0).
            For a bound that is an integral over t: the length of the interval from which t is drawn, or 1 if the
            caller specifies t. For a sum over time steps: the number of steps. For a sum over the number of masked
            tokens: the number of maskable tokens divided by the number of masked ones.
    """

    xt: Tensor
    t: Tensor
    sigma: Tensor
    dsigma: Tensor
    weight: Tensor


class Randomness:
    """Random numbers for some rows of a global batch, independent of its split over ranks and accumulation steps.

    Each rank and accumulation step generates the numbers of the whole global batch from the same generator state and
    returns those of its own rows.

    Args:
        generator: The random number generator; results are on its device.
        start: Index in the global batch of the first of these rows.
        total: Number of rows of the global batch; None: ``start`` plus the number of rows requested in each call. Rows
            beyond the last one get the numbers of the first ones, as in :func:`part_of`.
    """

    def __init__(self, generator: torch.Generator, *, start: int = 0, total: int | None = None) -> None:
        self.generator, self.start, self.total = generator, start, total

    def rand(self, rows: int, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1) with 24 random bits each.

        Args:
            rows: Number of rows to return, from row ``start`` of the global batch on.
            *shape: Sizes of the other axes.

        Returns:
            float32 ``[rows, *shape]``.
        """
        total = self.total or self.start + rows
        drawn = torch.rand(total, *shape, generator=self.generator, device=self.generator.device)
        return part_of(drawn, range(self.start, self.start + rows))

    def randn(self, rows: int, *shape: int) -> Tensor:
        """Draw standard normal numbers.

        Args:
            rows: Number of rows to return, from row ``start`` of the global batch on.
            *shape: Sizes of the other axes.

        Returns:
            float32 ``[rows, *shape]``.
        """
        total = self.total or self.start + rows
        drawn = torch.randn(total, *shape, generator=self.generator, device=self.generator.device)
        return part_of(drawn, range(self.start, self.start + rows))

    def rand48(self, rows: int, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1) with 48 random bits each.

        Sampling from a large vocabulary by its inverse CDF requires 48 bits: with 24 bits, a token of probability 1e-8
        might never be sampled.

        Args:
            rows: Number of rows to return, from row ``start`` of the global batch on.
            *shape: Sizes of the other axes.

        Returns:
            float64 ``[rows, *shape]``.
        """
        return self.rand(rows, *shape).double() + self.rand(rows, *shape).double() * 2**-24

    def keys(self, rows: int) -> Tensor:
        """Draw one seed per row for the counter-based random numbers of dropout, int32 [rows].

        The seeds are the keys that :mod:`sedd_graph.component.counter_rng` hashes.

        Args:
            rows: Number of rows to return, from row ``start`` of the global batch on.
        """
        total = self.total or self.start + rows
        device = self.generator.device
        drawn = torch.randint(-(2**31), 2**31, (total,), generator=self.generator, device=device)
        return part_of(drawn, range(self.start, self.start + rows)).int()

    def systematic(self, rows: int, share: float) -> Tensor:
        """Choose a share of the rows by systematic sampling: at even distances, with one uniform random offset.

        Each row is chosen with probability ``share``, and of any n successive rows at most ``share`` times n, rounded up.

        Args:
            rows: Number of rows to choose from, from row ``start`` of the global batch on.
            share: Share of the rows that are chosen, from 0 to 1.

        Returns:
            True at the chosen rows, bool [rows].
        """
        device = self.generator.device
        offset = torch.rand(1, generator=self.generator, device=device, dtype=torch.float64)
        places = self._places(rows)
        return torch.floor((places + 1) * share + offset) > torch.floor(places * share + offset)

    def low_discrepancy(self, rows: int) -> Tensor:
        """Draw stratified times in [0, 1), float32 [rows].

        The times of the global batch are an even grid, shifted by one uniform random offset modulo 1 (VDM, arXiv
        2107.00630).

        Args:
            rows: Number of rows to return, from row ``start`` of the global batch on.
        """
        total = self.total or self.start + rows
        offset = torch.rand(1, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        grid = self._places(rows).double() / total
        # float32 rounds a value just below 1 up to 1; the clamp keeps the interval half-open
        return ((offset + grid) % 1.0).float().clamp(max=1 - 2**-24)

    def _places(self, rows: int) -> Tensor:
        """Return the indices of the rows in the global batch, int64 [rows]."""
        places = torch.arange(self.start, self.start + rows, device=self.generator.device)
        return places if self.total is None else places % self.total
