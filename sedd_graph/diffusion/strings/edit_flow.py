"""Edit Flows (arXiv 2506.09018): text is come to from noise in columns, each by itself, at its own random time.

The paper's time runs from noise (0) to text (1), ours from text to noise. All of it is turned round here: the chance that a column
is clean, its kappa, is our alpha = exp(-sigma), so any schedule of ours is one of theirs, and kappa'/(1 - kappa), the rate at
which a column comes to be clean, is 1/expm1(sigma) per unit of sigma. Axes: b rows, n clean tokens, v data tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.categorical import inverse_cdf
from sedd_graph.diffusion.strings.columns import BLANK, Columns, Remaining, partway
from sedd_graph.diffusion.strings.kernel import LEAST, StringKernel
from sedd_graph.diffusion.strings.strings import Strings

__all__ = ["EDIT_FLOWS", "EditFlowKernel"]

EDIT_FLOWS = "a kernel of Edit Flows (edit_flow)"
"""What some parts need, as the rest of a sentence."""


class EditFlowKernel(StringKernel):
    """Noise is a string of its own: ``spread`` to the power of k is the chance of k tokens or more, given that there are no more
    than ``longest``; each is drawn by ``law``.

    What the heads say is the chance that a column with that edit is still to be moved: ``log_insert`` [b, w, v], ``log_delete``
    [b, w] and ``log_substitute`` [b, w, v]. Where noise is the empty string (``spread`` 0) there is only the first, and
    noisy strings are those of deletion.
    """

    abstract: ClassVar[bool] = True
    law: Tensor
    """float64 [v]: frequencies of noise tokens, all positive."""

    @property
    @abstractmethod
    def spread(self) -> float:
        """From 0 to below 1."""

    @property
    def longest(self) -> int | None:
        """Most tokens that noise can have; None: any number."""
        return None

    @abstractmethod
    def align(self, noise: Tensor, clean: Tensor) -> Columns:
        """Rows int64 [b, m] and [b, n], blank behind their ends, in columns."""

    def holds_nothing(self) -> str | None:
        if not self.spread:
            return None
        return (
            "generation begins with noise that is text of its own, and given text in its place would be taken for noise that is "
            "to be edited away: take edit_flow with mean_length 0, delete or indel"
        )

    def weights(self, sigma: Tensor) -> Tensor:
        return (1 / torch.expm1(sigma))[:, None].expand(-1, 3)

    def leap(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """[b, 3]: the chance that a column which is noise at ``sigma`` is clean at ``sigma_next``."""
        return (torch.expm1(sigma - sigma_next) / torch.expm1(sigma))[:, None].expand(-1, 3)

    def clock(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Total noise at ``u`` [b] in (0, 1) on a clock of bounds, and its derivative: from where one column in 10,000 is noise
        to where all are. It dwells on little noise, where edits are rare and weigh much."""
        return -torch.log1p(-(LEAST + (1 - LEAST) * u**3)), 3 * u**2 / ((1 - u) * (1 + u * (1 + u)))

    def noise(
        self, rows: int, *, longest: int | None, random: Randomness, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Noise without the start: int64 [b, m], blank behind the ends, and lengths int64 [b], which have their law given
        that they are at most ``longest``. m is what there can be at most, or where nothing says that, what is longest here."""
        device = random.generator.device
        if not self.spread:
            return torch.zeros(rows, 0, dtype=torch.int64, device=device), torch.zeros(
                rows, dtype=torch.int64, device=device
            )
        if self.longest is not None:
            longest = self.longest if longest is None else min(longest, self.longest)
        base = torch.tensor(self.spread, dtype=torch.float64, device=device)
        u = random.rand48(rows)
        if longest is not None:
            u = u * (1 - base ** (longest + 1))
        lengths = torch.floor(torch.log1p(-u) / base.log()).long()
        size = int(lengths.max()) if longest is None else longest
        lengths = lengths.clamp(max=size)
        law = self.law.to(device) if allowed is None else self.law.to(device) * allowed
        tokens = inverse_cdf(law.cumsum(0), random.rand48(rows, size))
        return torch.where(torch.arange(size, device=device) < lengths[:, None], tokens, BLANK), lengths

    def sample(
        self, batch: Batch, sigma: Tensor, *, random: Randomness, width: int | None
    ) -> tuple[Strings, Remaining]:
        """Noisy strings of the rows of ``batch`` at total noise ``sigma`` [b], each with noise of its own, and what is left to do.

        ``width``: as for :func:`~sedd_graph.diffusion.strings.columns.partway`; noise is then of fewer tokens.
        """
        noise, _ = self.noise(len(batch), longest=None if width is None else width - 1, random=random)
        columns = self.align(noise, torch.where(batch.attend, batch.tokens, BLANK))
        moved = random.rand(*columns.noise.shape).double() < torch.exp(-sigma.double())[:, None]
        return partway(columns, moved, start=self.start, width=width)

    def prior(self, rows: int, *, longest: int, generator: torch.Generator, allowed: Tensor | None) -> Strings:
        found, lengths = self.noise(rows, longest=longest, random=Randomness(generator), allowed=allowed)
        size = int(lengths.max())
        tokens = torch.where(found == BLANK, self.start, found)[:, :size]
        start = tokens.new_full((rows, 1), self.start)
        return Strings(torch.cat([start, tokens], 1), torch.arange(size + 1, device=tokens.device) <= lengths[:, None])
