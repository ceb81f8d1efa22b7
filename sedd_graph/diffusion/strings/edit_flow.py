"""Edit Flows (arXiv 2506.09018): noise and text are aligned in columns, each of which switches at its own random time.

The paper's time runs from noise (0) to text (1), ours from text to noise. Its kappa, the probability that a column is clean,
is our alpha = exp(-sigma), so every schedule of ours is one of the paper's; kappa' / (1 - kappa), the rate at which a column
becomes clean, is 1 / expm1(sigma) per unit of sigma. Axes: b rows, m noise tokens, n clean tokens, w positions of a noisy string,
v data tokens.
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
"""Completes the message of a component that needs an :class:`EditFlowKernel`."""


class EditFlowKernel(StringKernel):
    """A kernel of Edit Flows. Noise is a string of independent tokens with frequencies ``law``, of geometric length.

    The network's outputs are log-probabilities that a column with the given edit has not yet switched: ``log_insert`` [b, w, v],
    ``log_delete`` [b, w] and ``log_substitute`` [b, w, v]. If noise is the empty string (``spread`` 0), there is only the first,
    and noisy strings are distributed as those of deletion.
    """

    abstract: ClassVar[bool] = True
    law: Tensor
    """float64 [v], frequencies of noise tokens, all positive."""

    @property
    @abstractmethod
    def spread(self) -> float:
        """Ratio of the geometric length of noise, at least 0 and below 1: P(k tokens or more) is its power k, before truncation."""

    @property
    def longest(self) -> int | None:
        """Largest number of tokens of noise; None: unlimited."""
        return None

    @abstractmethod
    def align(self, noise: Tensor, clean: Tensor) -> Columns:
        """Align ``noise`` int64 [b, m] with ``clean`` int64 [b, n], both :data:`BLANK` behind their ends."""

    def refuses_prompts(self) -> str | None:
        if not self.spread:
            return None
        return (
            "generation starts from noise tokens, and the network would edit given text like noise: "
            "take edit_flow with mean_length 0, delete or indel"
        )

    def weights(self, sigma: Tensor) -> Tensor:
        return (1 / torch.expm1(sigma))[:, None].expand(-1, 3)

    def leap(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Return the probability that a column which is noise at ``sigma`` is clean at ``sigma_next``, [b, 3]."""
        return (torch.expm1(sigma - sigma_next) / torch.expm1(sigma))[:, None].expand(-1, 3)

    def clock(self, u: Tensor, end: float) -> tuple[Tensor, Tensor]:
        """Return total noise at ``u`` [b] in (0, 1), and its derivative: the share of noise columns is cubic, from 1e-4 to 1."""
        return -torch.log1p(-(LEAST + (1 - LEAST) * u**3)), 3 * u**2 / ((1 - u) * (1 + u * (1 + u)))

    def noise(
        self, rows: int, *, longest: int | None, random: Randomness, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw noise without the start state.

        Args:
            rows: Number of strings, b.
            longest: Largest number of tokens, in addition to the kernel's own limit; None: no other limit.
            random: Source of uniform numbers.
            allowed: bool [v], tokens that may be drawn; None: all.

        Returns:
            Tokens int64 [b, m], :data:`BLANK` behind the ends, and lengths int64 [b]; m is the limit if there is one.
        """
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
        """Draw x_t between a clean string and a noise string, for each row of a batch.

        Args:
            batch: Clean strings x_0.
            sigma: Total noise, [b].
            random: Source of uniform numbers.
            width: Positions w of the result, as for :func:`~sedd_graph.diffusion.strings.columns.partway`. The noise strings
                are drawn with at most w - 1 tokens.

        Returns:
            The noisy strings x_t, and the edits that turn each into its clean string.
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
