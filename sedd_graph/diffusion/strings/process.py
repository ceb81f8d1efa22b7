"""Noise that deletes and inserts tokens: the interfaces of a process whose strings change their length.

A string is a row that begins with the start state (the last of the graph's states), holds data tokens, and is padded with
the start state again; ``attend`` marks start and tokens. Gap j is the place behind position j, so gap 0 is before the
first token. Axes: b rows, w = 1 + tokens of a noisy row (padded), n tokens of a clean row (padded), v data tokens.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.categorical import inverse_cdf
from sedd_graph.diffusion.strings.alignment import Links, Pairs, align, log_likelihood
from sedd_graph.diffusion.tokens.process import Schedule

__all__ = [
    "BIRTHS_AND_DEATHS",
    "LEAST",
    "ONLY_DELETES",
    "BirthDeath",
    "Kernel_",
    "StringDraw",
    "StringKernel",
    "StringObjective",
    "Strings",
    "Target",
    "distinct",
    "rebuild",
]


ONLY_DELETES = "a kernel that only deletes"
"""What some parts need, as the rest of a sentence."""

BIRTHS_AND_DEATHS = "a kernel of births and deaths alone (delete, indel)"
"""What others need."""

LEAST = 1e-4
"""Total noise from which on bounds are taken: what a string loses below it is about this share of a token."""


_PIECE = 2**20
"""Ratios at a time, where they are summed."""


@dataclasses.dataclass(frozen=True)
class Strings:
    """Rows of different lengths: ``tokens`` int64 [b, w] and ``attend`` bool [b, w], the start state first.

    ``cut`` counts tokens that did not fit and were left out. ``kept`` bool [b, n], where known, marks the clean tokens
    that are still there.
    """

    tokens: Tensor
    attend: Tensor
    cut: int = 0
    kept: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """int64 [b]: tokens of each row, the start not counted."""
        return self.attend.sum(-1) - 1


def rebuild(
    tokens: Tensor,
    keep: Tensor,
    follow: Tensor,
    new: Callable[[Tensor], Tensor],
    *,
    start: int,
    width: int | None = None,
) -> Strings:
    """Strings of the ``tokens`` [b, w] that ``keep`` marks, each place followed by ``follow`` int64 [b, w] new tokens.

    ``new(place)`` gives the token for each position of the result, int64 of the shape of ``place``, which says behind which
    position of the old row it stands. New tokens stay where they belong when the token before them goes. Rows
    are as wide as the longest, or ``width``: what does not fit is left out and counted.
    """
    count = follow + keep
    ends = count.cumsum(-1)
    total = ends[:, -1:]
    size = int(total.max()) if width is None else width
    place = torch.arange(size, device=tokens.device).expand(len(tokens), size).contiguous()
    attend = place < total
    link = torch.searchsorted(ends, place, right=True).clamp(max=tokens.shape[1] - 1)
    first = place == (ends - count).gather(1, link)
    old = first & keep.gather(1, link)
    made = torch.where(old, tokens.gather(1, link), new(link))
    return Strings(torch.where(attend, made, start), attend, int((total - size).clamp(min=0).sum()))


@dataclasses.dataclass(frozen=True)
class Target:
    """What the heads should say of a noisy string x given the clean x0, float32, and the sums that do not depend on them.

    ``missing`` [b, n, w]: for symbol r of ``symbols`` int64 [b, n] (each distinct token of x0 once) and each gap, the
    weight of putting it in; ``fresh`` [b, w]: the same for every token v, times its frequency. ``spurious`` [b, w]: the chance
    that the token at a position was born there. ``constant`` [b, 2]: sums of a log a - a over either.
    """

    missing: Tensor
    symbols: Tensor
    fresh: Tensor
    spurious: Tensor
    constant: Tensor


@dataclasses.dataclass(frozen=True)
class StringDraw:
    """One draw of the noise for a batch; objectives add what their loss is made of, all that does not depend on the network.

    ``xt`` int64 and ``attend`` bool [b, w]; ``sigma`` float32 [b]. ``cut`` counts tokens that did not fit.
    """

    xt: Tensor
    attend: Tensor
    sigma: Tensor
    cut: int = dataclasses.field(default=0, kw_only=True)

    @property
    def t(self) -> Tensor:
        """The share of tokens that noise has hit by then, float32 [b]."""
        return -torch.expm1(-self.sigma)


def distinct(tokens: Tensor, rest: int) -> tuple[Tensor, Tensor]:
    """The distinct ``tokens`` int64 [b, n] of each row in order, then ``rest``, and which of them each position is, int64 [b, n]."""
    ordered, order = tokens.sort(dim=1, stable=True)
    rank = torch.zeros_like(tokens)
    rank[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(-1)
    symbols = torch.full_like(tokens, rest).scatter(1, rank, ordered)
    return symbols, torch.zeros_like(rank).scatter(1, order, rank)


def _k(a: Tensor) -> Tensor:
    """a (log a - 1), 0 at 0."""
    return torch.xlogy(a, a) - a


class StringKernel(Component, ABC):
    """Noise on strings, as engine and samplers know it. What the heads say is scaled: a reverse rate is theirs times the
    kernel's own, one for each kind of edit (k: insertions, deletions, and what else a kernel knows)."""

    abstract: ClassVar[bool] = True

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        """``config`` cut down to ``states`` states, for a proof."""
        return config

    @property
    def states(self) -> int:
        return self.axis("n")

    @property
    def data_tokens(self) -> int:
        return self.states - 1

    @property
    def start(self) -> int:
        """The state that every row begins with, and is padded with."""
        return self.states - 1

    @property
    def spares(self) -> bool:
        """Whether tokens that are not ``corrupt`` stay as they are, so that a model can be trained with prompts."""
        return False

    def holds_nothing(self) -> str | None:
        """Why given text cannot be held fixed while the rest is written, in words; None where it can."""
        return None

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """The outputs of the graph that generation takes, no more and no fewer."""

    @abstractmethod
    def weights(self, sigma: Tensor) -> Tensor:
        """[b, k]: the rate of each kind of edit per unit of sigma, for heads that say 1."""

    @abstractmethod
    def leap(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """[b, k]: the chance of each kind of edit in a step from ``sigma`` down, for heads that say 1."""

    @abstractmethod
    def prior(self, rows: int, *, longest: int, generator: torch.Generator, allowed: Tensor | None) -> Strings:
        """Pure noise of at most ``longest`` tokens (its law given that), of the ``allowed`` bool [v] alone."""


class BirthDeath(StringKernel):
    """Tokens die at rate 1 per unit of sigma; behind the start and behind every token, new ones are born at rate ``births``,
    drawn from ``law``. With no births this is deletion (DID, arXiv 2603.23507); with some, the TKF91 process.

    The heads say what is left when known factors are taken out of the reverse rates, so that they stay of order one:
    ``log_insert`` [b, w, v], summed over v and over a gap, is about how many tokens are missing there, and ``log_delete``
    [b, w] is the log chance that a token was born.
    """

    abstract: ClassVar[bool] = True
    law: Tensor
    """float64 [v]: frequencies of new tokens, all positive."""

    @property
    @abstractmethod
    def births(self) -> float:
        """Births behind each place per unit of sigma, from 0 to below 1."""

    @property
    def spares(self) -> bool:
        return not self.births

    @property
    def reads(self) -> tuple[str, ...]:
        return ("log_insert", "log_delete") if self.births else ("log_insert",)

    # -- the process, in closed form (Thorne, Kishino and Felsenstein 1991) -------------------------------------------

    def _beta(self, sigma: Tensor) -> Tensor:
        grown = (self.births - 1) * sigma
        return -torch.expm1(grown) / (1 - self.births * torch.exp(grown))

    def links(self, sigma: Tensor) -> Links:
        """What becomes of one token by total noise ``sigma`` [b]; float64."""
        sigma = sigma.double()
        beta = self._beta(sigma)
        survive = torch.exp(-sigma)
        replace = (-torch.expm1(-sigma) - beta).clamp(min=0)
        return Links(survive, beta, replace if self.births else torch.zeros_like(beta), self.births * beta)

    def weights(self, sigma: Tensor) -> Tensor:
        """[b, 2]: the rate of insertions and of deletions per unit of sigma, for heads that say 1."""
        beta = self._beta(sigma)
        birth = torch.full_like(beta, self.births)
        return torch.stack([torch.exp(-sigma) / beta + birth, torch.where(birth > 0, 1 / beta, 0.0)], -1)

    def leap(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """[b, 2]: the chance of an insertion and of a deletion in a step from ``sigma`` down, for heads that say 1.

        Without births an insertion is Tweedie's step, exact for one missing token. A deletion follows the rate at which born
        tokens go, along the whole step.
        """
        beta, step = self._beta(sigma), sigma - sigma_next
        insert = torch.exp(-sigma) * torch.expm1(step) / beta + self.births * step
        grown = (self.births - 1) * torch.stack([sigma_next, sigma])
        before, now = -torch.expm1(grown)
        delete = 1 - torch.exp(-step) * before / now if self.births else torch.zeros_like(insert)
        return torch.stack([insert, delete], -1)

    def clock(self, u: Tensor, end: float) -> tuple[Tensor, Tensor]:
        """Total noise at ``u`` [b] in (0, 1) on a clock of bounds, and its derivative.

        It begins where one token in 10,000 has been edited. Without births it goes on to the end of all noise, with births
        to ``end``, from where the prior takes over. It dwells on little noise, where edits are rare and weigh much.
        """
        if self.births:
            return LEAST + (end - LEAST) * u**3, 3 * (end - LEAST) * u**2
        return -torch.log1p(-(LEAST + (1 - LEAST) * u**2)), 2 * u / ((1 - u) * (1 + u))

    # -- strings ------------------------------------------------------------------------------------------------------

    def _fresh(self, shape: Tensor, uniform: Tensor) -> Tensor:
        return inverse_cdf(self.law.to(uniform.device).cumsum(0), uniform).view_as(shape)

    def sample(self, batch: Batch, sigma: Tensor, *, random: Randomness, width: int | None) -> Strings:
        """Noisy strings of the rows of ``batch``; only ``corrupt`` positions die. ``width``: as for :func:`rebuild`."""
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
        """Pure noise: the start alone, or the stationary law; at most ``longest`` tokens (the law given that)."""
        device = generator.device
        tokens = torch.full((rows, 1), self.start, device=device)
        keep = torch.ones_like(tokens, dtype=torch.bool)
        if not self.births:
            return Strings(tokens, keep)
        u = torch.rand(rows, 1, generator=generator, device=device, dtype=torch.float64)
        # the inverse of 1 - births^(k + 1), up to the longest
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
        """log of the law of pure noise, nats, float64 [b]. Only where there are births."""
        tokens = torch.where(strings.attend, strings.tokens, 0).clamp(max=self.data_tokens - 1)[:, 1:]
        births = torch.tensor(self.births, dtype=torch.float64, device=tokens.device)
        each = self.law.to(tokens.device).log()[tokens] + births.log()
        return torch.where(strings.attend[:, 1:], each, 0.0).sum(-1) + torch.log1p(-births)

    # -- what the heads should say -----------------------------------------------------------------------------------

    def _pairs(self, batch: Batch, strings: Strings, sigma: Tensor) -> Pairs:
        clean = torch.where(batch.corrupt, batch.tokens, -1 - torch.arange(batch.width, device=batch.tokens.device))
        noisy = strings.tokens[:, 1:]
        if bool((batch.attend & ~batch.corrupt).any()):
            # tokens that cannot die are symbols of their own, so that only they can be what is left of themselves; they
            # come first, and in the same places of both strings
            noisy = torch.where(_leading(batch, noisy.shape[1]), clean[:, : noisy.shape[1]], noisy)
        frequency = self.law.to(noisy.device)[noisy.clamp(0, self.data_tokens - 1)] if self.births else None
        return Pairs(clean, batch.attend.sum(-1), noisy, strings.lengths, frequency, self.links(sigma))

    def log_p(self, batch: Batch, strings: Strings, sigma: Tensor) -> Tensor:
        """log p(x | x0) at total noise ``sigma``, nats, float64 [b]."""
        return log_likelihood(self._pairs(batch, strings, sigma))

    def target(self, batch: Batch, strings: Strings, sigma: Tensor) -> Target:
        """Conditional ratios by the pair HMM, in O(n w)."""
        symbols, place = distinct(torch.where(batch.attend, batch.tokens, self.start), self.start)
        found = align(self._pairs(batch, strings, sigma), symbols=place, dtype=torch.float32)
        # p(Ins) / p(x) = [e^-sigma / beta + births] times what the head says
        scale = 1 / self.weights(sigma.double())[:, :1]
        return self._target(symbols, found.missing, found.fresh * scale, found.spurious, scale=scale)

    def sampled_target(self, batch: Batch, strings: Strings) -> Target:
        """What was deleted itself, rather than all that may have been: of the same mean given both strings, for no dynamic
        programme and more variance. Only without births, and for strings that :meth:`sample` made."""
        keep = strings.kept
        assert keep is not None
        symbols, place = distinct(torch.where(batch.attend, batch.tokens, self.start), self.start)
        width = strings.tokens.shape[1]
        missing = torch.zeros(*batch.tokens.shape, width, device=keep.device)
        gone = (batch.attend & ~keep).float()
        missing.flatten(1).scatter_add_(1, place * width + keep.long().cumsum(-1), gone)
        none = torch.zeros_like(strings.attend, dtype=torch.float64)
        return self._target(symbols, missing, none, none[:, 1:], scale=torch.ones_like(none[:, :1]))

    def _target(self, symbols: Tensor, missing: Tensor, fresh: Tensor, spurious: Tensor, *, scale: Tensor) -> Target:
        """``missing`` float32 [b, n, w] by symbol, which is multiplied by ``scale`` [b, 1] here; the rest float64."""
        law, real = self.law.to(fresh.device), symbols < self.data_tokens
        symbols = symbols.clamp(max=self.data_tokens - 1)
        chance = torch.where(real, law[symbols], 0.0)
        constant = fresh.new_zeros(len(fresh))
        if self.births:
            # K(C pi_v + sparse) summed over v: in closed form over the tokens that are no symbols, then over these
            entropy = torch.xlogy(law, law).sum() - torch.xlogy(chance, chance).sum(-1, keepdim=True)
            constant = (_k(fresh) * (1 - chance.sum(-1, keepdim=True)) + fresh * entropy).sum(-1)
        used = int(real.sum(-1).max()) if real.numel() else 0
        # piece by piece: what lies between stays in cache, and takes no new memory
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
    """Where tokens that cannot die stand, bool [b, width]."""
    pinned = (batch.attend & ~batch.corrupt)[:, :width]
    return torch.nn.functional.pad(pinned, (0, width - pinned.shape[1]))


Kernel_ = TypeVar("Kernel_", bound=StringKernel)
"""The kernels that an objective or a sampler works with."""
Draw_ = TypeVar("Draw_", bound=StringDraw)


class StringObjective(Component, ABC, Generic[Kernel_, Draw_]):
    """A bound on -log p of strings, in nats per string, of the kernels that it works with and the draws that it makes."""

    abstract: ClassVar[bool] = True
    over: ClassVar[str] = "deleted"
    """What the ``t`` of a draw is: here the share of tokens that noise has hit."""
    one_length: ClassVar[bool] = False
    """Whether it is a bound only where all strings have one length, which is then known."""

    def lacks(self, kernel: StringKernel) -> str | None:
        """What it needs and does not find in ``kernel``, in words; None where nothing is missing."""
        return None

    @abstractmethod
    def corrupt(
        self, batch: Batch, kernel: Kernel_, schedule: Schedule, *, random: Randomness, t: Tensor | None = None
    ) -> Draw_:
        """Draw times and noisy strings, and find what the heads should say. All randomness is here."""

    @abstractmethod
    def bound_draw(self, batch: Batch, kernel: Kernel_, schedule: Schedule, *, random: Randomness) -> Draw_:
        """A draw whose mean loss is the bound, nothing left out."""

    @abstractmethod
    def loss(self, outputs: Mapping[str, Tensor], draw: Draw_, kernel: Kernel_) -> Tensor:
        """Nats per string, float32 [b]. Pure tensor code that compiles."""

    def caveat(self, kernel: Kernel_) -> str | None:
        """Why the bound is not to be compared with those of other processes, in words; None where it may be."""
        return None

    def held_down(self, kernel: Kernel_, schedule: Schedule) -> float:
        """The share of time in which training weighs a draw less than the bound does."""
        return 0.0

    def rates(self, outputs: Mapping[str, Tensor], strings: Strings, longest: int) -> Mapping[str, Tensor]:
        """What a sampler of strings of ``longest`` tokens is to take the outputs for."""
        return outputs
