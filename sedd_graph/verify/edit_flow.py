"""Verification of Edit Flow kernels (arXiv 2506.09018) by enumeration of all short strings.

The rates of a perfect network (:class:`~sedd_graph.verify.edit_flow_cases.EditFlowCases`) must transport the
distribution of noise to that of data.

Axes: b rows.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.strings.columns import BLANK
from sedd_graph.diffusion.strings.edit_flow import EditFlowKernel
from sedd_graph.diffusion.strings.kernel import StringKernel
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.verify.edit_flow_cases import EditFlowCases
from sedd_graph.verify.string_draws import NOISE, Sample, check_draws, check_prior, check_prior_is_noise

__all__ = ["EditFlowTable"]

LEVELS = (0.02, 0.3, 1.0, 3.0)
"""Values of the total noise sigma at which the transport of noise to data is verified."""


class EditFlowTable(EditFlowCases):
    """Enumeration of all cases of an Edit Flow, with the checks of its kernel.

    Args:
        kernel: The kernel, constructed with two or three data tokens.
    """

    def check_kernel(self, end: float) -> list[Check]:
        """Verify alignments, rates, draws and prior of the kernel against the enumeration.

        Args:
            end: Total noise at t = 1.

        Returns:
            The results of the checks.
        """
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        edge = torch.tensor([60.0, 0.0], dtype=torch.float64)
        ends = float((self.at(edge) - torch.stack([self.first, self.law])).abs().max())
        change = float((self.change(levels) @ self.mass.T - self.flow(levels)).abs().max())
        all_noise = "with no column clean the strings are noise, and with all clean they are data"
        transport = "the rates of a perfect network transport the distribution of noise to that of data"
        how = f"Kolmogorov's forward equation on {len(self.strings)} strings, {len(LEVELS)} noise levels"
        cases = f"{len(self.ends)} pairs, {len(self.pairs):,} cases"
        return [
            self._check_columns(),
            Check.below("strings.ends", all_noise, ends, 1e-9, cases),
            Check.below("strings.transport", transport, change, 1e-9, how),
            check_draws(
                "strings.sample",
                "draws of x_t follow the enumerated distribution",
                self,
                _sampler(self.kernel),
                self.levels(),
                self.proof,
            ),
            check_prior(self, NOISE, self.noisy),
            Check.below(
                "strings.forgets",
                "at t = 1 no text is left",
                math.exp(-end),
                0.01,
                "exp(-sigma(1)), the share of columns that are clean",
            ),
        ]

    def _check_columns(self) -> Check:
        """Verify that the columns of each alignment spell both strings, with at least as many edits as necessary."""
        wrong, more = 0, 0

        @functools.cache
        def distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
            if not a or not b:
                return len(a) + len(b)
            return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

        for (a, b), noise, clean in zip(self.ends, *(x.tolist() for x in self.columns), strict=True):
            spelled = [tuple(v for v in row if v != BLANK) for row in (noise, clean)]
            wrong += spelled != [self.strings[a], self.strings[b]]
            more += sum(x != y for x, y in zip(noise, clean, strict=True)) - distance(self.strings[a], self.strings[b])
        claim = "columns without their blanks are the noise string and the clean string"
        how = f"every pair; {more} edits more than the Levenshtein distances"
        return Check("strings.columns", claim, not wrong and more >= 0, f"{wrong} of {len(self.ends)} wrong", how)

    def check_declared(self, declared: StringKernel, end: float) -> list[Check]:
        """Verify that the prior of the declared kernel has the distribution of random text after maximum noise.

        Args:
            declared: The kernel as declared in the blueprint.
            end: Total noise at t = 1; not used.

        Returns:
            One check; an empty list if the declared kernel is no :class:`EditFlowKernel`.
        """
        if not isinstance(declared, EditFlowKernel):
            return []
        mean = declared.spread / (1 - declared.spread)
        return [check_prior_is_noise(declared, _sampler(declared), NOISE, min(mean, declared.longest or mean))]


def _sampler(kernel: EditFlowKernel) -> Sample:
    """Return a function that draws noisy strings, without their remaining edits."""

    def sample(batch: Batch, sigma: Tensor, random: Randomness) -> Strings:
        return kernel.sample(batch, sigma, random=random, width=None)[0]

    return sample
