"""Batches of training data, draws of the forward process, and the random numbers of a global batch.

Axes: b batch, l length.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Batch", "Draw", "PointBatch", "Randomness"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Clean token rows and three masks over their positions.

    Padding is False in all three masks. A prompt is True in ``attend`` only.

    Attributes:
        tokens: int64 [b, l], the clean tokens x_0.
        attend: bool [b, l], positions that the network may attend to.
        corrupt: bool [b, l], positions that the forward process may change.
        loss: bool [b, l], positions that the loss is summed over.
    """

    tokens: Tensor
    attend: Tensor
    corrupt: Tensor
    loss: Tensor

    @classmethod
    def of(cls, tokens: Tensor) -> Batch:
        """Return a batch in which every position is attended to, corrupted and counted in the loss."""
        every = torch.ones_like(tokens, dtype=torch.bool)
        return cls(tokens, every, every, every)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def width(self) -> int:
        """Positions per row, l."""
        return self.tokens.shape[1]

    @property
    def counted(self) -> Tensor:
        """Number of positions per row that the loss is summed over, int64 [b]."""
        return (self.loss & self.corrupt).sum(-1)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)))

    def rows(self, start: int, stop: int) -> Batch:
        """Return rows ``start`` to ``stop`` (exclusive)."""
        return Batch(*(getattr(self, f.name)[start:stop] for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class PointBatch:
    """Rows of real numbers, the training data of a flow; the loss covers every number.

    Attributes:
        x: float32 [b, ...].
    """

    x: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def width(self) -> int:
        """Numbers per row."""
        return self.x[0].numel()

    @property
    def counted(self) -> Tensor:
        """Number of entries per row that the loss is summed over, int64 [b]."""
        return torch.full((len(self.x),), self.width, device=self.x.device)

    def to(self, device: torch.device | str) -> PointBatch:
        """Return the batch on ``device``."""
        return PointBatch(self.x.to(device, non_blocking=True))


@dataclasses.dataclass(frozen=True)
class Draw:
    """One draw of the forward process for a batch.

    An objective may draw c corrupted rows for each clean row: all tensors then have c b rows, the batch repeated c times.
    Under a block objective ``t``, ``sigma``, ``dsigma`` and ``weight`` are [b, k], one entry for each of a row's k blocks.

    Attributes:
        xt: int64 [b, l], the corrupted tokens x_t.
        t: float32 [b], times in [0, 1].
        sigma: float32 [b], total noise at ``t``.
        dsigma: float32 [b], the derivative of total noise in t.
        weight: float32 [b], the factor by which the mean of the loss over draws becomes the integral over t: the width of
            the interval that ``t`` is drawn from, or the factor of the sum over mask counts.
    """

    xt: Tensor
    t: Tensor
    sigma: Tensor
    dsigma: Tensor
    weight: Tensor


class Randomness:
    """Uniform random numbers for a slice of a global batch.

    Every rank and accumulation step draws the numbers of the whole global batch from the same generator state and takes its
    own rows, so results do not depend on how the batch is split.

    Args:
        generator: The source of the numbers; results are on its device.
        start: Index of this slice's first row in the global batch.
        total: Rows of the global batch; None: the slice ends the batch.
    """

    def __init__(self, generator: torch.Generator, *, start: int = 0, total: int | None = None) -> None:
        self.generator, self.start, self.total = generator, start, total

    def rand(self, rows: int, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1), float32 ``[rows, *shape]``, of 24 random bits each."""
        total = self.total or self.start + rows
        drawn = torch.rand(total, *shape, generator=self.generator, device=self.generator.device)
        return drawn[self.start : self.start + rows]

    def rand48(self, rows: int, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1), float64 ``[rows, *shape]``, of 48 random bits each.

        The inverse CDF of a large vocabulary needs them: 24 bits never reach a token of probability 1e-8.
        """
        return self.rand(rows, *shape).double() + self.rand(rows, *shape).double() * 2**-24

    def keys(self, rows: int) -> Tensor:
        """Draw one key per row for :mod:`sedd_graph.component.counter_rng`, int32 [rows]."""
        total = self.total or self.start + rows
        device = self.generator.device
        drawn = torch.randint(-(2**31), 2**31, (total,), generator=self.generator, device=device)
        return drawn[self.start : self.start + rows].int()

    def low_discrepancy(self, rows: int) -> Tensor:
        """Draw stratified times in [0, 1), float32 [rows]: an even grid over the global batch, shifted by one uniform number
        modulo 1 (VDM, arXiv 2107.00630)."""
        total = self.total or self.start + rows
        offset = torch.rand(1, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        grid = torch.arange(self.start, self.start + rows, device=self.generator.device, dtype=torch.float64) / total
        # float32 rounds a value just below 1 up to 1; the clamp keeps the interval half-open
        return ((offset + grid) % 1.0).float().clamp(max=1 - 2**-24)
