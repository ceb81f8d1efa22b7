"""Interfaces of processes that change the length of strings: kernel, noisy batch, objective, enumerable instance.

An enumerable instance is a kernel with few tokens, together with all short strings, for numerical verification. A
kernel has k kinds of edits: insertions first, then deletions, then others such as substitutions. Axes: b rows, w
positions of a noisy string (the BOS token first, padded), n tokens of a clean string (padded), v data tokens, s
strings of an enumerable instance. Position 0 is the BOS token; gap j is the place for insertions behind position j.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.check import Check
from sedd_graph.component.outputs import Input, Output
from sedd_graph.diffusion.batch import Batch, Randomness, part_of
from sedd_graph.diffusion.distillation import Distillable
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.aligned_noise import AlignedNoise
from sedd_graph.diffusion.strings.fates import Fates
from sedd_graph.diffusion.strings.strings import Strings

__all__ = ["LEAST", "TOKENS", "Kernel_", "StringDraw", "StringKernel", "StringObjective", "StringTable", "square_clock"]

LEAST = 1e-4
"""Smallest total noise in Monte Carlo estimates of the bound on -log p(x_0).

Noise below this level changes about this fraction of the tokens, and is neglected.
"""
TOKENS = 2
"""Number of data tokens of the smallest enumerable instance, a kernel of which all short strings are enumerated."""

LOG_INSERT = Output(
    "log_insert", "float b l v", "log of the expected number of times that each token is missing behind a position"
)
LOG_DELETE = Output("log_delete", "float b l", "log probability that the token at a position is noise")
LOG_SUBSTITUTE = Output("log_substitute", "float b l v", "log probability that the token becomes another")

FEEDS = (
    Input("tokens", "int b l", "noisy strings, the BOS token first"),
    Input("sigma", "float b", "total noise"),
    Input("attend", "bool b l", "positions that are not padding; give it to every attention", required=True),
)
"""Inputs of a graph that processes strings."""


@dataclasses.dataclass(frozen=True)
class StringDraw:
    """Noisy strings of a batch, sampled from the forward process, with their noise levels.

    Objectives extend this class with the terms of their loss that do not depend on the network, such as regression
    targets. The first axis of every tensor, also of those in tuples, is that of the rows.

    Attributes:
        xt: int64 [b, w], the noisy strings. Position 0 is the BOS token, the state that marks the beginning and the
            padding.
        attend: bool [b, w], True at position 0 and at tokens, False at padding.
        sigma: float32 [b], total noise.
        cut: Number of tokens that exceeded w positions and were dropped, over all rows.
    """

    xt: Tensor
    attend: Tensor
    sigma: Tensor
    cut: int = dataclasses.field(default=0, kw_only=True)

    @property
    def t(self) -> Tensor:
        """Probability that noise has hit a token, 1 - exp(-sigma), float32 [b]."""
        return -torch.expm1(-self.sigma)

    def part(self, part: range) -> Self:
        """Return the draw of the rows ``part``, as :func:`sedd_graph.diffusion.batch.part_of` does."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "cut"}
        taken: dict[str, Any] = tree_map_only(Tensor, lambda value: part_of(value, part), tensors)
        return dataclasses.replace(self, **taken)


