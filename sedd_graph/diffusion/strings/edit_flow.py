"""Edit Flows (arXiv 2506.09018): noise and text are aligned in columns, each of which switches at its own random time.

The paper's time runs from noise (0) to text (1); the time here runs from text to noise. The paper's kappa, the
probability that a column is clean, is alpha = exp(-sigma) here, so every schedule here is one of the paper's. The rate
at which a column becomes clean, kappa' / (1 - kappa), is 1 / expm1(sigma) per unit of sigma. Axes: b rows, m noise
tokens, n clean tokens, w positions of a noisy string, v data tokens.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.categorical import inverse_cdf
from sedd_graph.diffusion.strings.aligned_noise import AlignedNoise
from sedd_graph.diffusion.strings.columns import BLANK, Columns, Remaining, partway
from sedd_graph.diffusion.strings.fates import Fates
from sedd_graph.diffusion.strings.kernel import LEAST, StringKernel
from sedd_graph.diffusion.strings.strings import Strings

__all__ = ["EDIT_FLOWS", "EditFlowKernel"]

EDIT_FLOWS = "a kernel of Edit Flows (edit_flow)"
"""Phrase for error messages of components that require an :class:`EditFlowKernel`."""


class EditFlowKernel(StringKernel):
    """A kernel of Edit Flows. The prior is a string of geometric length with independent tokens of frequencies ``law``.

    The network's outputs are ``log_insert`` [b, w, v], ``log_delete`` [b, w] and ``log_substitute`` [b, w, v]: the log
    of the expected number of columns that still have their noise entry and require this edit. If the prior is the empty
    string (``spread`` 0), ``log_insert`` is the only output, and a noisy string retains each clean token independently
    with probability exp(-sigma), as under a kernel that deletes tokens at rate 1.
    """

    abstract: ClassVar[bool] = True
    law: Tensor
    """Frequencies of noise tokens, float64 [v], all positive."""

    @property
    @abstractmethod
    def spread(self) -> float:
        """Ratio of the geometric length distribution of the prior, at least 0 and below 1.

        A string from the prior has k or more tokens with probability ``spread ** k``, before truncation.
        """

    @property
    def longest(self) -> int | None:
        """Largest number of tokens of a string from the prior; None: unlimited."""
        return None

    @abstractmethod
    def align(self, noise: Tensor, clean: Tensor) -> Columns:
        """Return an alignment of each noise string with its clean string, such as one with the fewest edits.

        Its columns, each a pair of noise token and clean token or blank, determine the edits that the network learns.

        Args:
            noise: Tokens of strings from the prior, int64 [b, m], :data:`BLANK` at padding.
            clean: Clean tokens, int64 [b, n], :data:`BLANK` at padding.
        """

    def refuses_prompts(self) -> str | None:
        if not self.spread:
            return None
        return (
            "generation starts from noise tokens, and the network would edit given text like noise: "
            "take edit_flow with mean_length 0, delete or indel"
        )

    def fates(self, sigma: float, start: float = 0.0) -> Fates | None:
        if self.spread:
            return None
        every = torch.ones(self.states, dtype=torch.float64)
        survive = torch.exp(start - sigma * every)
        return Fates(survive, 0 * every, 1 - survive, 0.0, 0.0, 0 * every)

    def aligned_noise(self, sigma: float) -> AlignedNoise | None:
        if not self.spread:
            return None
        return AlignedNoise(math.exp(-sigma), self.spread, self.longest, self.law, self.align)

    def weights(self, sigma: Tensor) -> Tensor:
        return (1 / torch.expm1(sigma))[:, None].expand(-1, 3)

    def leap(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Return the probability that a column switches to its clean entry in a step from ``sigma`` to ``sigma_next``.

        A column is a pair of entries (tokens or blanks) of an aligned noise string and clean string. The probability
        is conditional on the column having its noise entry at ``sigma``.

        Args:
            sigma: Total noise, [b].
            sigma_next: Total noise after the step, [b].

        Returns:
            [b, 3], equal for insertions, deletions and substitutions.
        """
        return (torch.expm1(sigma - sigma_next) / torch.expm1(sigma))[:, None].expand(-1, 3)

    def clock(self, u: Tensor, end: float) -> tuple[Tensor, Tensor]:
        """Map a uniform variable ``u`` to total noise, for Monte Carlo estimates of the bound on -log p(x_0).

        The probability that a column of the alignment has its noise entry, 1 - exp(-sigma), is cubic in ``u``, from
        1e-4 to 1.

        Args:
            u: Uniform numbers in (0, 1), [b].
            end: Not used.

        Returns:
            Total noise and its derivative in ``u``, [b] each.
        """
        return -torch.log1p(-(LEAST + (1 - LEAST) * u**3)), 3 * u**2 / ((1 - u) * (1 + u * (1 + u)))

    def noise(
        self, rows: int, *, longest: int | None, random: Randomness, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw strings from the prior, without the BOS token.

        Args:
            rows: Number of strings, b.
            longest: Largest number of tokens, in addition to the kernel's own limit; None: no additional limit.
            random: Source of uniform numbers.
            allowed: bool [v], tokens that may be drawn; None: all.

        Returns:
            Tokens int64 [b, m], :data:`BLANK` at padding, and lengths int64 [b]. m is the smaller one of the two
            limits; without limits, the length of the longest string; 0 if the prior is the empty string.
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
        """Draw the noisy strings of a batch, and the edits from them to the clean strings.

        A noise string is drawn for each clean string and aligned with it; each column is clean with probability
        exp(-sigma).

        Args:
            batch: Clean strings.
            sigma: Total noise, [b].
            random: Source of uniform numbers.
            width: Number of positions w of the result, the BOS token included. Noise strings are drawn with at most
                ``width - 1`` tokens; tokens of the noisy strings beyond ``width``, and edits of them, are dropped, and
                the dropped tokens are counted in :attr:`Strings.cut`. None: no limit.
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
