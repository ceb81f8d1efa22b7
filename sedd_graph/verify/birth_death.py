"""A process that changes lengths, held to an enumerable toy: the same components and configs on strings of two tokens.

Everything is beside the generator of the process, written out over all strings up to a length from the two rates that the
kernel names: deaths at rate 1, births at rate ``births``, by ``law``. Axes: b rows, s strings, w positions, v = 2 tokens.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.strings.birth_death import BirthDeath
from sedd_graph.diffusion.strings.kernel import TOKENS, StringKernel, StringTable
from sedd_graph.diffusion.strings.strings import Strings, wide

__all__ = ["StringToy", "check_birth_death"]

LEVELS = (0.05, 0.7, 2.5)


class StringToy(StringTable):
    """All strings up to a length, the generator on them, a law of clean strings, and what a perfect network would say."""

    kernel: BirthDeath

    def __init__(self, kernel: BirthDeath, *, one_length: bool = False) -> None:
        # with births, strings can grow beyond any length: those that are left out have to be unlikely
        longest, clean = (6, 2) if kernel.births else (3, 3)
        super().__init__(kernel, longest=longest, clean=clean, one_length=one_length)
        index = {s: i for i, s in enumerate(self.strings)}
        count = len(self.strings)
        self.inserted = torch.full((count, self.longest + 1, TOKENS), count)  # the place behind the last is for none
        self.deleted = torch.full((count, self.longest + 1), count)
        rates = torch.zeros(count, count, dtype=torch.float64)
        for i, s in enumerate(self.strings):
            for j in range(len(s)):
                self.deleted[i, j + 1] = index[s[:j] + s[j + 1 :]]
                rates[self.deleted[i, j + 1], i] += 1.0
            for j, v in itertools.product(range(len(s) + 1), range(TOKENS)):
                if len(s) < self.longest:
                    self.inserted[i, j, v] = index[(*s[:j], v, *s[j:])]
                    rates[self.inserted[i, j, v], i] += kernel.births * float(kernel.law[v])
        self.generator = rates - torch.diag(rates.sum(0))
        if kernel.births:
            # the process is reversible, cut off or not: a symmetric matrix has its eigenvalues
            steady = torch.tensor([math.prod(kernel.births * float(kernel.law[v]) for v in s) for s in self.strings])
            root = steady.double().sqrt()[:, None]
            self._values, vectors = torch.linalg.eigh(self.generator * root.T / root)
            self._right, self._left = root * vectors, (vectors / root).T
        else:
            values, vectors = torch.linalg.eig(self.generator)  # triangular: its eigenvalues are the lengths
            self._values, self._right = values.real, vectors.real
            self._left = torch.linalg.inv(self._right)

    def at(self, sigma: Tensor, law: Tensor | None = None) -> Tensor:
        """The law of noisy strings at each of ``sigma`` [b], float64 [b, s], from ``law`` [s] of clean ones."""
        law = self.law if law is None else law
        found: Tensor = (torch.exp(sigma.double()[:, None] * self._values) * (self._left @ law)) @ self._right.T
        return found

    def ratios(self, index: Tensor, law: Tensor) -> tuple[Tensor, Tensor]:
        """p(Ins) / p and p(Del) / p of strings under ``law`` [b, s]: [b, w, v] and [b, w]."""
        wide, here = F.pad(law, (0, 1)), law.gather(1, index[:, None])
        put = wide.gather(1, self.inserted[index].flatten(1)).view(len(index), -1, TOKENS)
        return put / here[..., None].clamp(min=1e-300), wide.gather(1, self.deleted[index]) / here.clamp(min=1e-300)

    def outputs(self, strings: Strings, sigma: Tensor) -> dict[str, Tensor]:
        """What a perfect network would put out."""
        levels, level = torch.unique(sigma, return_inverse=True)
        laws = self.at(levels)[level]
        index = self.number(strings).clamp(max=len(self.strings) - 1)
        put, out = self.ratios(index, laws)
        pace = self.kernel.weights(sigma.double())
        # beyond the longest string there is nothing in the toy, though noise goes there: say of it what pure noise would
        put = torch.where(self.inserted[index] < len(self.strings), put, self.kernel.births * self.kernel.law)
        width = strings.tokens.shape[1]
        found = {"log_insert": put / pace[:, 0, None, None]}
        if self.kernel.births:
            taken = torch.where(strings.attend, strings.tokens, 0).clamp(max=TOKENS - 1)
            rate = self.kernel.births * self.kernel.law[taken] * wide(out, width)
            found["log_delete"] = rate / pace[:, 1:]
        return {k: wide(v, width).clamp(min=1e-300).log().float() for k, v in found.items()}

    def check_kernel(self, end: float) -> list[Check]:
        return check_birth_death(self.kernel, end=end)

    def check_declared(self, declared: StringKernel, end: float) -> list[Check]:
        return [_declared_prior(declared, end)] if isinstance(declared, BirthDeath) else []


def check_birth_death(kernel: BirthDeath, *, end: float) -> list[Check]:
    """Closed forms, draws, prior and targets fit together; ``end`` is the total noise at t = 1."""
    toy = StringToy(kernel)
    count = len(toy.strings)
    short = [i for i, s in enumerate(toy.strings) if len(s) <= toy.clean]
    worst = dict.fromkeys(("law", "insert", "delete"), 0.0)
    for sigma in LEVELS:
        level = torch.tensor([sigma], dtype=torch.float64)
        for x0 in short:
            start = F.one_hot(torch.tensor(x0), count).double()
            law = toy.at(level, start)
            # pairs that can be, and far enough from the longest for the cut not to show
            seen = torch.tensor(
                [i for i, s in enumerate(toy.strings) if law[0, i] > 1e-9 and len(s) <= toy.longest // 2 + 1]
            )
            strings, many = toy.rows(seen), len(seen)
            batch, levels = toy.batch(torch.full((many,), x0)), level.expand(many)
            found = kernel.log_p(batch, strings, levels).exp()
            worst["law"] = max(worst["law"], float((found - law[0, seen]).abs().max()))
            target, pace = kernel.target(batch, strings, levels), kernel.weights(levels)
            put, out = toy.ratios(seen, law.expand(many, -1))
            said = target.fresh[..., None].double() * kernel.law
            index = target.symbols[:, None].expand(-1, said.shape[1], -1)
            said = said.scatter_add(2, index, target.missing.transpose(1, 2).double())
            gap = (pace[:, 0, None, None] * said - put).abs() / (1 + put)
            worst["insert"] = max(worst["insert"], float((gap * strings.attend[..., None]).max()))
            taken = torch.where(strings.attend, strings.tokens, 0).clamp(max=TOKENS - 1)
            rate = kernel.births * kernel.law[taken] * out
            gap = (pace[:, 1:] * target.spurious - rate).abs() / (1 + rate)
            token = strings.attend & (torch.arange(gap.shape[1]) > 0)
            worst["delete"] = max(worst["delete"], float((gap * token).max()))
    slack = 1e-3 if kernel.births else 1e-6  # strings beyond the longest are left out of the toy
    return [
        Check(
            "edits.law",
            "p(x | x0) by the pair HMM is that of the generator",
            worst["law"] < slack,
            f"{worst['law']:.1e}",
            f"exp(sigma Q) over {count} strings, three noise levels",
        ),
        Check(
            "edits.insert",
            "rates of insertion are p(x with the token) / p(x)",
            worst["insert"] < 10 * slack,
            f"{worst['insert']:.1e}",
            "every gap and token, relative",
        ),
        Check(
            "edits.delete",
            "rates of deletion are the rate of birth times p(x without the token) / p(x)",
            worst["delete"] < 10 * slack,
            f"{worst['delete']:.1e}",
            "every token, relative",
        ),
        *_draws(toy, end),
    ]


def _draws(toy: StringToy, end: float) -> list[Check]:
    kernel, draws, count = toy.kernel, 20_000, len(toy.strings)
    worst = 0.0
    for x0 in (0, TOKENS + 1, len([s for s in toy.strings if len(s) <= toy.clean]) - 1):
        batch = toy.batch(torch.full((draws,), x0))
        level = torch.full((draws,), 0.7)
        seen = toy.number(kernel.sample(batch, level, random=Randomness(torch.Generator().manual_seed(2)), width=None))
        found = torch.bincount(seen, minlength=count + 1)[:count].double() / draws
        law = toy.at(level[:1], F.one_hot(torch.tensor(x0), count).double())[0]
        worst = max(worst, float((found - law).abs().sum() / 2))
    noise = kernel.prior(draws, longest=toy.longest, generator=torch.Generator().manual_seed(1), allowed=None)
    found = torch.bincount(toy.number(noise), minlength=count + 1)[:count].double() / draws
    last = toy.at(torch.tensor([end]))[0]
    gap = float((found - last).abs().sum() / 2)
    return [
        Check(
            "edits.sample",
            "draws of x_t follow the generator",
            worst < 0.03,
            f"{worst:.4f}",
            "total variation, 20,000 draws",
        ),
        Check("edits.prior", "noise at t = 1 is the prior", gap < 0.03, f"{gap:.4f}", "total variation, 20,000 draws"),
    ]


def _declared_prior(kernel: BirthDeath, end: float) -> Check:
    """The toy forgets faster than the declared kernel, whose noise is longer: what is left of a length at t = 1."""
    left = math.exp(-(1 - kernel.births) * end)
    return Check(
        "edits.forgets",
        "at t = 1 the declared kernel has forgotten how long the text was",
        left < 0.01,
        f"{left:.1e}",
        "exp(-(1 - births) sigma(1)), what is left of a difference in length",
    )