class StringKernel(Component, ABC):
    """The forward process of strings, which inserts, deletes or changes tokens, and factors of its reverse rates.

    The reverse rate of an edit is the exponentiated output of the network times the factor of its kind of edit
    (:meth:`weights`), so that the outputs are of order one at every noise level.
    """

    abstract: ClassVar[bool] = True
    extra_states: ClassVar[int] = 1
    """Number of states without a network output: 1, the BOS token.

    The number of states of a kernel is this number plus the size of the last axis of the first network output, in the
    order of :meth:`parametrizations`.
    """
    toys: ClassVar[tuple[int, ...]] = (TOKENS,)
    """Vocabulary sizes, in data tokens, for which :meth:`table` can enumerate all short strings of the kernel.

    Numerical verification runs on a kernel of each of these sizes.
    """

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        """Return a Config of this kernel for a small vocabulary and short strings, for numerical verification.

        By default it is ``config`` unchanged.

        Args:
            config: The kernel's Config in the blueprint.
            states: Number of states of the small vocabulary, the BOS token included.
        """
        return config

    @property
    def states(self) -> int:
        """Number of states n, the BOS token included."""
        return self.axis("n")

    @property
    def data_tokens(self) -> int:
        """Number of states that are data tokens."""
        return self.states - 1

    @property
    def start(self) -> int:
        """Index of the BOS token, which is the first position of every row and its padding."""
        return self.states - 1

    @property
    def supports_prompts(self) -> bool:
        """True if the kernel never changes tokens with :attr:`Batch.corrupt` False.

        Models can then be trained with clean prompts.
        """
        return False

    def refuses_prompts(self) -> str | None:
        """Return the reason why given tokens cannot be held fixed in generation; None if they can."""
        return None

    @classmethod
    def own_schedule(cls, config: ComponentConfig) -> None:
        """Return None: a string kernel is in continuous time, and takes any schedule."""

    @classmethod
    @abstractmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        """Return the sets of network outputs that this kernel can read; a graph has all outputs of one set.

        The first output of each set is [b, l, v], with the v data tokens on its last axis; that is how the number of
        tokens is read from a graph.
        """

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the network outputs that samplers require."""
        return tuple(output.name for output in self.parametrizations(self.config)[0])

    @abstractmethod
    def table(self, *, one_length: bool) -> StringTable:
        """Return the enumerable instance of this kernel, on which numerical verification runs.

        It consists of all short strings, a distribution of clean strings, and the outputs of a perfect network. The
        number of data tokens of the kernel must be one of :attr:`toys`.

        Args:
            one_length: True: all clean strings have the same length; False: their lengths vary.
        """

    @abstractmethod
    def weights(self, sigma: Tensor) -> Tensor:
        """Return the factor of each kind of edit in the reverse rates, per unit of sigma.

        The reverse rate of an edit is its factor times the exponentiated output of the network.

        Args:
            sigma: Total noise, [b].

        Returns:
            [b, k], insertions first.
        """

    @abstractmethod
    def leap(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Return the factor of each kind of edit in a tau-leaping step from ``sigma`` down to ``sigma_next``.

        The factor times the exponentiated output of the network is the expected number of such edits in the step. A
        sampler that makes at most one edit per position uses it as the probability of the edit.

        Args:
            sigma: Total noise, [b].
            sigma_next: Total noise after the step, [b].

        Returns:
            [b, k], insertions first.
        """

    def clock(self, u: Tensor, end: float) -> tuple[Tensor, Tensor]:
        """Map a uniform variable ``u`` to total noise, for Monte Carlo estimates of the bound on -log p(x_0).

        By default total noise is cubic in ``u``, from :data:`LEAST` to ``end``: most samples then have low noise, where
        edits are rare and their weights in the bound are large.

        Args:
            u: Uniform numbers in (0, 1), [b].
            end: Total noise at t = 1.

        Returns:
            Total noise and its derivative in ``u``, [b] each.
        """
        return LEAST + (end - LEAST) * u**3, 3 * (end - LEAST) * u**2

    def fates(self, sigma: float, start: float = 0.0) -> Fates | None:
        """Return what noise from ``start`` to ``sigma`` does to each token; None if tokens are not noised one by one.

        Reversible noise reads it. A kernel that returns None has none, unless it defines :meth:`aligned_noise`.

        Args:
            sigma: Total noise at the end.
            start: Total noise at the start.
        """
        return None

    def aligned_noise(self, sigma: float) -> AlignedNoise | None:
        """Return how noise mixes clean strings with strings of the prior; None if it does not. Reversible noise reads it.

        Args:
            sigma: Total noise.
        """
        return None

    def distillable(self, schedule: Schedule, objective: StringObjective[Any, Any]) -> Distillable | None:
        """Return what a process of this kernel gives to distillation objectives; None, the default, if it has no pairs.

        Args:
            schedule: Total noise as a function of time.
            objective: The objective of the process.
        """
        return None

    @abstractmethod
    def prior(self, rows: int, *, longest: int, generator: torch.Generator, allowed: Tensor | None) -> Strings:
        """Draw strings of pure noise, conditioned on at most ``longest`` tokens.

        Args:
            rows: Number of strings.
            longest: Largest number of tokens of a string.
            generator: Random number generator; the result is on its device.
            allowed: bool [v], tokens that may be drawn; None: all.
        """


Kernel_ = TypeVar("Kernel_", bound=StringKernel)
"""Type variable of the kernels that an objective or a sampler supports."""
Draw_ = TypeVar("Draw_", bound=StringDraw)
"""Type variable of the noisy batches (:class:`StringDraw`) of an objective."""


def square_clock(u: Tensor) -> tuple[Tensor, Tensor]:
    """Map a uniform variable ``u`` to total noise, for Monte Carlo estimates of the bound on -log p(x_0).

    The probability that noise has hit a token, 1 - exp(-sigma), is quadratic in ``u``, from :data:`LEAST` to 1. It is
    an implementation of :meth:`StringKernel.clock` for kernels whose total noise grows to infinity, such as deletion.

    Args:
        u: Uniform numbers in (0, 1), [b].

    Returns:
        Total noise and its derivative in ``u``, [b] each.
    """
    return -torch.log1p(-(LEAST + (1 - LEAST) * u**2)), 2 * u / ((1 - u) * (1 + u))


