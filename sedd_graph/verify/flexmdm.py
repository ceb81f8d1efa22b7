"""Verification of the FlexMDM kernel (arXiv 2509.01025) by enumeration of all short strings.

In a noisy string each token of the clean string is in one of three states: deleted, masked or clean. All combinations
are enumerated for all short clean strings. The reference uses nothing but the two rates of generation: in
the time variable -log(1 - exp(-sigma)), a missing token is inserted as a mask at rate 1, and a mask is replaced by its
token at the rate ``kernel.pace``.

Axes: b rows, s strings, a number of missing tokens, w positions of a padded string (position 0 holds the BOS token, a
special state that marks the beginning and the padding), v data tokens (two or three).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.strings.flexmdm import FlexKernel
from sedd_graph.diffusion.strings.kernel import TOKENS, StringKernel
from sedd_graph.diffusion.strings.strings import Strings, wide
from sedd_graph.verify.string_draws import NOISE, check_draws, check_prior, check_prior_is_noise, check_spared
from sedd_graph.verify.string_table import Cases, EnumeratedTable

__all__ = ["FlexTable"]

LEVELS = (1e-3, 0.05, 0.7, 2.5)
"""Values of the total noise sigma at which the probabilities of deleted and masked tokens are verified."""
MASK = TOKENS
"""Mask of the table of two data tokens."""


class FlexTable(EnumeratedTable):
    """Enumeration of all short strings of symbols (data tokens and the mask), and of all ways to noise the clean ones.

    The maximum length is three symbols for two data tokens, and four for three. A way to noise a clean string leaves
    each of its tokens deleted, masked or clean.

    Args:
        kernel: The kernel, constructed with two or three data tokens.

    Attributes:
        law: Distribution of clean strings, float64 [s].
        index: Index of each string; the keys are strings as tuples of symbols.
        sizes: Number of symbols and number of masks of each string, int64 [s, 2].
        ways: Entry [i, j] is the number of ways in which clean string i becomes noisy string j, float64 [s, s].
        gaps: Entry [i, j, w] is the number of deleted tokens between positions w and w + 1 of the noisy string j,
            summed over the ways in which clean string i becomes j, float64 [s, s, w].
        under: Entry [i, j, w, v] is the number of ways in which clean string i becomes noisy string j and the mask at
            position w of j replaces token v, float64 [s, s, w, v].
    """

    kernel: FlexKernel
    kinds: ClassVar[Mapping[str, int]] = {"log_gap": 0, "log_x0": 1}
    log_probabilities: ClassVar[frozenset[str]] = frozenset({"log_x0"})

    def __init__(self, kernel: FlexKernel) -> None:
        self.mask, long = kernel.data_tokens, kernel.data_tokens + 1
        super().__init__(kernel, longest=long, clean=long, symbols=kernel.data_tokens + 1)
        self.index = {s: i for i, s in enumerate(self.strings)}
        count, width = len(self.strings), self.longest + 1
        self.sizes = torch.tensor([[len(s), s.count(self.mask)] for s in self.strings])
        x0, here, kept, gap, under = (
            list[int](),
            list[int](),
            list[list[bool]](),
            list[list[int]](),
            list[list[list[float]]](),
        )
        for number in self.law.nonzero()[:, 0].tolist():
            clean = self.strings[number]
            for fates in itertools.product(("gone", "mask", "clean"), repeat=len(clean)):
                left = [(v, fate) for v, fate in zip(clean, fates, strict=True) if fate != "gone"]
                x0.append(number)
                here.append(self.index[tuple(self.mask if fate == "mask" else v for v, fate in left)])
                kept.append([fate != "gone" for fate in fates] + [False] * (self.clean - len(clean)))
                places = list(itertools.accumulate(int(fate != "gone") for fate in fates))
                lost = [place for place, fate in zip(places, fates, strict=True) if fate == "gone"]
                gap.append([lost.count(place) for place in range(width)])
                hidden = {place: v for place, v, fate in zip(places, clean, fates, strict=True) if fate == "mask"}
                under.append([[float(hidden.get(w) == v) for v in range(self.mask)] for w in range(width)])
        self._x0, self._here, self._kept = torch.tensor(x0), torch.tensor(here), torch.tensor(kept)
        self._gap, self._under = (torch.tensor(x, dtype=torch.float64) for x in (gap, under))
        at = (self._x0, self._here)
        self.ways = torch.zeros(count, count, dtype=torch.float64)
        self.ways.index_put_(at, torch.ones(len(x0), dtype=torch.float64), accumulate=True)
        self.gaps = torch.zeros(count, count, width, dtype=torch.float64).index_put_(at, self._gap, accumulate=True)
        self.under = torch.zeros(count, count, width, self.mask, dtype=torch.float64)
        self.under.index_put_(at, self._under, accumulate=True)
        missing = (self.sizes[:, None, 0] - self.sizes[:, 0]).clamp(min=0)
        self._missing = F.one_hot(missing, width).double()

    @cached_property
    def cases(self) -> Cases:
        """All ways to noise the clean strings: all combinations of deleted, masked and clean tokens."""
        return Cases(self._x0, self._here, 1 / self.ways[self._x0, self._here], self._kept)

    def conditional(self, sigma: Tensor) -> Tensor:
        gone, mask, clean = self.fate(sigma)[..., None].unbind(1)
        length, masks = self.sizes.T
        several = gone ** torch.arange(self.longest + 1)
        lost = (self.sizes[self.clean_strings, None, 0] - length).clamp(min=0)
        found: Tensor = (
            several[:, lost] * self.ways[self.clean_strings] * (mask**masks * clean ** (length - masks))[:, None]
        )
        return found

    def targets(self, case: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        return {"log_gap": self._gap[case], "log_x0": F.pad(self._under[case], (0, 1))}

    def fate(self, sigma: Tensor) -> Tensor:
        """Return the probabilities that a token of the clean string is deleted, masked or clean at a noise level.

        They are computed by matrix exponential from the rate of insertion as a mask, 1, and the rate of unmasking,
        ``kernel.pace``, in the time variable -log(1 - exp(-sigma)).

        Args:
            sigma: Total noise, float [b].

        Returns:
            Probabilities in the order deleted, masked, clean, float64 [b, 3].
        """
        pace = self.kernel.pace
        rates = torch.tensor([[-1, 0, 0], [1, -pace, 0], [0, pace, 0]], dtype=torch.float64)
        clock = -torch.log(-torch.expm1(-sigma.double()))
        found: Tensor = torch.linalg.matrix_exp(clock[:, None, None] * rates)[:, :, 0]
        return found

    def _summed(self, table: Tensor, law: Tensor) -> Tensor:
        """Sum ``table`` [s, s, ...] over clean strings with weights ``law`` [s], by missing tokens, [s, a, ...]."""
        return torch.einsum("x,xsa,xs...->sa...", law, self._missing, table)

    @cached_property
    def _sums(self) -> list[Tensor]:
        """The sums of ways, missing tokens and tokens under masks over clean strings, by missing tokens."""
        return [self._summed(table, self.law) for table in (self.ways, self.gaps, self.under)]

    def at(self, sigma: Tensor, law: Tensor | None = None) -> Tensor:
        """Return the distribution of noisy strings x_t.

        Args:
            sigma: Total noise, float [b].
            law: Distribution of clean strings, float64 [s]; None for the table's attribute ``law``.

        Returns:
            Probabilities, float64 [b, s].
        """
        gone, mask, clean = self.fate(sigma)[..., None].unbind(1)
        several = gone ** torch.arange(self.longest + 1)
        masks = self.sizes[:, 1]
        there: Tensor = mask**masks * clean ** (self.sizes[:, 0] - masks)
        return (several @ self._summed(self.ways, self.law if law is None else law).T) * there

    def outputs(self, strings: Strings, sigma: Tensor) -> dict[str, Tensor]:
        index = self.number(strings).clamp(max=len(self.strings) - 1)
        levels, level = torch.unique(sigma, return_inverse=True)
        several = (self.fate(levels)[:, :1] ** torch.arange(self.longest + 1))[level]
        total, gap, under = (torch.einsum("ba,ba...->b...", several, table[index]) for table in self._sums)
        total = total.clamp(min=1e-300)
        gap, under = gap / total[:, None], under / total[:, None, None]
        width = strings.tokens.shape[1]
        found = {"log_gap": gap, "log_x0": F.pad(under, (0, 1))}
        return {k: wide(v, width).clamp(min=1e-300).log().float() for k, v in found.items()}

    def generator(self, sigma: Tensor) -> Tensor:
        """Return the rate matrix of generation (the reverse process) with a perfect network.

        Args:
            sigma: Total noise, float [b].

        Returns:
            Rates per unit of sigma, float64 [b, s, s]. Entry [i, j] is the rate from string j to string i; columns sum
            to 0.
        """
        count, b = len(self.strings), len(sigma)
        rows = self.rows(torch.arange(count))
        many = Strings(rows.tokens.repeat(b, 1), rows.attend.repeat(b, 1))
        outputs = self.outputs(many, sigma.repeat_interleave(count))
        gap = outputs["log_gap"].double().exp().view(b, count, -1)
        under = outputs["log_x0"].double().exp().view(b, count, self.longest + 1, -1)
        unit = self.kernel.weights(sigma)
        rates = torch.zeros(b, count, count, dtype=torch.float64)
        for i, s in enumerate(self.strings):
            for j in range(len(s) + 1):
                if len(s) < self.longest:
                    rates[:, self.index[(*s[:j], self.mask, *s[j:])], i] += unit[:, 0] * gap[:, i, j]
            for j, v in itertools.product((j for j, u in enumerate(s) if u == self.mask), range(self.mask)):
                rates[:, self.index[(*s[:j], v, *s[j + 1 :])], i] += unit[:, 1] * under[:, i, j + 1, v]
        return rates - torch.diag_embed(rates.sum(1))

    def check_kernel(self, end: float) -> list[Check]:
        """Verify closed forms, regression targets, rates, draws and prior of the kernel against the enumeration.

        Args:
            end: Total noise at t = 1.

        Returns:
            The results of the checks.
        """
        law, gap, mask, pairs = self._errors()
        fates = "the probabilities that a token is gone or masked follow from the two rates"
        exponential, every = f"matrix exponential, {len(LEVELS)} noise levels", f"{pairs} pairs of strings, enumerated"
        missing = "the expected number of tokens missing in each gap, given the clean string"
        masked = "the probabilities of the token under each mask, given the clean string"
        forgets, left = "at t = 1 no text is left", math.exp(-end)
        return [
            Check.below("strings.law", fates, law, 1e-9, exponential),
            Check.below("strings.gap", missing, gap, 1e-6, every),
            Check.below("strings.mask", masked, mask, 1e-6, every),
            self._check_transport(),
            check_draws(
                "strings.sample", "draws of x_t follow the two rates", self, self._sample, self.levels(), self.proof
            ),
            *check_spared(self, self._sample),
            check_prior(self, NOISE, self.longest),
            Check.below("strings.forgets", forgets, left, 0.01, "exp(-sigma(1)), the share of tokens that are left"),
        ]

    def _sample(self, batch: Batch, sigma: Tensor, random: Randomness) -> Strings:
        return self.kernel.sample(batch, sigma, random=random, width=None)

    def check_declared(self, declared: StringKernel, end: float) -> list[Check]:
        """Verify that the prior of the declared kernel has the distribution of random text after maximum noise.

        Args:
            declared: The kernel as declared in the blueprint.
            end: Total noise at t = 1; not used.

        Returns:
            One check; an empty list if the declared kernel is no :class:`FlexKernel`.
        """
        if not isinstance(declared, FlexKernel):
            return []

        def sample(batch: Batch, sigma: Tensor, random: Randomness) -> Strings:
            return declared.sample(batch, sigma, random=random, width=None)

        return [check_prior_is_noise(declared, sample, NOISE, 0.0)]

    def _errors(self) -> tuple[float, float, float, int]:
        """Return the largest errors of three closed forms, and the number of pairs of a clean and a noisy string.

        The closed forms are the probabilities of deleted and masked tokens, the expected numbers of missing tokens, and
        the probabilities of tokens under masks.
        """
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        found = torch.stack([-torch.expm1(-levels), self.kernel.masked(levels)], -1)
        law = float((found - self.fate(levels)[:, :2]).abs().max())
        x0, s = self.ways.nonzero().unbind(1)
        target = self.kernel.target(self.batch(x0), self.rows(s))
        ways = self.ways[x0, s]
        gap = float((target.missing - self.gaps[x0, s] / ways[:, None]).abs().max())
        filled = torch.zeros(len(s), self.longest + 1, self.mask + 1)
        filled.scatter_add_(2, target.symbols.transpose(1, 2), target.filled.transpose(1, 2))
        mask = float((filled[..., : self.mask] - self.under[x0, s] / ways[:, None, None]).abs().max())
        return law, gap, mask, len(s)

    def _check_transport(self) -> Check:
        """Verify that the rates transport the distributions of noisy strings, by Kolmogorov's forward equation.

        The change of the distribution with total noise must be the net flow under the rates of generation, reversed.
        """
        levels, h = torch.tensor(LEVELS, dtype=torch.float64), 1e-3
        near, far = (self.at(levels * math.exp(k * h)) - self.at(levels * math.exp(-k * h)) for k in (1, 2))
        slope = (8 * near - far) / (12 * h)
        flow = torch.einsum("bij,bj->bi", self.generator(levels), self.at(levels)) * levels[:, None]
        worst = float((slope + flow).abs().max())
        claim = "the rates of a perfect network transport the empty string to the distribution of data, through those of noisy strings"
        how = f"Kolmogorov's forward equation on {len(self.strings)} strings, {len(LEVELS)} noise levels"
        return Check.below("strings.transport", claim, worst, 1e-6, how)
