"""Enumerable instances of string kernels, for numerical verification: few tokens, and all short strings.

Axes are those of :mod:`sedd_graph.diffusion.strings.kernel`, and s strings of an enumerable instance.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.kernel import TOKENS, StringKernel
from sedd_graph.diffusion.strings.objective import StringObjective
from sedd_graph.diffusion.strings.strings import Strings

__all__ = ["StringTable"]


def _dependent(tokens: tuple[int, ...], longest: int) -> float:
    """Return a weight under which tokens depend strongly on the token before them, and long strings are likely.

    The first token is token 0 three times out of four. Behind token v, token v + 1 is nine times as likely as another.
    The weights of strings of each length sum to at most length + 1, so that lengths are not uniform.

    Args:
        tokens: The string.
        longest: Largest length of a clean string.
    """
    weight = (len(tokens) + 1.0) * (longest >= len(tokens))
    for before, token in zip((-1, *tokens), tokens, strict=False):
        weight *= 0.75 if token == before + 1 else 0.1
    return weight


class StringTable(ABC):
    """A string kernel with few tokens, and all strings up to a maximum length, enumerated for numerical verification.

    The table has a distribution of clean strings, from which exact results are computed: the entropy, and the outputs
    of a perfect network, one that is optimal for this distribution. The kernel and its objectives are compared with
    them.

    Args:
        kernel: The kernel, with few data tokens.
        longest: Number of tokens of the longest string.
        clean: Number of tokens of the longest clean string.
        one_length: True: all clean strings have ``clean`` tokens.
        symbols: Number of states in strings: the data tokens, followed by states that occur only in noisy strings, such
            as a mask. None: the number of data tokens.

    Attributes:
        strings: All strings of at most ``longest`` tokens out of ``symbols`` states, as tuples.
        law: float64 [s], the probability that the clean string is each of the ``strings``.
    """

    def __init__(
        self, kernel: StringKernel, *, longest: int, clean: int, one_length: bool = False, symbols: int | None = None
    ) -> None:
        self.kernel, self.longest, self.clean = kernel, longest, clean
        self.symbols = kernel.data_tokens if symbols is None else symbols
        self.strings = [s for n in range(longest + 1) for s in itertools.product(range(self.symbols), repeat=n)]
        weights = torch.rand(len(self.strings), generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.2
        lengths = torch.tensor([len(s) for s in self.strings])
        weights *= (lengths == clean) if one_length else (lengths <= clean)
        weights *= torch.tensor([max(s, default=0) < kernel.data_tokens for s in self.strings])
        if kernel.data_tokens > TOKENS:
            weights *= torch.tensor([_dependent(s, clean) for s in self.strings], dtype=torch.float64)
        self.law = weights / weights.sum()

    @property
    def entropy(self) -> float:
        """Entropy of the distribution of clean strings, nats."""
        return float(-torch.xlogy(self.law, self.law).sum())

    def rows(self, index: Tensor) -> Strings:
        """Return the strings at the indices ``index`` of :attr:`strings`, padded to ``longest`` tokens.

        Args:
            index: int64 [b].
        """
        tokens, lengths = self._padded
        return Strings(tokens[index], torch.arange(self.longest + 1) <= lengths[index, None])

    @cached_property
    def _padded(self) -> tuple[Tensor, Tensor]:
        """All strings behind the BOS token, padded, int64 [s, w], and their lengths, int64 [s]."""
        tokens = torch.full((len(self.strings), self.longest + 1), self.kernel.start)
        for i, s in enumerate(self.strings):
            tokens[i, 1 : len(s) + 1] = torch.tensor(s, dtype=torch.int64)
        return tokens, torch.tensor([len(s) for s in self.strings])

    def batch(self, index: Tensor) -> Batch:
        """Return the clean strings at the indices ``index`` of :attr:`strings` as a batch without prompts.

        Args:
            index: int64 [b].
        """
        strings = self.rows(index)
        tokens, real = strings.tokens[:, 1 : self.clean + 1], strings.attend[:, 1 : self.clean + 1]
        return Batch(torch.where(real, tokens, 0), real, real, real)

    def number(self, strings: Strings) -> Tensor:
        """Return the index of each string in :attr:`strings`.

        Args:
            strings: b strings.

        Returns:
            int64 [b]; s, the number of all strings, for a string of more than ``longest`` tokens.
        """
        lengths = strings.lengths
        value = torch.zeros_like(lengths)
        for column in range(1, min(strings.tokens.shape[1], self.longest + 1)):
            value = torch.where(strings.attend[:, column], value * self.symbols + strings.tokens[:, column], value)
        found = (self.symbols**lengths - 1) // (self.symbols - 1) + value
        return torch.where(lengths <= self.longest, found, len(self.strings))

    @abstractmethod
    def outputs(self, strings: Strings, sigma: Tensor) -> dict[str, Tensor]:
        """Return the outputs of a perfect network by name, float32: those that are optimal for :attr:`law`.

        Args:
            strings: b noisy strings.
            sigma: Total noise, [b].
        """

    def check_kernel(self, end: float) -> list[Check]:
        """Verify the kernel's closed forms, sampling and prior against exact results for all :attr:`strings`.

        Args:
            end: Total noise at t = 1.
        """
        return []

    def check_declared(self, declared: StringKernel, end: float) -> list[Check]:
        """Verify the kernel with its full vocabulary, in properties that the table's few tokens cannot show.

        For example, that the prior is what noise leaves of random text. By default nothing is verified.

        Args:
            declared: The kernel as declared in the blueprint.
            end: Total noise at t = 1.
        """
        return []

    def check_objective(self, objective: StringObjective[Any, Any], schedule: Schedule) -> list[Check]:
        """Verify that the bound is tight: for a perfect network its mean is the entropy of the clean strings.

        A perfect network is one whose outputs are optimal for the distribution of clean strings (:meth:`outputs`). The
        mean is a Monte Carlo estimate.

        Args:
            objective: The objective whose loss is evaluated.
            schedule: Total noise as a function of time.
        """
        means = []
        for seed in range(64):
            chosen, nats = self.perfect(objective, schedule, 4_000, seed=3 + seed)
            # if all strings have one length, the bound counts it as known, and so does the law
            means.append((nats + self.law[chosen].log()).mean())
        mean, error = float(torch.stack(means).mean()), float(torch.stack(means).std() / math.sqrt(len(means)))
        return [
            Check(
                "objective.tight",
                "with a perfect network the bound is the entropy of the data",
                abs(mean) < 5 * error + 0.003,
                f"{self.entropy + mean:.4f} +- {error:.4f} against {self.entropy:.4f} nats",
                f"64 times 4,000 draws on {int((self.law > 0).sum())} strings",
            )
        ]

    def perfect(
        self, objective: StringObjective[Any, Any], schedule: Schedule, rows: int, *, seed: int = 3
    ) -> tuple[Tensor, Tensor]:
        """Draw clean strings and one noisy string x_t of each, and evaluate the loss of a perfect network.

        A perfect network is one whose outputs are optimal for the distribution of clean strings (:meth:`outputs`).

        Args:
            objective: The objective, whose :meth:`StringObjective.bound_draw` and loss are used.
            schedule: Total noise as a function of time.
            rows: Number of clean strings to draw.
            seed: Seed of the random numbers.

        Returns:
            Indices of the clean strings in :attr:`strings`, int64 [rows], and losses, nats, float64 [rows].
        """
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.multinomial(self.law, rows, replacement=True, generator=generator)
        draw = objective.bound_draw(self.batch(chosen), self.kernel, schedule, random=Randomness(generator))
        outputs = self.outputs(Strings(draw.xt, draw.attend), draw.sigma)
        return chosen, objective.loss(outputs, draw, self.kernel).double()
