"""Noise of a sampling run in which each row has a seed of its own, so that it does not depend on the rest of the batch.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.draws import placed_uniform
from sedd_graph.diffusion.tokens.addressed_noise import SHARED, seed_of
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.noise_tape import NoiseTape

__all__ = ["RowNoise", "part_seeds"]

_PART = 7
"""Number of the stream of a seed, beside those of a noise tape, from which the seeds of a row's parts are drawn."""

_CALLS = 2**20
"""Distance between the numbers of the first calls of two steps."""


class RowNoise(NoiseTape):
    """Noise that is a function of a row's seed and of the place of each choice among the row's visible positions.

    A row is therefore drawn with the same noise alone and in any batch, and with padding on the left, on the right or
    nowhere. Rows of the same seed, length and prompt are equal.

    Args:
        seeds: Seed of each row, int64 [b].
        visible: bool [b, l], False at padding.
        device: Device of the rows.
        start: Initial rows, int64 [b, l]; None for a part of a row.
    """

    def __init__(self, seeds: Tensor, visible: Tensor, *, device: torch.device, start: Tensor | None = None) -> None:
        self._visible = visible.to(device)
        # padding is numbered after the row's own positions
        count = self._visible.sum(-1, keepdim=True)
        places = torch.where(self._visible, self._visible.cumsum(-1), count + (~self._visible).cumsum(-1)) - 1
        super().__init__(seeds, device=device, start=start, places=places)

    @classmethod
    def of(cls, kernel: Kernel, seeds: Tensor, visible: Tensor, *, allowed: Tensor, device: torch.device) -> RowNoise:
        """Return the noise of rows that start at the prior of a kernel.

        Args:
            kernel: The forward process.
            seeds: Seed of each row, int64 [b].
            visible: bool [b, l], False at padding.
            allowed: bool [n], tokens that the initial rows may have.
            device: Device of the rows.
        """
        start = torch.zeros(visible.shape, dtype=torch.int64, device=device)
        for row, own in enumerate(visible.to(device)):
            random = _generator(seeds[row : row + 1], 0, device)
            start[row, own] = kernel.prior(1, int(own.sum()), generator=random, allowed=allowed)[0]
        return cls(seeds, visible, device=device, start=start)

    @classmethod
    def of_parts(cls, seeds: Tensor, length: int, *, device: torch.device) -> RowNoise:
        """Return the noise of parts of rows, such as the blocks of block diffusion.

        Args:
            seeds: Seed of each part, int64 [b] (:func:`part_seeds`).
            length: Number of positions of a part.
            device: Device of the rows.
        """
        made = cls(seeds, torch.ones(len(seeds), length, dtype=torch.bool), device=device)
        made._places = made._position = torch.arange(length, device=device).expand(len(seeds), -1)
        return made

    @property
    def call(self) -> int:
        """Number of the next choice, part of its address. A run that is continued elsewhere starts at this number there."""
        return self._log.call

    @call.setter
    def call(self, number: int) -> None:
        self._log.call = number

    def begin_step(self, step: int, x: Tensor) -> None:
        # a sampler may leave out a call where no row needs it, and later calls must not move up
        self._log.call = (step + 1) * _CALLS

    def _grouped_visible(self, rows: int) -> Tensor:
        """Return the mask of visible positions of all rows, bool [rows, l], each row repeated for its particles."""
        return self._visible.repeat_interleave(rows // len(self._visible), 0)

    def noisy(self, kernel: Kernel, x: Tensor, sigma: Tensor, *, corrupt: Tensor) -> Tensor:
        call, out = self._next(), x.clone()
        for row, own in enumerate(self._grouped_visible(len(x))):
            one = slice(row, row + 1)
            random = Randomness(_generator(self._seeds[one], 1 + call, x.device))
            out[row, own] = kernel.sample(x[one, own], sigma[one], random=random, corrupt=corrupt[one, own])[0]
        return out

    def replaced(self, x: Tensor, wrong: Tensor, allowed: Tensor) -> Tensor:
        (row, place), call, out = wrong.nonzero(as_tuple=True), self._next(), x.clone()
        out[row, place] = self._tokens(call, allowed[row, place].double().log(), row, place)
        return out

    def part(self, start: int, stop: int) -> RowNoise:
        return RowNoise.of_parts(part_seeds(self._seeds, start), stop - start, device=self.generator.device)


def part_seeds(seeds: Tensor, start: Tensor | int) -> Tensor:
    """Return the seeds of parts of rows, int64 [b].

    Args:
        seeds: Seed of each row, int64 [b].
        start: Position in the row at which the part starts, or int64 [b].
    """
    return (placed_uniform(seeds, _PART, start) * 2.0**52).long()


def _generator(seed: Tensor, number: int, device: torch.device) -> torch.Generator:
    """Return the generator of one row for one application of the kernel."""
    return torch.Generator(device).manual_seed(seed_of(seed, SHARED + 16 + number))
