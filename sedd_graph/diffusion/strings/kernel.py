"""The interfaces of processes that change lengths: kernel, draw, objective, and the enumerable toy that proves them.

Axes: b rows, w = 1 + tokens of a noisy row (padded), n tokens of a clean row (padded), v data tokens, s strings of a toy.
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

__all__ = ["LEAST", "TOKENS", "Kernel_", "StringDraw", "StringKernel", "StringObjective", "StringTable"]

LEAST = 1e-4
"""Total noise from which on bounds are taken: what a string loses below it is about this share of a token."""
TOKENS = 2
"""Data tokens of the toys."""

LOG_INSERT = Output("log_insert", "float b l v", "log of the expected number of each token missing behind a position")
LOG_DELETE = Output("log_delete", "float b l", "log probability that the token at a position is noise")
LOG_SUBSTITUTE = Output("log_substitute", "float b l v", "log probability that the token becomes another")

FEEDS = (
    Input("tokens", "int b l", "noisy strings, the start state first"),
    Input("sigma", "float b", "total noise"),
    Input("attend", "bool b l", "positions that are not padding; give it to every attention", required=True),
)
"""Inputs of a graph that reads strings."""


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


class StringKernel(Component, ABC):
    """Noise on strings, as engine and samplers know it. What the heads say is scaled: a reverse rate is theirs times the
    kernel's own, one for each kind of edit (k: insertions, deletions, and what else a kernel knows)."""

    abstract: ClassVar[bool] = True
    extra_states: ClassVar[int] = 1
    """States beyond those of the last axis of the first output: the start."""

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

    @classmethod
    @abstractmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        """Return the outputs that a graph may have under this kernel: alternatives, of each of which it has all. The last axis
        of the first output of an alternative holds all states but the start."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the outputs that generation reads."""
        return tuple(output.name for output in self.parametrizations(self.config)[0])

    @abstractmethod
    def table(self, *, one_length: bool) -> StringTable:
        """Return the enumerable toy of this kernel, which has been made for :data:`TOKENS` data tokens. ``one_length``: clean
        strings all have the same length."""

    @abstractmethod
    def weights(self, sigma: Tensor) -> Tensor:
        """[b, k]: the rate of each kind of edit per unit of sigma, for heads that say 1."""

    @abstractmethod
    def leap(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """[b, k]: the chance of each kind of edit in a step from ``sigma`` down, for heads that say 1."""

    @abstractmethod
    def prior(self, rows: int, *, longest: int, generator: torch.Generator, allowed: Tensor | None) -> Strings:
        """Pure noise of at most ``longest`` tokens (its law given that), of the ``allowed`` bool [v] alone."""


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

    feeds: ClassVar[tuple[Input, ...]] = FEEDS
    """Inputs of the graph that the process feeds."""

    @classmethod
    def toy(cls, config: ComponentConfig) -> ComponentConfig:
        """``config`` cut down for a proof on short strings."""
        return config

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

    def capped(self, kernel: Kernel_, schedule: Schedule) -> float:
        """Return the share of training times whose weight is capped below that of the bound."""
        return 0.0

    def rates(self, outputs: Mapping[str, Tensor], strings: Strings, longest: int) -> Mapping[str, Tensor]:
        """What a sampler of strings of ``longest`` tokens is to take the outputs for."""
        return outputs


class StringTable(ABC):
    """An enumerable toy of a string kernel: all strings of at most ``longest`` of ``symbols`` states by number, a law of clean
    ones (of at most ``clean`` tokens), and the outputs of a perfect network."""

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
        return float(-torch.xlogy(self.law, self.law).sum())

    def rows(self, index: Tensor) -> Strings:
        """Strings by their number, padded to the longest there is."""
        table = torch.full((len(self.strings), self.longest + 1), self.kernel.start)
        for i, s in enumerate(self.strings):
            table[i, 1 : len(s) + 1] = torch.tensor(s, dtype=torch.int64)
        lengths = torch.tensor([len(s) for s in self.strings])[index]
        return Strings(table[index], torch.arange(self.longest + 1) <= lengths[:, None])

    def batch(self, index: Tensor) -> Batch:
        """Clean strings by their number."""
        strings = self.rows(index)
        tokens, real = strings.tokens[:, 1 : self.clean + 1], strings.attend[:, 1 : self.clean + 1]
        return Batch(torch.where(real, tokens, 0), real, real, real)

    def number(self, strings: Strings) -> Tensor:
        """The number of each string, int64 [b]; one past the last where it is too long."""
        lengths = strings.lengths
        value = torch.zeros_like(lengths)
        for column in range(1, strings.tokens.shape[1]):
            value = torch.where(strings.attend[:, column], value * self.symbols + strings.tokens[:, column], value)
        found = (self.symbols**lengths - 1) // (self.symbols - 1) + value
        return torch.where(lengths <= self.longest, found, len(self.strings))

    @abstractmethod
    def outputs(self, strings: Strings, sigma: Tensor) -> dict[str, Tensor]:
        """Return the outputs of a perfect network for ``strings`` at total noise ``sigma`` [b], float32."""

    def check_kernel(self, end: float) -> list[Check]:
        """Verify the kernel's closed forms, draws and prior against the enumeration; ``end`` is the total noise at t = 1."""
        return []

    def check_declared(self, declared: StringKernel, end: float) -> list[Check]:
        """Verify what depends on the size of the ``declared`` kernel, of which this is the toy's."""
        return []

    def check_objective(self, objective: StringObjective[Any, Any], schedule: Schedule) -> list[Check]:
        """Verify that with a perfect network the bound is the entropy of the data."""
        rows = 60_000
        chosen, nats = self.perfect(objective, schedule, rows)
        # of strings of one known length, the objective is told the length
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
        """Draw ``rows`` clean strings and noise for the bound: their numbers int64 [rows], and the nats of a perfect network."""
        generator = torch.Generator().manual_seed(3)
        chosen = torch.multinomial(self.law, rows, replacement=True, generator=generator)
        draw = objective.bound_draw(self.batch(chosen), self.kernel, schedule, random=Randomness(generator))
        outputs = self.outputs(Strings(draw.xt, draw.attend), draw.sigma)
        return chosen, objective.loss(outputs, draw, self.kernel).double()
