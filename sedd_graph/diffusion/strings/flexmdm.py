"""FlexMDM (arXiv 2509.01025) in closed form: masked diffusion of strings whose length the model chooses.

Noise masks tokens and deletes masks; generation inserts masks and unmasks them. The paper's time s runs from the empty
string (0) to data (1); the time here is ``t = 1 - s``. In the paper, a(s) is the probability that a token has been
inserted by time s, and b(s) is the schedule by which inserted tokens are unmasked. Here a = exp(-sigma(t)), so that
lam = 1 - exp(-sigma) = 1 - a is the fraction of deleted tokens, and 1 - b = (1 - a)^pace. The number ``pace`` is the
rate of unmasking divided by the rate of insertion: if time is measured by -log lam, every missing token is inserted at
rate 1 and every mask is unmasked at rate ``pace``, independently.

Axes: b rows, w positions of a noisy string (the BOS token first, padded), n tokens of a clean string (padded), v data
tokens, k candidate tokens of a mask.
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
from sedd_graph.diffusion.strings.fates import Fates
from sedd_graph.diffusion.strings.kernel import StringDraw, StringKernel, square_clock
from sedd_graph.diffusion.strings.strings import Strings, distinct, rebuild
from sedd_graph.diffusion.strings.subsequence import embed

LOG_GAP = Output("log_gap", "float b l", "log of the expected number of tokens missing behind a position")

__all__ = ["MASKS_AND_DELETES", "FlexDraw", "FlexKernel", "FlexTarget"]

MASKS_AND_DELETES = "a kernel that masks tokens and deletes masks, such as mask_delete"
"""Phrase for error messages of components that require a :class:`FlexKernel`."""


@dataclasses.dataclass(frozen=True)
class FlexTarget:
    """Regression targets of the network for a noisy string, and constants of the loss.

    All tensors except ``symbols`` are float32. Gap j is the place for insertions behind position j.

    Attributes:
        missing: [b, w], the expected number of tokens missing in each gap.
        filled: [b, k, w], the probability that the token under a mask is each of the candidates ``symbols``; 0 at
            positions without mask.
        symbols: int64 [b, k, w], candidate tokens.
        constant: [b, 2], terms of the loss that do not depend on the network: the sum of g log g - g over the entries g
            of ``missing``, and of p log p over the entries p of ``filled``. They make the loss 0 if the outputs equal
            the targets.
    """

    missing: Tensor
    filled: Tensor
    symbols: Tensor
    constant: Tensor


@dataclasses.dataclass(frozen=True)
class FlexDraw(StringDraw):
    """Noisy strings with their regression targets and loss weights.

    Attributes:
        missing: float32 [b, w], as in :class:`FlexTarget`.
        filled: float32 [b, k, w], as in :class:`FlexTarget`.
        symbols: int64 [b, k, w], as in :class:`FlexTarget`.
        weights: float32 [b, 2], factors of the loss's sums over insertions and over masks.
        constant: float32 [b], a constant term of the loss, nats.
    """

    missing: Tensor
    filled: Tensor
    symbols: Tensor
    weights: Tensor
    constant: Tensor


class FlexKernel(StringKernel):
    """The kernel of FlexMDM. Its states are the data tokens, the mask and the BOS token, in this order.

    The network's outputs do not depend on time. They are ``log_gap`` [b, w], the log of the expected number of tokens
    missing behind a position, and ``log_x0`` [b, w, v + 1], the log-probabilities of the token under a mask.
    """

    abstract: ClassVar[bool] = True

    @property
    @abstractmethod
    def pace(self) -> float:
        """Rate of unmasking a mask divided by the rate of inserting a missing token."""

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        return ((LOG_X0, LOG_GAP),)

    @property
    def supports_prompts(self) -> bool:
        return True

    @property
    def mask(self) -> int:
        """Index of the mask state."""
        return self.states - 2

    @property
    def data_tokens(self) -> int:
        return self.states - 2

    # -- closed forms ---------------------------------------------------------------------------------------------------

    def masked(self, sigma: Tensor) -> Tensor:
        """Return the probability that a token is masked at total noise ``sigma``.

        The probability is (lam - lam^pace) / (pace - 1), or -lam log lam for pace 1. lam = 1 - exp(-sigma) is the
        probability that the token is deleted; :attr:`pace` is the rate of unmasking divided by that of insertion.

        Args:
            sigma: Total noise, [b].

        Returns:
            float64 [b].
        """
        log_lam = log1mexp(sigma.double())
        rest = (1 - self.pace) * log_lam  # lam^pace = lam exp(-rest)
        small = rest.abs() < 1e-8
        share = torch.where(small, 1 - rest / 2, -torch.expm1(-rest) / torch.where(small, 1.0, rest))
        return -torch.exp(log_lam) * log_lam * share

    def fates(self, sigma: float, start: float = 0.0) -> Fates:
        every, mask = torch.ones(self.states, dtype=torch.float64), self.mask
        survive, hide = self._transition(sigma, start)
        at_mask = torch.arange(self.states) == mask
        kept = torch.where(at_mask, survive[1], survive[0])
        hidden = torch.where(at_mask, 0.0, hide * every)
        return Fates(kept, hidden, (1 - kept - hidden).clamp(min=0), 0.0, 0.0, torch.zeros_like(every), mask)

    def _transition(self, sigma: float, start: float) -> tuple[tuple[float, float], float]:
        """Return the probabilities that a data token, and that a mask, survives a step, and that a data token is masked.

        They follow by Bayes' rule from the marginals and from the reverse process, in which a mask at ``sigma`` is
        still one at ``start`` with probability (lam(start) / lam(sigma))^pace.
        """
        levels = torch.tensor([start, sigma], dtype=torch.float64)
        log_lam = log1mexp(levels.clamp(min=1e-300))
        masked = torch.where(levels > 0, self.masked(levels.clamp(min=1e-300)), 0.0)
        clean = torch.exp(-levels) - masked
        still = float(torch.exp(self.pace * (log_lam[0] - log_lam[1]))) if start > 0 else 0.0
        survive = (float(clean[1] / clean[0]), float(masked[1] / masked[0]) * still if start > 0 else 0.0)
        return survive, float(masked[1] / clean[0]) * (1 - still)

    def weights(self, sigma: Tensor) -> Tensor:
        """Return the reverse rates of inserting one missing token and of unmasking one mask, per unit of sigma.

        Args:
            sigma: Total noise, [b].

        Returns:
            float64 [b, 2].
        """
        insert = 1 / torch.expm1(sigma.double())
        return torch.stack([insert, self.pace * insert], -1)

    def leap(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Return the probabilities of inserting a missing token and unmasking a mask in a step to ``sigma_next``.

        Args:
            sigma: Total noise, [b].
            sigma_next: Total noise after the step, [b].

        Returns:
            float64 [b, 2].
        """
        passed = log1mexp(sigma.double()) - log1mexp(sigma_next.double())
        return torch.stack([-torch.expm1(-passed), -torch.expm1(-self.pace * passed)], -1)

    def clock(self, u: Tensor, end: float) -> tuple[Tensor, Tensor]:
        return square_clock(u)

    # -- strings ------------------------------------------------------------------------------------------------------

    def sample(self, batch: Batch, sigma: Tensor, *, random: Randomness, width: int | None) -> Strings:
        """Draw the noisy strings of a batch.

        Args:
            batch: Clean strings; only tokens with ``corrupt`` True can be masked or deleted.
            sigma: Total noise, [b].
            random: Source of uniform numbers.
            width: Number of positions w of the result, the BOS token included. Tokens beyond it are dropped and
                counted in :attr:`Strings.cut`. None: that of the longest noisy string.

        Returns:
            The noisy strings. Their ``kept`` marks the clean tokens that are not deleted; some of these are masked.
        """
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
        tokens = torch.full((rows, 1), self.start, device=generator.device)
        return Strings(tokens, torch.ones_like(tokens, dtype=torch.bool))

    # -- regression targets --------------------------------------------------------------------------------------------

    def target(self, batch: Batch, strings: Strings) -> FlexTarget:
        """Return the regression targets, averaged over all embeddings of the noisy string in the clean one.

        An embedding is a way in which the noisy string is a subsequence of the clean string, where a mask matches any
        token; all are equally likely.

        Args:
            batch: Clean strings.
            strings: Noisy strings.
        """
        noisy, masks = strings.tokens[:, 1:], self.masks(strings)
        fits = (batch.tokens[..., None] == noisy[:, None]) | (batch.corrupt[..., None] & masks[:, None, 1:])
        spared = batch.attend & ~batch.corrupt
        if bool(spared.any()):
            # prompts come first in both strings, and correspond to themselves alone
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
        """Return regression targets computed from the masks and deletions that :meth:`sample` drew.

        These are the targets of the FlexMDM paper (arXiv 2509.01025). They are an unbiased estimate of :meth:`target`,
        the mean over all embeddings, but have more variance.

        Args:
            batch: Clean strings.
            strings: Noisy strings that :meth:`sample` returned.

        Raises:
            ValueError: ``strings.kept`` is None, so that the deletions are unknown.
        """
        if (keep := strings.kept) is None:
            raise ValueError("sampled targets need strings from sample()")
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
        """Return the positions of ``strings`` at which the token is a mask, bool [b, w]."""
        return strings.attend & (strings.tokens == self.mask)

    def _target(self, strings: Strings, missing: Tensor, filled: Tensor, symbols: Tensor) -> FlexTarget:
        missing = missing * strings.attend
        gaps = (torch.xlogy(missing, missing) - missing).sum(-1)
        constant = torch.stack([gaps, torch.xlogy(filled, filled).sum((1, 2))], -1)
        return FlexTarget(missing.float(), filled.float(), symbols, constant.float())
