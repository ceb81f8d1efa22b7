"""Noise that masks tokens and takes the masks out: strings whose length the model chooses, with an any-order masked model
inside (FlexMDM, arXiv 2509.01025).

FlexMDM's time s runs from the empty string to data, ours from data to noise: s = 1 - t. There a token is put in as a mask by
schedule a(s), and then filled by b(s), given that it is there. Here lam = 1 - exp(-sigma) is the share that is not there, so
a(s) = exp(-sigma(t)), and the schedule of filling is 1 - b = (1 - a)^pace. On the clock -log lam = -log(1 - a) both have
a constant rate: every token that is missing is put in at rate 1, every mask is filled at rate ``pace``, each by itself. What follows
is that two-step process in closed form.

Axes: b rows, w = 1 + tokens of a noisy row (padded), n tokens of a clean row (padded), v data tokens.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.component.outputs import LOG_X0, Output
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.numerics import log1mexp
from sedd_graph.diffusion.strings.kernel import LEAST, StringDraw, StringKernel
from sedd_graph.diffusion.strings.strings import Strings, distinct, rebuild
from sedd_graph.diffusion.strings.subsequence import embed

LOG_GAP = Output("log_gap", "float b l", "log of the expected number of tokens missing behind a position")

__all__ = ["MASKS_AND_DELETES", "FlexDraw", "FlexKernel", "FlexTarget"]

MASKS_AND_DELETES = "a kernel that masks tokens and deletes masks, such as mask_delete"
"""What some parts need, as the rest of a sentence."""


@dataclasses.dataclass(frozen=True)
class FlexTarget:
    """What the heads should say of a noisy string, float32, and the sums that do not depend on them.

    ``missing`` [b, w]: how many tokens are missing in each gap. ``filled`` [b, k, w]: the chance that what stands under the mask at
    a position is ``symbols`` int64 [b, k, w], of which there are k; 0 where there is no mask. ``constant`` [b, 2]: sums of
    a log a - a over gaps, and of a log a over masks.
    """

    missing: Tensor
    filled: Tensor
    symbols: Tensor
    constant: Tensor


@dataclasses.dataclass(frozen=True)
class FlexDraw(StringDraw):
    """``weights`` float32 [b, 2]: what the sums over gaps and over masks are multiplied by; ``constant`` float32 [b] is added.
    The rest as in :class:`FlexTarget`."""

    missing: Tensor
    filled: Tensor
    symbols: Tensor
    weights: Tensor
    constant: Tensor


class FlexKernel(StringKernel):
    """Of the data tokens, the mask and the start (the last two states), in this order.

    The heads say what a gap and a mask hold, whatever the clock: ``log_gap`` [b, w] the log of the expected number of tokens that
    are missing behind a position, ``log_x0`` [b, w, v + 1] log chances of the token under a mask.
    """

    abstract: ClassVar[bool] = True

    @property
    @abstractmethod
    def pace(self) -> float:
        """The rate at which a mask is filled, where a missing token is put in at rate 1."""

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        return ((LOG_X0, LOG_GAP),)

    @property
    def spares(self) -> bool:
        return True

    @property
    def mask(self) -> int:
        return self.states - 2

    @property
    def data_tokens(self) -> int:
        return self.states - 2

    # -- the process, in closed form ----------------------------------------------------------------------------------

    def masked(self, sigma: Tensor) -> Tensor:
        """The chance that a token is a mask at total noise ``sigma`` [b]; float64. It is not there at all with chance
        1 - exp(-sigma).

        (lam - lam^pace) / (pace - 1), which for pace 1 is -lam log lam.
        """
        log_lam = log1mexp(sigma.double())
        rest = (1 - self.pace) * log_lam  # lam^pace = lam exp(-rest)
        small = rest.abs() < 1e-8
        share = torch.where(small, 1 - rest / 2, -torch.expm1(-rest) / torch.where(small, 1.0, rest))
        return -torch.exp(log_lam) * log_lam * share

    def weights(self, sigma: Tensor) -> Tensor:
        """[b, 2]: the rate per unit of sigma at which one missing token is put in, and one mask filled; float64."""
        insert = 1 / torch.expm1(sigma.double())
        return torch.stack([insert, self.pace * insert], -1)

    def leap(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """[b, 2]: the chances that one missing token is put in, and one mask filled, on the way from ``sigma`` down."""
        passed = log1mexp(sigma.double()) - log1mexp(sigma_next.double())
        return torch.stack([-torch.expm1(-passed), -torch.expm1(-self.pace * passed)], -1)

    def clock(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Total noise at ``u`` [b] in (0, 1) on a clock of bounds, and its derivative: all noise, from where one token in
        10,000 is missing. It dwells on little noise, where edits are rare and weigh much."""
        return -torch.log1p(-(LEAST + (1 - LEAST) * u**2)), 2 * u / ((1 - u) * (1 + u))

    # -- strings ------------------------------------------------------------------------------------------------------

    def sample(self, batch: Batch, sigma: Tensor, *, random: Randomness, width: int | None) -> Strings:
        """As declared; only ``corrupt`` positions are masked or go."""
        rows, size = batch.tokens.shape
        u = random.rand(rows, size).double()
        gone = -torch.expm1(-sigma.double())[:, None]
        keep = batch.attend & ~(batch.corrupt & (u < gone))
        hidden = keep & batch.corrupt & (u < gone + self.masked(sigma)[:, None])
        first = torch.ones_like(batch.attend[:, :1])
        tokens = F.pad(torch.where(hidden, self.mask, batch.tokens), (1, 0), value=self.start)
        none = torch.zeros_like(tokens)
        made = rebuild(tokens, torch.cat([first, keep], 1), none, lambda at: at, start=self.start, width=width)
        return dataclasses.replace(made, kept=keep)

    def prior(self, rows: int, *, longest: int, generator: torch.Generator, allowed: Tensor | None) -> Strings:
        """The start alone."""
        tokens = torch.full((rows, 1), self.start, device=generator.device)
        return Strings(tokens, torch.ones_like(tokens, dtype=torch.bool))

    # -- what the heads should say -----------------------------------------------------------------------------------

    def target(self, batch: Batch, strings: Strings) -> FlexTarget:
        """The means over all ways in which the string can have come from the clean one, all of which are equally likely."""
        noisy, masks = strings.tokens[:, 1:], self.masks(strings)
        fits = (batch.tokens[..., None] == noisy[:, None]) | (batch.corrupt[..., None] & masks[:, None, 1:])
        spared = batch.attend & ~batch.corrupt
        if bool(spared.any()):
            # what is spared comes first, in the same places of both strings, and is nothing but itself
            at = torch.arange(noisy.shape[1], device=noisy.device)
            same = torch.arange(batch.width, device=noisy.device)[:, None] == at
            held = spared[..., None] | (at < spared.sum(-1, keepdim=True))[:, None]
            fits = torch.where(held, same, fits)
        found = embed(fits, batch.attend.sum(-1), strings.lengths)
        stands = F.pad(found.stands * masks[:, None, 1:], (1, 0))
        symbols, place = distinct(torch.where(batch.attend, batch.tokens, self.start), self.start)
        filled = torch.zeros_like(stands).scatter_add_(1, place[..., None].expand_as(stands), stands)
        symbols = symbols.clamp(max=self.mask)[..., None].expand_as(filled)
        return self._target(strings, found.missing, filled, symbols)

    def sampled_target(self, batch: Batch, strings: Strings) -> FlexTarget:
        """What was masked and deleted itself (the paper's targets): of the same mean given both strings, for no work and
        more variance. Only for strings that :meth:`sample` made."""
        keep = strings.kept
        assert keep is not None
        width = strings.tokens.shape[1]
        gone, gap = batch.attend & ~keep, keep.long().cumsum(-1).clamp(max=width - 1)
        missing = torch.zeros(strings.tokens.shape, dtype=torch.float64, device=gap.device)
        missing.scatter_add_(1, gap, gone.double())
        clean = F.pad(batch.tokens, (1, 0), value=self.start)
        whole = F.pad(keep, (1, 0), value=True)
        symbols = rebuild(clean, whole, torch.zeros_like(clean), lambda at: at, start=self.start, width=width).tokens
        filled = self.masks(strings)[:, None].double()
        return self._target(strings, missing, filled, symbols.clamp(max=self.mask)[:, None])

    def masks(self, strings: Strings) -> Tensor:
        """Where the masks are, bool [b, w]."""
        return strings.attend & (strings.tokens == self.mask)

    def _target(self, strings: Strings, missing: Tensor, filled: Tensor, symbols: Tensor) -> FlexTarget:
        missing = missing * strings.attend
        gaps = (torch.xlogy(missing, missing) - missing).sum(-1)
        constant = torch.stack([gaps, torch.xlogy(filled, filled).sum((1, 2))], -1)
        return FlexTarget(missing.float(), filled.float(), symbols, constant.float())