class StringObjective(Component, ABC, Generic[Kernel_, Draw_]):
    """The training loss of strings: an upper bound on -log p(x_0), nats per string.

    The class is generic in the kernels that it supports and in its noisy batches.
    """

    abstract: ClassVar[bool] = True
    over: ClassVar[str] = "deleted"
    """Name of the noise variable :attr:`StringDraw.t` in an evaluation of the bound by noise level.

    ``deleted``: the probability that noise has deleted a token. ``noised``: the probability that noise has deleted or
    replaced it.
    """
    one_length: ClassVar[bool] = False
    """True if the bound requires that all strings have the same, known length.

    The bound then does not include the cost of coding the length.
    """

    feeds: ClassVar[tuple[Input, ...]] = FEEDS
    """Descriptions of the network inputs that the process supplies: by default the noisy tokens, their total noise, and
    the attention mask."""

    @property
    def training_excess(self) -> bool:
        """True if the mean training loss exceeds the bound, by a term that does not depend on the network.

        This is the case if each regression target is one random sample, instead of its expectation given the noisy and
        the clean string. The mean gradient is that of the bound. False by default.
        """
        return False

    @classmethod
    def toy(cls, config: ComponentConfig) -> ComponentConfig:
        """Return the Config for short strings that numerical verification uses in place of ``config``.

        By default ``config`` itself.
        """
        return config

    def lacks(self, kernel: StringKernel) -> str | None:
        """Return a description of the kind of kernel that the objective requires; None if ``kernel`` is suitable."""
        return None

    @abstractmethod
    def corrupt(
        self, batch: Batch, kernel: Kernel_, schedule: Schedule, *, random: Randomness, t: Tensor | None = None
    ) -> Draw_:
        """Draw times and noisy strings for training, and compute the regression targets.

        All random numbers of training are drawn here; :meth:`loss` is deterministic.

        Args:
            batch: Clean strings.
            kernel: The forward process.
            schedule: Total noise as a function of time.
            random: Source of random numbers.
            t: Times, [b]; None: drawn at random.
        """

    @abstractmethod
    def bound_draw(self, batch: Batch, kernel: Kernel_, schedule: Schedule, *, random: Randomness) -> Draw_:
        """Draw noise levels and noisy strings whose mean loss is the bound, without caps on weights or lengths.

        Args:
            batch: Clean strings.
            kernel: The forward process.
            schedule: Total noise as a function of time.
            random: Source of random numbers.
        """

    @abstractmethod
    def loss(self, outputs: Mapping[str, Tensor], draw: Draw_, kernel: Kernel_) -> Tensor:
        """Return the loss of each string, as pure tensor code for ``torch.compile``.

        Args:
            outputs: The network's outputs for ``draw`` by name.
            draw: The result of :meth:`corrupt` or :meth:`bound_draw`.
            kernel: The forward process.

        Returns:
            Nats, float32 [b].
        """

    def caveat(self, kernel: Kernel_) -> str | None:
        """Return the reason why the bound is not comparable with those of other processes; None if it is comparable."""
        return None

    def training_factor(self, kernel: Kernel_, schedule: Schedule, t: Tensor) -> Tensor:
        """Return the factor of the training loss at times t, relative to the bound.

        1 by default: training uses the weights of the bound. It is less at times at which a limit on the loss weights
        is active. Verification compares the training loss with the bound times this factor.

        Args:
            kernel: The forward process.
            schedule: Total noise as a function of time.
            t: Times, [b].

        Returns:
            Factors in (0, 1], [b].
        """
        return torch.ones_like(t)

    def capped(self, kernel: Kernel_, schedule: Schedule) -> float:
        """Return the fraction of training times at which :meth:`training_factor` is below 1, in [0, 1].

        Args:
            kernel: The forward process.
            schedule: Total noise as a function of time.
        """
        t = torch.linspace(1e-4, 1, 10_000, dtype=torch.float64)
        return float((self.training_factor(kernel, schedule, t) < 1 - 1e-9).double().mean())

    def rates(self, outputs: Mapping[str, Tensor], strings: Strings, longest: int) -> Mapping[str, Tensor]:
        """Convert the network's outputs to those that samplers use; by default they are unchanged.

        Args:
            outputs: The network's outputs by name.
            strings: The current strings.
            longest: Largest number of tokens of a string.
        """
        return outputs


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
