"""What the process is given and what it draws: token rows with the roles of their positions, and corrupted rows; and the
rows of a flow.

Axes: b batch, l length.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Batch", "Draw", "PointBatch", "Randomness"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Clean rows ``tokens`` int64 [b, l] and three roles, bool [b, l]: ``attend`` (may be looked at), ``corrupt`` (noised in
    the forward process) and ``loss`` (counted). Padding has none of them; a prompt is attended to and nothing else."""

    tokens: Tensor
    attend: Tensor
    corrupt: Tensor
    loss: Tensor

    @classmethod
    def of(cls, tokens: Tensor) -> Batch:
        """Every position attends, is corrupted, and counts."""
        every = torch.ones_like(tokens, dtype=torch.bool)
        return cls(tokens, every, every, every)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def width(self) -> int:
        """Positions of a row."""
        return self.tokens.shape[1]

    @property
    def counted(self) -> Tensor:
        """int64 [b]: how many positions of each row the loss is over."""
        return (self.loss & self.corrupt).sum(-1)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)))

    def rows(self, start: int, stop: int) -> Batch:
        return Batch(*(getattr(self, f.name)[start:stop] for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class PointBatch:
    """Rows of real numbers ``x`` float32 [b, ...]: what a flow learns from. Every number counts."""

    x: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.x[0].numel()

    @property
    def counted(self) -> Tensor:
        """int64 [b]: how many numbers of each row the loss is over."""
        return torch.full((len(self.x),), self.width, device=self.x.device)

    def to(self, device: torch.device | str) -> PointBatch:
        return PointBatch(self.x.to(device, non_blocking=True))


@dataclasses.dataclass(frozen=True)
class Draw:
    """One draw of the forward process for a batch: ``xt`` int64 [b, l]; ``t``, ``sigma``, ``dsigma`` and ``weight`` float32 [b].

    An objective may draw several corrupted rows for each clean one: c b rows, the batch c times over. Under an objective of
    blocks the last four are [b, k], one for each of a row's k blocks.

    ``weight`` makes the mean of the loss over draws an integral: the width of the range that ``t`` was drawn from, or
    the factor of the count form.
    """

    xt: Tensor
    t: Tensor
    sigma: Tensor
    dsigma: Tensor
    weight: Tensor


class Randomness:
    """Uniform numbers for some rows of a global batch, as if the whole of it had been drawn at once.

    Ranks and accumulation steps each take their own rows (``start`` of ``total``) of the same numbers, so the split of
    a batch over processes changes nothing.
    """

    def __init__(self, generator: torch.Generator, *, start: int = 0, total: int | None = None) -> None:
        self.generator, self.start, self.total = generator, start, total

    def rand(self, rows: int, *shape: int) -> Tensor:
        """float32 [rows, *shape] in [0, 1)."""
        total = self.total or self.start + rows
        drawn = torch.rand(total, *shape, generator=self.generator, device=self.generator.device)
        return drawn[self.start : self.start + rows]

    def keys(self, rows: int) -> Tensor:
        """int32 [rows]: what each row's network randomness is drawn from (:mod:`sedd_graph.component.counter_rng`)."""
        total = self.total or self.start + rows
        device = self.generator.device
        drawn = torch.randint(-(2**31), 2**31, (total,), generator=self.generator, device=device)
        return drawn[self.start : self.start + rows].int()

    def low_discrepancy(self, rows: int) -> Tensor:
        """float32 [rows] in [0, 1): one offset, then an even grid over the global batch (VDM, arXiv 2107.00630)."""
        total = self.total or self.start + rows
        offset = torch.rand(1, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        grid = torch.arange(self.start, self.start + rows, device=self.generator.device, dtype=torch.float64) / total
        # float32 rounds a value just below 1 up to 1: keep the range half open.
        return ((offset + grid) % 1.0).float().clamp(max=1 - 2**-24)
