"""FlexMDM held to an enumerable toy: every way in which strings of two tokens, up to three long, can be masked and deleted.

Everything is beside what the two rates that the kernel names say: a token that is missing is put in as a mask at rate 1 and
filled at rate ``pace``, on the clock -log(1 - exp(-sigma)). Axes: b rows, s strings, w positions, v = 2 data tokens.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.strings.flexmdm import FlexKernel
from sedd_graph.diffusion.strings.kernel import TOKENS, StringTable
from sedd_graph.diffusion.strings.strings import Strings, wide

__all__ = ["FlexToy", "check_flexmdm"]

LEVELS = (1e-3, 0.05, 0.7, 2.5)
MASK = TOKENS


class FlexToy(StringTable):
    """All strings of two tokens and the mask up to three long, and what has become of each token of each clean string.

    ``ways`` [x0, s] counts the ways from a clean string to a noisy one; ``gaps`` [x0, s, w] and ``under`` [x0, s, w, v] are the
    sums over them of how many tokens are missing in each gap, and of what stands under each mask.
    """

    kernel: FlexKernel

    def __init__(self, kernel: FlexKernel) -> None:
        super().__init__(kernel, longest=3, clean=3, symbols=TOKENS + 1)
        self.index = {s: i for i, s in enumerate(self.strings)}
        count, width = len(self.strings), self.longest + 1
        self.sizes = torch.tensor([[len(s), s.count(MASK)] for s in self.strings])
        self.ways = torch.zeros(count, count, dtype=torch.float64)
        self.gaps = torch.zeros(count, count, width, dtype=torch.float64)
        self.under = torch.zeros(count, count, width, TOKENS, dtype=torch.float64)
        for x0, clean in enumerate(self.strings):
            if MASK in clean:
                continue
            for fates in itertools.product(("gone", "mask", "clean"), repeat=len(clean)):
                kept = [(v, fate) for v, fate in zip(clean, fates, strict=True) if fate != "gone"]
                s = self.index[tuple(MASK if fate == "mask" else v for v, fate in kept)]
                self.ways[x0, s] += 1
                for i, fate in enumerate(fates):
                    place = sum(f != "gone" for f in fates[: i + 1])
                    if fate == "gone":
                        self.gaps[x0, s, place] += 1
                    elif fate == "mask":
                        self.under[x0, s, place, clean[i]] += 1

        missing = (self.sizes[:, None, 0] - self.sizes[:, 0]).clamp(min=0)
        self._missing = F.one_hot(missing, width).double()

    def fate(self, sigma: Tensor) -> Tensor:
        """Chances that a token is gone, a mask, clean at ``sigma`` [b], float64 [b, 3], from the two rates."""
        pace = self.kernel.pace
        rates = torch.tensor([[-1, 0, 0], [1, -pace, 0], [0, pace, 0]], dtype=torch.float64)
        clock = -torch.log(-torch.expm1(-sigma.double()))
        found: Tensor = torch.linalg.matrix_exp(clock[:, None, None] * rates)[:, :, 0]
        return found

    def _summed(self, table: Tensor, law: Tensor) -> Tensor:
        """``table`` [x0, s, ...] over clean strings of ``law``, by how many tokens are missing: [s, a, ...]."""
        return torch.einsum("x,xsa,xs...->sa...", law, self._missing, table)

    def at(self, sigma: Tensor, law: Tensor | None = None) -> Tensor:
        """The law of noisy strings at each of ``sigma`` [b], float64 [b, s], from ``law`` [s] of clean ones."""
        gone, mask, clean = self.fate(sigma)[..., None].unbind(1)
        several = gone ** torch.arange(self.longest + 1)
        masks = self.sizes[:, 1]
        there: Tensor = mask**masks * clean ** (self.sizes[:, 0] - masks)
        return (several @ self._summed(self.ways, self.law if law is None else law).T) * there

    def outputs(self, strings: Strings, sigma: Tensor) -> dict[str, Tensor]:
        index = self.number(strings).clamp(max=len(self.strings) - 1)
        levels, level = torch.unique(sigma, return_inverse=True)
        several = (self.fate(levels)[:, :1] ** torch.arange(self.longest + 1))[level]

        def mean(table: Tensor) -> Tensor:
            return torch.einsum("ba,ba...->b...", several, self._summed(table, self.law)[index])

        total = mean(self.ways).clamp(min=1e-300)
        gap, under = mean(self.gaps) / total[:, None], mean(self.under) / total[:, None, None]
        width = strings.tokens.shape[1]
        found = {"log_gap": gap, "log_x0": F.pad(under, (0, 1))}
        return {k: wide(v, width).clamp(min=1e-300).log().float() for k, v in found.items()}

    def generator(self, sigma: Tensor) -> Tensor:
        """Rates of generation from each string (second) to each other (first) per unit of sigma, for a perfect network,
        float64 [b, s, s]."""
        count, b = len(self.strings), len(sigma)
        rows = self.rows(torch.arange(count))
        many = Strings(rows.tokens.repeat(b, 1), rows.attend.repeat(b, 1))
        outputs = self.outputs(many, sigma.repeat_interleave(count))
        gap = outputs["log_gap"].double().exp().view(b, count, -1)
        under = outputs["log_x0"].double().exp().view(b, count, self.longest + 1, -1)
        pace = self.kernel.weights(sigma)
        rates = torch.zeros(b, count, count, dtype=torch.float64)
        for i, s in enumerate(self.strings):
            for j in range(len(s) + 1):
                if len(s) < self.longest:
                    rates[:, self.index[(*s[:j], MASK, *s[j:])], i] += pace[:, 0] * gap[:, i, j]
            for j, v in itertools.product((j for j, u in enumerate(s) if u == MASK), range(TOKENS)):
                rates[:, self.index[(*s[:j], v, *s[j + 1 :])], i] += pace[:, 1] * under[:, i, j + 1, v]
        return rates - torch.diag_embed(rates.sum(1))

    def check_kernel(self, end: float) -> list[Check]:
        return check_flexmdm(self.kernel, end=end)


def check_flexmdm(kernel: FlexKernel, *, end: float) -> list[Check]:
    """Closed forms, draws, prior, targets and rates fit together; ``end`` is the total noise at t = 1."""
    toy = FlexToy(kernel)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    found = torch.stack([-torch.expm1(-levels), kernel.masked(levels)], -1)
    law = float((found - toy.fate(levels)[:, :2]).abs().max())
    x0, s = toy.ways.nonzero().unbind(1)
    strings = toy.rows(s)
    target = kernel.target(toy.batch(x0), strings)
    ways = toy.ways[x0, s]
    gap = float((target.missing - toy.gaps[x0, s] / ways[:, None]).abs().max())
    said = torch.zeros(len(s), toy.longest + 1, TOKENS + 1)
    said.scatter_add_(2, target.symbols.transpose(1, 2), target.filled.transpose(1, 2))
    under = float((said[..., :TOKENS] - toy.under[x0, s] / ways[:, None, None]).abs().max())
    every = f"{len(s)} pairs of strings, enumerated"
    return [
        Check(
            "edits.law",
            "how many tokens are gone and masks is what the two rates say",
            law < 1e-9,
            f"{law:.1e}",
            f"matrix exponential, {len(LEVELS)} noise levels",
        ),
        Check(
            "edits.gap",
            "how many tokens are missing in each gap, given the clean string",
            gap < 1e-6,
            f"{gap:.1e}",
            every,
        ),
        Check("edits.mask", "what stands under each mask, given the clean string", under < 1e-6, f"{under:.1e}", every),
        _transport(toy),
        *_draws(toy),
        Check(
            "edits.forgets",
            "at t = 1 noise has taken the text away",
            math.exp(-end) < 0.01,
            f"{math.exp(-end):.1e}",
            "exp(-sigma(1)), the share of tokens that are left",
        ),
    ]


def _transport(toy: FlexToy) -> Check:
    """The master equation, by exponentials at the middle of steps that are even in log(exp(sigma) - 1)."""
    grid = torch.linspace(12.0, -12.0, 385, dtype=torch.float64)
    sigma = F.softplus(grid)
    middle = F.softplus((grid[1:] + grid[:-1]) / 2)
    steps = torch.linalg.matrix_exp(toy.generator(middle) * (sigma[:-1] - sigma[1:])[:, None, None])
    law = torch.zeros(len(toy.strings), dtype=torch.float64)
    law[0] = 1.0
    worst = 0.0
    for step, there in zip(steps, toy.at(sigma[1:]), strict=True):
        law = step @ law
        worst = max(worst, float((law - there).abs().sum() / 2))
    return Check(
        "edits.transport",
        "with a perfect network the rates of generation take the empty string to the law of the data, by those of noisy strings",
        worst < 5e-3,
        f"{worst:.1e}",
        f"total variation, the worst of {len(steps)} steps of the master equation on {len(toy.strings)} strings",
    )


def _draws(toy: FlexToy) -> list[Check]:
    kernel, draws, count = toy.kernel, 20_000, len(toy.strings)
    worst, level = 0.0, torch.tensor([0.7])
    for clean in ((), (0, 1), (0, 1, 1)):
        x0 = toy.index[clean]
        random = Randomness(torch.Generator().manual_seed(2))
        seen = toy.number(
            kernel.sample(toy.batch(torch.full((draws,), x0)), level.expand(draws), random=random, width=None)
        )
        found = torch.bincount(seen, minlength=count + 1)[:count].double() / draws
        law = toy.at(level, F.one_hot(torch.tensor(x0), count).double())[0]
        worst = max(worst, float((found - law).abs().sum() / 2))
    noise = kernel.prior(4, longest=toy.longest, generator=torch.Generator().manual_seed(1), allowed=None)
    empty = bool((noise.lengths == 0).all())
    return [
        Check(
            "edits.sample",
            "draws of x_t follow the two rates",
            worst < 0.03,
            f"{worst:.4f}",
            "total variation, 20,000 draws",
        ),
        Check("edits.prior", "noise at t = 1 is the prior", empty, "yes" if empty else "no", "the empty string"),
    ]
