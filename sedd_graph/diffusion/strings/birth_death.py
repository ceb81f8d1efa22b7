"""Kernels of token births and deaths in closed form: deletion (DID) and the TKF91 process.

TKF91 is the birth-death process of Thorne, Kishino and Felsenstein (1991). Axes: b rows, w positions of a noisy string
(the BOS token first, padded), n tokens of a clean string (padded), v data tokens.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.categorical import inverse_cdf
from sedd_graph.diffusion.strings.alignment import Links, Pairs, align, log_likelihood
from sedd_graph.diffusion.strings.fates import Fates
from sedd_graph.diffusion.strings.kernel import StringKernel, square_clock
from sedd_graph.diffusion.strings.strings import Strings, distinct, rebuild

__all__ = ["BIRTHS_AND_DEATHS", "ONLY_DELETES", "BirthDeath", "Target"]

ONLY_DELETES = "a kernel that only deletes"
"""Phrase for error messages of components that require a kernel without births."""

BIRTHS_AND_DEATHS = "a kernel of births and deaths alone (delete, indel)"
"""Phrase for error messages of components that require a :class:`BirthDeath` kernel."""

_PIECE = 2**20
"""Number of insertion targets that are processed at a time."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Regression targets of the network for a noisy string x given the clean string x0, and constants of the loss.

    A token of x was born if noise inserted it, and is otherwise a token of x0 that survived. Gap j is the place for
    insertions behind position j. The target of inserting token v in gap j is ``fresh[j] * law[v]``, plus
    ``missing[i, j]`` if v is ``symbols[i]``, where ``law`` are the kernel's frequencies of born tokens. All tensors
    except ``symbols`` are float32.

    Attributes:
        missing: [b, n, w], the expected number of copies of each of the n ``symbols`` that are missing in each gap.
        symbols: int64 [b, n], the distinct tokens of x0, padded.
        fresh: [b, w], the coefficient of the token frequencies in each gap; 0 without births.
        spurious: [b, w], the target of deletions: the probability that the token at a position was born.
        constant: [b, 2], terms of the loss that do not depend on the network: the sum of a log a - a over the targets a
            of insertions, and over those of deletions. They make the loss 0 if the outputs equal the targets.
    """

    missing: Tensor
    symbols: Tensor
    fresh: Tensor
    spurious: Tensor
    constant: Tensor


def _k(a: Tensor) -> Tensor:
    """Return a (log a - 1), 0 at 0."""
    return torch.xlogy(a, a) - a


class BirthDeath(StringKernel):
    """A kernel of births and deaths: tokens die at rate 1 per unit of sigma, and new tokens are born between them.

    New tokens are born behind the BOS token and behind every token at the rate ``births``, with the token frequencies
    ``law``. Without births this is deletion (DID, arXiv 2603.23507); with births it is the TKF91 process. A reverse
    rate is an exponentiated output of the network times a factor (:meth:`weights`). The outputs are ``log_insert``
    [b, w, v], whose exponentials sum over v to approximately the number of tokens missing behind a position, and
    ``log_delete`` [b, w], the log-probability that a token was born. Axes: b rows, w positions (the BOS token first), v
    data tokens.
    """

    abstract: ClassVar[bool] = True
    law: Tensor
    """Frequencies of newly born tokens, float64 [v], all positive."""

    @property
    @abstractmethod
    def births(self) -> float:
        """Birth rate behind each position, per unit of sigma, at least 0 and below 1."""

    @property
    def supports_prompts(self) -> bool:
        return not self.births

    # -- closed forms (Thorne, Kishino and Felsenstein 1991) -----------------------------------------------------------

    def _beta(self, sigma: Tensor) -> Tensor:
        grown = (self.births - 1) * sigma
        return -torch.expm1(grown) / (1 - self.births * torch.exp(grown))

    def links(self, sigma: Tensor) -> Links:
        """Return the probabilities of the survival, death and descendants of a clean token at total noise ``sigma``.

        A descendant of a token is a token that was born behind it, or behind another of its descendants.

        Args:
            sigma: Total noise, [b].

        Returns:
            Four probabilities, float64 [b] each, in the order of :class:`Links`: that the token survives; that it dies
            and no descendant of it is alive; that it dies and at least one descendant is alive; and that behind a token
            which is alive, one more token follows by birth.
        """
        sigma = sigma.double()
        beta = self._beta(sigma)
        survive = torch.exp(-sigma)
        replace = (-torch.expm1(-sigma) - beta).clamp(min=0)
        return Links(survive, beta, replace if self.births else torch.zeros_like(beta), self.births * beta)

    def fates(self, sigma: float, start: float = 0.0) -> Fates:
        links = self.links(torch.tensor([sigma - start], dtype=torch.float64))  # rates are constant
        law, every = self.law.detach().double().cpu(), torch.ones(self.states, dtype=torch.float64)
        return Fates(
            links.survive * every,
            torch.zeros_like(every),
            links.vanish * every,
            float(links.replace),
            float(links.birth),
            torch.cat([law, law.new_zeros(1)]),
        )

    def weights(self, sigma: Tensor) -> Tensor:
        beta = self._beta(sigma)
        birth = torch.full_like(beta, self.births)
        return torch.stack([torch.exp(-sigma) / beta + birth, torch.where(birth > 0, 1 / beta, 0.0)], -1)

    def leap(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Return the factors of insertions and deletions in the edit probabilities of a step down to ``sigma_next``.

        The probability of an edit in the step is its factor times the exponentiated output of the network. Without
        births, the factor of insertions is the exact probability that a token missing at ``sigma`` is present at
        ``sigma_next`` (a Tweedie step), and that of deletions is 0. With births, the factor of deletions is
        1 - exp(-integral of the deletion factor of :meth:`weights` over the step).

        Args:
            sigma: Total noise, [b].
            sigma_next: Total noise after the step, [b].

        Returns:
            [b, 2], the factor of insertions and that of deletions.
        """
        beta, step = self._beta(sigma), sigma - sigma_next
        insert = torch.exp(-sigma) * torch.expm1(step) / beta + self.births * step
        grown = (self.births - 1) * torch.stack([sigma_next, sigma])
        before, now = -torch.expm1(grown)
        delete = 1 - torch.exp(-step) * before / now if self.births else torch.zeros_like(insert)
        return torch.stack([insert, delete], -1)

    def clock(self, u: Tensor, end: float) -> tuple[Tensor, Tensor]:
        """Map a uniform variable ``u`` to total noise, for Monte Carlo estimates of the bound on -log p(x_0).

        Without births, total noise grows to infinity. With births it grows to ``end``, and the objective adds the KL
        divergence between noise at ``end`` and the prior.

        Args:
            u: Uniform numbers in (0, 1), [b].
            end: Total noise at t = 1.

        Returns:
            Total noise and its derivative in ``u``, [b] each.
        """
        return super().clock(u, end) if self.births else square_clock(u)

    # -- strings ------------------------------------------------------------------------------------------------------

    def _fresh(self, shape: Tensor, uniform: Tensor) -> Tensor:
        return inverse_cdf(self.law.to(uniform.device).cumsum(0), uniform).view_as(shape)

    def sample(self, batch: Batch, sigma: Tensor, *, random: Randomness, width: int | None) -> Strings:
        """Draw the noisy strings of a batch.

        Args:
            batch: Clean strings; only tokens with ``corrupt`` True can die.
            sigma: Total noise, [b].
            random: Source of uniform numbers.
            width: Number of positions w of the result, the BOS token included. Tokens beyond it are dropped and
                counted in :attr:`Strings.cut`. None: that of the longest noisy string.

        Returns:
            The noisy strings. Without births, ``kept`` marks the clean tokens that survive; with births it is None.
        """
        links = self.links(sigma)
        rows, size = batch.tokens.shape
        u = random.rand(rows, size + 1).double()
        tokens = torch.cat([batch.tokens.new_full((rows, 1), self.start), batch.tokens], 1)
        real = torch.cat([torch.ones_like(batch.attend[:, :1]), batch.attend], 1)
        kept = torch.cat([torch.ones_like(batch.attend[:, :1]), batch.attend & ~batch.corrupt], 1)
        survive, vanish = links.survive[:, None], links.vanish[:, None]
        keep = real & (kept | (u < survive))
        follow = torch.zeros_like(tokens)
        if not self.births:
            left = rebuild(tokens, keep, follow, lambda place: place, start=self.start, width=width)
            return dataclasses.replace(left, kept=keep[:, 1:])
        born = random.rand(rows, size + 1).double().clamp(min=2**-25)
        more = torch.floor(born.log() / links.birth[:, None].log()).long()
        replaced = u >= survive + vanish
        follow = torch.where(keep, more, torch.where(replaced, more + 1, 0))
        follow = torch.where(real, follow, 0)
        widest = int((follow + keep).sum(-1).max()) if width is None else width
        uniform = random.rand48(rows, widest)
        return rebuild(tokens, keep, follow, lambda place: self._fresh(place, uniform), start=self.start, width=widest)

    def prior(self, rows: int, *, longest: int, generator: torch.Generator, allowed: Tensor | None) -> Strings:
        device = generator.device
        tokens = torch.full((rows, 1), self.start, device=device)
        keep = torch.ones_like(tokens, dtype=torch.bool)
        if not self.births:
            return Strings(tokens, keep)
        u = torch.rand(rows, 1, generator=generator, device=device, dtype=torch.float64)
        # inverse CDF of a geometric length, 1 - births^(k + 1), truncated
        u = u * (1 - self.births ** (longest + 1))
        follow = torch.floor(
            torch.log1p(-u) / torch.tensor(self.births, dtype=torch.float64, device=device).log()
        ).long()
        follow = follow.clamp(max=longest)
        law = self.law.to(device) if allowed is None else self.law.to(device) * allowed

        def new(place: Tensor) -> Tensor:
            uniform = torch.rand(place.shape, generator=generator, device=device, dtype=torch.float64)
            return inverse_cdf(law.cumsum(0), uniform)

        return rebuild(tokens, keep, follow, new, start=self.start)

    def log_prior(self, strings: Strings) -> Tensor:
        """Return the log-probability of strings under the prior (pure noise) of a kernel with births.

        Args:
            strings: b strings.

        Returns:
            Nats, float64 [b].
        """
        tokens = torch.where(strings.attend, strings.tokens, 0).clamp(max=self.data_tokens - 1)[:, 1:]
        births = torch.tensor(self.births, dtype=torch.float64, device=tokens.device)
        each = self.law.to(tokens.device).log()[tokens] + births.log()
        return torch.where(strings.attend[:, 1:], each, 0.0).sum(-1) + torch.log1p(-births)

    # -- regression targets --------------------------------------------------------------------------------------------

    def _pairs(self, batch: Batch, strings: Strings, sigma: Tensor) -> Pairs:
        clean = torch.where(batch.corrupt, batch.tokens, -1 - torch.arange(batch.width, device=batch.tokens.device))
        noisy = strings.tokens[:, 1:]
        if bool((batch.attend & ~batch.corrupt).any()):
            # tokens that cannot die come first in both strings; as symbols of their own they align with themselves alone
            noisy = torch.where(_leading(batch, noisy.shape[1]), clean[:, : noisy.shape[1]], noisy)
        frequency = self.law.to(noisy.device)[noisy.clamp(0, self.data_tokens - 1)] if self.births else None
        return Pairs(clean, batch.attend.sum(-1), noisy, strings.lengths, frequency, self.links(sigma))

    def log_p(self, batch: Batch, strings: Strings, sigma: Tensor) -> Tensor:
        """Return log p(x | x0), summed over all alignments.

        Args:
            batch: Clean strings x0.
            strings: Noisy strings x.
            sigma: Total noise, [b].

        Returns:
            Nats, float64 [b].
        """
        return log_likelihood(self._pairs(batch, strings, sigma))

    def target(self, batch: Batch, strings: Strings, sigma: Tensor) -> Target:
        """Return the regression targets in expectation over all alignments of x with x0, in time O(n w).

        Args:
            batch: Clean strings x0.
            strings: Noisy strings x.
            sigma: Total noise, [b].
        """
        symbols, place = distinct(torch.where(batch.attend, batch.tokens, self.start), self.start)
        found = align(self._pairs(batch, strings, sigma), symbols=place, dtype=torch.float32)
        # p(x with an insertion) / p(x) = [e^-sigma / beta + births] times the target
        scale = 1 / self.weights(sigma.double())[:, :1]
        return self._target(symbols, found.missing, found.fresh * scale, found.spurious, scale=scale)

    def sampled_target(self, batch: Batch, strings: Strings) -> Target:
        """Return regression targets computed from the deletions that :meth:`sample` drew.

        They are an unbiased estimate of :meth:`target`, the expectation over all alignments. They need no dynamic
        programming, but have more variance.

        Args:
            batch: Clean strings.
            strings: Noisy strings that :meth:`sample` returned, of a kernel without births.

        Raises:
            ValueError: ``strings.kept`` is None, so that the deletions are unknown.
        """
        if (keep := strings.kept) is None:
            raise ValueError("sampled targets need strings from sample() of a kernel without births")
        symbols, place = distinct(torch.where(batch.attend, batch.tokens, self.start), self.start)
        width = strings.tokens.shape[1]
        missing = torch.zeros(*batch.tokens.shape, width, device=keep.device)
        gone = (batch.attend & ~keep).float()
        missing.flatten(1).scatter_add_(1, place * width + keep.long().cumsum(-1), gone)
        none = torch.zeros_like(strings.attend, dtype=torch.float64)
        return self._target(symbols, missing, none, none[:, 1:], scale=torch.ones_like(none[:, :1]))

    def _target(self, symbols: Tensor, missing: Tensor, fresh: Tensor, spurious: Tensor, *, scale: Tensor) -> Target:
        """Return the targets, as float32.

        ``missing``, float32 [b, n, w], is multiplied by ``scale`` [b, 1] in place; the other arguments are float64.
        """
        law, real = self.law.to(fresh.device), symbols < self.data_tokens
        symbols = symbols.clamp(max=self.data_tokens - 1)
        chance = torch.where(real, law[symbols], 0.0)
        constant = fresh.new_zeros(len(fresh))
        if self.births:
            # the sum over v of K(C pi_v + sparse): in closed form over tokens that are not symbols, then over the symbols
            entropy = torch.xlogy(law, law).sum() - torch.xlogy(chance, chance).sum(-1, keepdim=True)
            constant = (_k(fresh) * (1 - chance.sum(-1, keepdim=True)) + fresh * entropy).sum(-1)
        used = int(real.sum(-1).max()) if real.numel() else 0
        # in pieces, so that intermediate values stay in cache
        pieces = [
            x.split(max(1, _PIECE // max(1, used * missing.shape[2])))
            for x in (missing, fresh, chance, scale, constant)
        ]
        for part, base, share, factor, total in zip(*pieces, strict=True):
            sparse = part[:, :used].mul_(factor[..., None].float())
            if self.births:
                sparse = torch.addcmul(sparse, base[:, None].float(), share[:, :used, None].float())
            total += sparse.clamp(min=1e-37).log_().sub_(1).mul_(sparse).sum(-1).double().sum(-1)
        ends = torch.nn.functional.pad(spurious, (1, 0))
        return Target(
            missing, symbols, fresh.float(), ends.float(), torch.stack([constant, _k(ends).sum(-1)], -1).float()
        )


def _leading(batch: Batch, width: int) -> Tensor:
    """Return the positions of tokens that cannot die, bool [b, width]."""
    pinned = (batch.attend & ~batch.corrupt)[:, :width]
    return torch.nn.functional.pad(pinned, (0, width - pinned.shape[1]))
