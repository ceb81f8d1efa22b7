"""Interfaces of processes that change the length of strings: the kernel and its noisy batches.

A kernel has k kinds of edits: insertions first, then deletions, then others such as substitutions. Axes: b rows, w
positions of a noisy string (the BOS token first, padded), n tokens of a clean string (padded), v data tokens. Position 0
is the BOS token; gap j is the place for insertions behind position j.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.outputs import Input, Output
from sedd_graph.diffusion.batch import part_of
from sedd_graph.diffusion.distillation import Distillable
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.aligned_noise import AlignedNoise
from sedd_graph.diffusion.strings.fates import Fates
from sedd_graph.diffusion.strings.strings import Strings

if TYPE_CHECKING:
    from sedd_graph.diffusion.strings.objective import StringObjective
    from sedd_graph.diffusion.strings.table import StringTable

__all__ = ["LEAST", "TOKENS", "Kernel_", "StringDraw", "StringKernel", "square_clock"]

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
