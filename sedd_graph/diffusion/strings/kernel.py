"""The interfaces of processes that change lengths: kernel, draw, objective, and the enumerable toy for their proofs.

A kernel has k kinds of edits: insertions first, then deletions, and others such as substitutions. Axes: b rows, w positions of
a noisy string (the start state first, padded), n tokens of a clean string (padded), v data tokens, s strings of a toy.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.check import Check
from sedd_graph.component.outputs import Input, Output
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.strings import Strings

__all__ = ["LEAST", "TOKENS", "Kernel_", "StringDraw", "StringKernel", "StringObjective", "StringTable", "square_clock"]

LEAST = 1e-4
"""Lower limit of total noise in bounds. Noise below it changes about this share of the tokens, and is neglected."""
TOKENS = 2
"""Number of data tokens of the toys."""

LOG_INSERT = Output(
    "log_insert", "float b l v", "log of the expected number of times that each token is missing behind a position"
)
LOG_DELETE = Output("log_delete", "float b l", "log probability that the token at a position is noise")
LOG_SUBSTITUTE = Output("log_substitute", "float b l v", "log probability that the token becomes another")

FEEDS = (
    Input("tokens", "int b l", "noisy strings, the start state first"),
    Input("sigma", "float b", "total noise"),
    Input("attend", "bool b l", "positions that are not padding; give it to every attention", required=True),
)
"""Inputs of a graph that processes strings."""


@dataclasses.dataclass(frozen=True)
class StringDraw:
    """One draw of the forward process for a batch. Objectives extend it by everything in their loss that is independent of the
    network, such as regression targets.

    Attributes:
        xt: int64 [b, w], the noisy strings.
        attend: bool [b, w], the start state and the tokens; False at padding.
        sigma: float32 [b], total noise.
        cut: Number of tokens that did not fit in w positions and were dropped.
    """

    xt: Tensor
    attend: Tensor
    sigma: Tensor
    cut: int = dataclasses.field(default=0, kw_only=True)

    @property
    def t(self) -> Tensor:
        """The probability that a token has been hit by noise, float32 [b]."""
        return -torch.expm1(-self.sigma)


class StringKernel(Component, ABC):
    """The forward process of a string, and its reverse rates up to the network's outputs.

    The reverse rate of an edit is the network's output (exponentiated) times a factor of the kernel, one for each kind of edit, so
    that the outputs are of order one at every noise level.
    """

    abstract: ClassVar[bool] = True
    extra_states: ClassVar[int] = 1
    """Number of states that the last axis of the first output lacks: the start state."""

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        """Return ``config`` reduced to ``states`` states, for a proof."""
        return config

    @property
    def states(self) -> int:
        """Number of states n, the start state included."""
        return self.axis("n")

    @property
    def data_tokens(self) -> int:
        """Number of states that are tokens of the data."""
        return self.states - 1

    @property
    def start(self) -> int:
        """Index of the start state, with which every row begins and is padded."""
        return self.states - 1

    @property
    def supports_prompts(self) -> bool:
        """True if :attr:`Batch.corrupt` is respected, so that a model can be trained with clean prompts."""
        return False

    def refuses_prompts(self) -> str | None:
        """Return why given text cannot be held fixed in generation, in words; None if it can."""
        return None

    @classmethod
    @abstractmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        """Return the alternative sets of outputs that a graph may have under this kernel.

        The last axis of the first output of each set has all states but the start state.
        """

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the outputs that samplers read."""
        return tuple(output.name for output in self.parametrizations(self.config)[0])

    @abstractmethod
    def table(self, *, one_length: bool) -> StringTable:
        """Return the enumerable toy of this kernel, which is made for :data:`TOKENS` data tokens.

        ``one_length``: all clean strings have the same length.
        """

    @abstractmethod
    def weights(self, sigma: Tensor) -> Tensor:
        """Return the factor of each kind of edit in the reverse rates, per unit of ``sigma`` [b], [b, k]."""

    @abstractmethod
    def leap(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Return the factor of each kind of edit in the probabilities of a step from ``sigma`` down to ``sigma_next`` [b], [b, k]."""

    def clock(self, u: Tensor, end: float) -> tuple[Tensor, Tensor]:
        """Return total noise at ``u`` [b] in (0, 1), and its derivative in ``u``, for draws of the bound.

        By default noise grows with the cube of ``u``, from :data:`LEAST` to ``end``, the total noise at t = 1: most draws have
        little noise, where edits are rare and have large weights.
        """
        return LEAST + (end - LEAST) * u**3, 3 * (end - LEAST) * u**2

    @abstractmethod
    def prior(self, rows: int, *, longest: int, generator: torch.Generator, allowed: Tensor | None) -> Strings:
        """Draw pure noise, conditioned on at most ``longest`` tokens, of the tokens ``allowed`` bool [v] (None: all)."""


Kernel_ = TypeVar("Kernel_", bound=StringKernel)
"""Type of the kernels that an objective or a sampler supports."""
Draw_ = TypeVar("Draw_", bound=StringDraw)
"""Type of the draws of an objective."""


def square_clock(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return total noise at ``u`` [b] in (0, 1), and its derivative, with 1 - exp(-noise) quadratic from :data:`LEAST` to 1.

    The clock of bounds (:meth:`StringKernel.clock`) for kernels under which the share of tokens that are hit is 1 - exp(-noise).
    """
    return -torch.log1p(-(LEAST + (1 - LEAST) * u**2)), 2 * u / ((1 - u) * (1 + u))


class StringObjective(Component, ABC, Generic[Kernel_, Draw_]):
    """The training loss of strings: a bound on -log p(x_0), nats per string. Generic in its kernels and its draws."""

    abstract: ClassVar[bool] = True
    over: ClassVar[str] = "deleted"
    """Meaning of ``t`` in a draw: the probability that a token has been deleted, or otherwise hit by noise."""
    one_length: ClassVar[bool] = False
    """True if the bound holds only if all strings have the same length, and counts it as known."""

    feeds: ClassVar[tuple[Input, ...]] = FEEDS
    """Inputs of the graph that the process provides."""

    @classmethod
    def toy(cls, config: ComponentConfig) -> ComponentConfig:
        """Return ``config`` reduced for a proof on short strings."""
        return config

    def lacks(self, kernel: StringKernel) -> str | None:
        """Return the kind of kernel that the objective needs, in words; None if ``kernel`` is suitable."""
        return None

    @abstractmethod
    def corrupt(
        self, batch: Batch, kernel: Kernel_, schedule: Schedule, *, random: Randomness, t: Tensor | None = None
    ) -> Draw_:
        """Draw times and noisy strings for training, and compute the regression targets. All randomness of training is here.

        ``t`` [b] are times to use instead of random ones.
        """

    @abstractmethod
    def bound_draw(self, batch: Batch, kernel: Kernel_, schedule: Schedule, *, random: Randomness) -> Draw_:
        """Draw times and noisy strings whose mean loss is the bound, without caps on weights or lengths."""

    @abstractmethod
    def loss(self, outputs: Mapping[str, Tensor], draw: Draw_, kernel: Kernel_) -> Tensor:
        """Return the loss of each string, nats, float32 [b]. Pure tensor code that compiles."""

    def caveat(self, kernel: Kernel_) -> str | None:
        """Return why the bound is not comparable with those of other processes, in words; None if it is."""
        return None

    def capped(self, kernel: Kernel_, schedule: Schedule) -> float:
        """Return the share of the time interval in which training caps the weights of the bound."""
        return 0.0

    def rates(self, outputs: Mapping[str, Tensor], strings: Strings, longest: int) -> Mapping[str, Tensor]:
        """Return the outputs that a sampler of strings of at most ``longest`` tokens gets; by default the network's, unchanged."""
        return outputs


class StringTable(ABC):
    """The enumerable toy of a string kernel: all short strings, a distribution of clean ones, and a perfect network.

    Attributes:
        strings: All strings of at most ``longest`` of ``symbols`` states; they are referred to by index.
        law: float64 [s], the probabilities of clean strings, which have at most ``clean`` tokens.

    Args:
        kernel: The kernel, made for the toy.
        longest: Tokens of the longest string.
        clean: Tokens of the longest clean string.
        one_length: All clean strings have ``clean`` tokens.
        symbols: Number of states in strings; those from :data:`TOKENS` on, such as a mask, are absent from clean strings.
    """

    def __init__(
        self, kernel: StringKernel, *, longest: int, clean: int, one_length: bool = False, symbols: int = TOKENS
    ) -> None:
        self.kernel, self.longest, self.clean, self.symbols = kernel, longest, clean, symbols
        self.strings = [s for n in range(longest + 1) for s in itertools.product(range(symbols), repeat=n)]
        weights = torch.rand(len(self.strings), generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.2
        lengths = torch.tensor([len(s) for s in self.strings])
        weights *= (lengths == clean) if one_length else (lengths <= clean)
        weights *= torch.tensor([max(s, default=0) < TOKENS for s in self.strings])
        self.law = weights / weights.sum()

    @property
    def entropy(self) -> float:
        """Entropy of the clean strings, nats."""
        return float(-torch.xlogy(self.law, self.law).sum())

    def rows(self, index: Tensor) -> Strings:
        """Return the strings with the numbers ``index`` int64 [b], padded to ``longest`` tokens."""
        table = torch.full((len(self.strings), self.longest + 1), self.kernel.start)
        for i, s in enumerate(self.strings):
            table[i, 1 : len(s) + 1] = torch.tensor(s, dtype=torch.int64)
        lengths = torch.tensor([len(s) for s in self.strings])[index]
        return Strings(table[index], torch.arange(self.longest + 1) <= lengths[:, None])

    def batch(self, index: Tensor) -> Batch:
        """Return the clean strings with the numbers ``index`` int64 [b] as a batch."""
        strings = self.rows(index)
        tokens, real = strings.tokens[:, 1 : self.clean + 1], strings.attend[:, 1 : self.clean + 1]
        return Batch(torch.where(real, tokens, 0), real, real, real)

    def number(self, strings: Strings) -> Tensor:
        """Return the index of each string in :attr:`strings`, int64 [b]; s, their number, for a string that is too long."""
        lengths = strings.lengths
        value = torch.zeros_like(lengths)
        for column in range(1, strings.tokens.shape[1]):
            value = torch.where(strings.attend[:, column], value * self.symbols + strings.tokens[:, column], value)
        found = (self.symbols**lengths - 1) // (self.symbols - 1) + value
        return torch.where(lengths <= self.longest, found, len(self.strings))

    @abstractmethod
    def outputs(self, strings: Strings, sigma: Tensor) -> dict[str, Tensor]:
        """Return the outputs of a perfect network by name, float32, for ``strings`` at total noise ``sigma`` [b]."""

    def check_kernel(self, end: float) -> list[Check]:
        """Verify the kernel's closed forms, draws and prior against the enumeration; ``end`` is the total noise at t = 1."""
        return []

    def check_declared(self, declared: StringKernel, end: float) -> list[Check]:
        """Verify properties of the ``declared`` kernel that depend on its number of tokens, which the toy reduces."""
        return []

    def check_objective(self, objective: StringObjective[Any, Any], schedule: Schedule) -> list[Check]:
        """Verify that with a perfect network the bound is the entropy of the data."""
        rows = 60_000
        chosen, nats = self.perfect(objective, schedule, rows)
        # if all strings have one length, the bound counts it as known, and so does the law
        gap = nats + self.law[chosen].log()
        mean, error = float(gap.mean()), float(gap.std() / math.sqrt(rows))
        return [
            Check(
                "objective.tight",
                "with a perfect network the bound is the entropy of the data",
                abs(mean) < 5 * error + 0.01 * self.entropy,
                f"{self.entropy + mean:.4f} +- {error:.4f} against {self.entropy:.4f} nats",
                f"{rows:,} draws on {int((self.law > 0).sum())} strings",
            )
        ]

    def perfect(self, objective: StringObjective[Any, Any], schedule: Schedule, rows: int) -> tuple[Tensor, Tensor]:
        """Return the numbers int64 [rows] of ``rows`` random clean strings, and a perfect network's loss of each, nats, float64 [rows]."""
        generator = torch.Generator().manual_seed(3)
        chosen = torch.multinomial(self.law, rows, replacement=True, generator=generator)
        draw = objective.bound_draw(self.batch(chosen), self.kernel, schedule, random=Randomness(generator))
        outputs = self.outputs(Strings(draw.xt, draw.attend), draw.sigma)
        return chosen, objective.loss(outputs, draw, self.kernel).double()
