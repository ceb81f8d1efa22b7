"""Interface of the training losses of strings: upper bounds on -log p(x_0).

Axes are those of :mod:`sedd_graph.diffusion.strings.kernel`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Generic

import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.outputs import Input
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.kernel import FEEDS, Draw_, Kernel_, StringKernel
from sedd_graph.diffusion.strings.strings import Strings

__all__ = ["StringObjective"]


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
