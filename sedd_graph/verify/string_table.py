"""Enumerable instances of string kernels whose noise is enumerated too: every way in which a clean string becomes noisy.

With these, means of losses are sums over all cases rather than averages over random draws. A *case* is a clean string
with one way to noise it.

Axes: b noise levels, c clean strings, s strings of the table, e cases, r selected cases, w positions of a padded string
(position 0 holds the BOS token), v data tokens.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from sedd_graph.component.check import Proof
from sedd_graph.diffusion.strings.kernel import StringTable

__all__ = ["Cases", "EnumeratedTable", "kept_subsets"]


@dataclasses.dataclass(frozen=True)
class Cases:
    """All cases of a table: each is a clean string with one way to turn it into a noisy string.

    Several cases can have the same clean and noisy string, such as deletions of either token of ``aa``.

    Attributes:
        x0: Index of the clean string of each case in the table's strings, int64 [e].
        here: Index of its noisy string in the table's strings, int64 [e].
        share: Probability of the case given its clean and its noisy string, float64 [e].
        kept: True for clean tokens that are not deleted, bool [e, n], n the length of the longest clean string; None if
            the cases of the kernel do not record it.
    """

    x0: Tensor
    here: Tensor
    share: Tensor
    kept: Tensor | None = None


class EnumeratedTable(StringTable):
    """All short strings and all ways to noise them, under a string kernel with few data tokens.

    In addition to the strings, a table enumerates its *cases*: each is a clean string with one way to noise it. The
    mean of a loss is then a sum over cases instead of an average over random draws.

    Attributes:
        kinds: For each network output by name, its column in :meth:`StringKernel.weights`, which returns the factor of
            each kind of edit in the reverse rates.
        log_probabilities: Names of the outputs that are log-probabilities of a token. Their loss is a cross-entropy;
            the loss of every other output u is exp(u) - target * u.
        least: Probability up to which a case is omitted from means of losses.
        rounding: Relative error of the enumeration and of the losses that are compared with it. It is larger where
            strings that are too long for the table have a positive probability.
    """

    kinds: ClassVar[Mapping[str, int]]
    log_probabilities: ClassVar[frozenset[str]] = frozenset()
    least: float = 1e-10
    rounding: float = 2e-5
    proof: Proof = "full"
    """Strength of :meth:`check_kernel`: ``full``, or ``quick`` with fewer draws."""

    @property
    @abstractmethod
    def cases(self) -> Cases:
        """All cases."""

    @abstractmethod
    def conditional(self, sigma: Tensor) -> Tensor:
        """Return the probability of each noisy string given each clean string.

        Args:
            sigma: Total noise, float64 [b].

        Returns:
            float64 [b, c, s], over the clean strings :attr:`clean_strings`.
        """

    @abstractmethod
    def targets(self, case: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """Return the regression targets of the network outputs for given cases.

        The exponential of an output of a perfect network is the mean of its target given the noisy string.

        Args:
            case: Index of each case (a clean string with one way to noise it), int64 [r].
            sigma: Total noise of each case, float64 [r].

        Returns:
            Targets by output name, float64: [r, w, v] for an output with one number per data token, else [r, w].
        """

    @cached_property
    def clean_strings(self) -> Tensor:
        """Indices of the strings that are clean with positive probability, int64 [c]."""
        return self.law.nonzero()[:, 0]

    @abstractmethod
    def at(self, sigma: Tensor) -> Tensor:
        """Return the distribution of noisy strings, float64 [b, s], at total noise ``sigma``, float64 [b]."""

    def levels(self) -> Tensor:
        """Return noise levels at which draws are compared, float64 [b], evenly spaced in log sigma from 5e-4 to 7."""
        return torch.logspace(
            math.log10(5e-4), math.log10(7.0), 32 if self.proof == "quick" else 80, dtype=torch.float64
        )

    def chance(self, sigma: Tensor) -> Tensor:
        """Return the probability of each case, float64 [b, e], at total noise ``sigma``, float64 [b]."""
        cases = self.cases
        row = torch.searchsorted(self.clean_strings, cases.x0)
        return self.law[cases.x0] * self.conditional(sigma)[:, row, cases.here] * cases.share

    def drawn(self, case: Tensor) -> Any:
        """Return what the kernel's ``sample`` returns if it draws the cases ``case``, int64 [r]."""
        strings, kept = self.rows(self.cases.here[case]), self.cases.kept
        return strings if kept is None else dataclasses.replace(strings, kept=kept[case])

    @property
    def exact(self) -> Tensor:
        """Strings whose enumerated targets do not suffer from the maximum length of the table, bool [s]."""
        return torch.ones(len(self.strings), dtype=torch.bool)

    # -- the bound of a perfect network ---------------------------------------------------------------------------------

    @property
    def whole(self) -> float:
        """Mean bound on -log p(x_0) of a perfect network, nats per string, with noise levels from 0 to infinity.

        By default the bound is tight, and this is the entropy of the clean strings.
        """
        return self.entropy

    def spent(self, sigma: Tensor) -> Tensor:
        """Return the part of the bound of a perfect network that lies below a noise level.

        By default the bound is tight: the part is the entropy of the clean string given the noisy one.

        Args:
            sigma: Total noise, float64 [b].

        Returns:
            Nats, float64 [b].
        """
        joint = self.law[self.clean_strings, None] * self.conditional(sigma).clamp(min=0)
        return (torch.xlogy(joint.sum(1), joint.sum(1)).sum(-1) - torch.xlogy(joint, joint).sum((1, 2))).clamp(min=0)

    def rate(self, sigma: Tensor) -> Tensor:
        """Return the derivative of :meth:`spent` with respect to total noise, float64 [b], by central differences.

        Args:
            sigma: Total noise, float64 [b].
        """
        h = 1e-3
        near, far = (self.spent(sigma * math.exp(k * h)) - self.spent(sigma * math.exp(-k * h)) for k in (1, 2))
        return (8 * near - far) / (12 * h * sigma)

    # -- one noise level of many cases ------------------------------------------------------------------------------------

    @cached_property
    def first_ways(self) -> tuple[Tensor, Tensor]:
        """Grouping of the cases into p pairs: those with the same clean and the same noisy string form a pair.

        The first tensor is the index of the first case of each pair, int64 [p]; the second is the index of the pair of
        each case, int64 [e].
        """
        number = self.cases.x0 * len(self.strings) + self.cases.here
        _, pair = torch.unique(number, return_inverse=True)
        first = torch.full((int(pair.max()) + 1,), len(pair)).scatter_reduce(0, pair, torch.arange(len(pair)), "amin")
        return first, pair

    def likely(self, sigma: Tensor, least: float, *, pairs: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the cases whose probability exceeds a limit, at each of several noise levels.

        A case is a clean string with one way to noise it.

        Args:
            sigma: Total noise, float64 [b].
            least: The limit; cases of this or a smaller probability are omitted.
            pairs: True to return one case of each pair of a clean and a noisy string, with the probability of the pair.

        Returns:
            Index of the noise level int64 [r], index of the case int64 [r], and its probability float64 [r].
        """
        level, case, chance = [], [], []
        for number, one in enumerate(sigma):
            found, first = self.chance(one[None])[0], None
            if pairs:
                first, pair = self.first_ways
                found = torch.zeros(len(first), dtype=torch.float64).index_add(0, pair, found)
            which = (found > least).nonzero()[:, 0]
            level.append(torch.full_like(which, number))
            case.append(which if first is None else first[which])
            chance.append(found[which])
        return torch.cat(level), torch.cat(case), torch.cat(chance)

    def factors(self, sigma: Tensor) -> dict[str, Tensor]:
        """Return the factor of each output in the rates, per unit of total noise, float64 [b], by name."""
        weights = self.kernel.weights(sigma.double()).double()
        return {name: weights[:, kind] for name, kind in self.kinds.items() if name in self.kernel.reads}


def kept_subsets(lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Return all subsets of the tokens of each of several strings: 2^n for a string of n tokens.

    Args:
        lengths: Number of tokens of each string.
        width: Number of columns of the masks, at least the largest of ``lengths``.

    Returns:
        Index of the string of each subset, int64 [e]; and masks that are true at the tokens in the subset, bool [e,
        width].
    """
    which, kept = [], []
    for number, length in enumerate(lengths):
        bits = torch.arange(2**length)[:, None] >> torch.arange(width) & 1
        which.append(torch.full((2**length,), number))
        kept.append(bits.bool())
    return torch.cat(which), torch.cat(kept)
