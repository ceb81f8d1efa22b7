"""The interface of objectives of vectors: training losses and bounds on -log p. Implementations are components.

Axes: b batch, l length, d width of a vector.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.outputs import Input
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.vectors.denoiser import FEEDS, Denoiser
from sedd_graph.diffusion.vectors.flow import Flow
from sedd_graph.diffusion.vectors.kernel import VectorKernel

__all__ = ["Decoding", "VectorDraw", "VectorObjective", "counted"]


@dataclasses.dataclass(frozen=True)
class VectorDraw:
    """Random numbers of one training step. Vectors are computed in the loss, since the embeddings are trained.

    Attributes:
        t: Times, float64 [b].
        start: Standard normal noise of x_0 around the embeddings, float32 [b, l, d].
        noise: Standard normal noise of x_t given x_0, float32 [b, l, d].
        weight: Importance weight of the draw in an estimate of the bound, float32 [b]; the number of steps for a sum
            over the steps of a process in discrete time.
        refined: Rows whose network is conditioned on a first estimate, bool [b].
    """

    t: Tensor
    start: Tensor
    noise: Tensor
    weight: Tensor
    refined: Tensor


class Decoding(NamedTuple):
    """Noise levels at which a network is trained to read tokens from the vectors of a contextual kernel.

    Attributes:
        share: Share of the training rows that train decoding; the others train the estimate of the clean vectors.
        mean: Mean of the log signal-to-noise ratio of a position, which is normal and independent over positions.
        std: Standard deviation of the log signal-to-noise ratio.
    """

    share: float
    mean: float
    std: float


class VectorObjective(Component, ABC):
    """The training loss of a process on vectors, and the bound on -log p of the tokens that evaluation reports."""

    abstract: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()
    """Names of the network outputs that the loss accepts: ``x0``, ``logits`` or both."""
    feeds: ClassVar[tuple[Input, ...]] = FEEDS
    """Inputs of the graph."""
    over: ClassVar[str] = "time"
    """Meaning of :attr:`VectorDraw.t`."""

    measure: ClassVar[Literal["steps", "time"]] = "time"
    """Form of :meth:`bound`: ``steps``, the sum of KL divergences over the steps of a process in discrete time, with the
    posterior given the tokens; ``time``, any other, which at a perfect network equals the entropy of the data."""
    unit: ClassVar[str] = "nats"
    """Unit of the training loss, as it is printed: ``nats``, or a phrase for a loss that is not in nats. Bounds are in nats."""
    terms: ClassVar[frozenset[str]] = frozenset()
    """Terms of the training loss of a position, whose sum numerical verification compares with closed forms.

    ``mse``: mean over the width of |target - estimate|^2, the target being x_0, or what :meth:`optimal` predicts; ``last``: mean
    over the width of |sqrt(alpha_bar_1) x_0|^2; ``rounding``: -log p(token | x_0); ``cross_entropy``: -log of the softmax of the
    network's logits at the token. Empty: the value is not verified.
    """

    @classmethod
    def toy(cls, config: ComponentConfig) -> ComponentConfig:
        """Return the Config that numerical verification uses in place of ``config``, by default ``config`` itself."""
        return config

    def lacks(self, kernel: VectorKernel, schedule: Schedule) -> str | None:
        """Return a description of the kernel or schedule that the objective requires; None if these are suitable."""
        return None

    @property
    def decoding(self) -> Decoding | None:
        """How the network is trained to read tokens from vectors; None: it is not, and no contextual kernel fits."""
        return None

    def emphasis(self, log_snr: Tensor) -> Tensor:
        """Return the weight of the squared error at log signal-to-noise ratios ``log_snr``, of the same shape; 1 by default."""
        return torch.ones_like(log_snr)

    def caveat(self) -> str | None:
        """Return why the reported bound is not comparable with others; None if it is an upper bound on -log p."""
        return None

    def optimal(self, start: Tensor, clean: Tensor, t: Tensor, kernel: VectorKernel) -> Tensor:
        """Return the estimate of the clean vectors at which the expected loss is least, [b, l, d].

        Args:
            start: E[x_0 | x_t], [b, l, d].
            clean: E[embedding | x_t], [b, l, d].
            t: Times, float64 [b].
            kernel: The kernel.
        """
        return start

    @abstractmethod
    def draw(
        self, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness, t: Tensor | None = None
    ) -> VectorDraw:
        """Draw times and noise. All random numbers of :meth:`loss` are drawn here.

        Args:
            batch: Clean rows.
            kernel: The kernel.
            schedule: Total noise as a function of time.
            random: Source of all random numbers.
            t: Times, [b]; None: drawn at random.
        """

    @abstractmethod
    def loss(
        self, denoise: Denoiser, draw: VectorDraw, batch: Batch, kernel: VectorKernel, schedule: Schedule
    ) -> Tensor:
        """Return the training loss of each row, summed over its positions, in :attr:`unit`, float32 [b].

        Args:
            denoise: The network.
            draw: The result of :meth:`draw`.
            batch: Clean rows.
            kernel: The kernel.
            schedule: Total noise as a function of time.
        """

    @abstractmethod
    def bound(
        self, denoise: Denoiser, draw: VectorDraw, batch: Batch, kernel: VectorKernel, schedule: Schedule
    ) -> Tensor:
        """Return an unbiased estimate of the bound on -log p of each row without :meth:`reconstruction`, nats, [b].

        Arguments as for :meth:`loss`.
        """

    def bound_draw(self, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness) -> VectorDraw:
        """Draw times and noise for :meth:`bound`; by default as for training."""
        return self.draw(batch, kernel, schedule, random=random)

    def reconstruction(
        self, denoise: Denoiser, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness
    ) -> Tensor | None:
        """Return an estimate of the rounding term E[-log p(tokens | x)] of each row, nats, [b], x having the least noise.

        None if :meth:`bound` includes it.

        Args:
            denoise: The network.
            batch: Clean rows.
            kernel: The kernel.
            schedule: Total noise as a function of time.
            random: Source of all random numbers.
        """
        return None

    def flow(self, kernel: VectorKernel, schedule: Schedule) -> Flow | None:
        """Return the probability-flow ODE whose likelihood ``eval --likelihood ode`` reports; None if there is none.

        Args:
            kernel: The kernel.
            schedule: Total noise as a function of time.
        """
        return None

    def recovered(
        self, denoise: Denoiser, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness
    ) -> Tensor:
        """Return the number of tokens of each row that the network recovers at the lowest noise, [b].

        x_t is drawn at the first step (in continuous time, at the time 1e-5), and the network's estimate is rounded.

        Args:
            denoise: The network.
            batch: Clean rows.
            kernel: The kernel.
            schedule: Total noise as a function of time.
            random: Source of all random numbers.
        """
        first = torch.full((len(batch),), 1 / (kernel.steps or 1e5), dtype=torch.float64, device=batch.tokens.device)
        draw = self.draw(batch, kernel, schedule, random=random, t=first)
        found = denoise.refined(self.vectors(draw, batch, kernel, schedule)[2], draw.t)
        rounded = denoise.round(found.x0) if found.logits is None else found.logits.argmax(-1)
        return counted((rounded == batch.tokens).float(), batch)

    # -- helpers ------------------------------------------------------------------------------------------------------

    @staticmethod
    def vectors(
        draw: VectorDraw, batch: Batch, kernel: VectorKernel, schedule: Schedule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings, clean vectors x_0 and noisy vectors x_t, each float32 [b, l, d].

        At positions that are not corrupted (prompts and padding), x_0 and x_t are the embeddings.
        """
        clean = kernel.embed(batch.tokens, batch.attend, batch.attend & ~batch.corrupt)
        x0 = kernel.start(batch.tokens, schedule, draw.start)
        xt = kernel.noised(x0, kernel.sigma(schedule, draw.t), draw.noise)
        kept = ~batch.corrupt[..., None]
        return clean, torch.where(kept, clean, x0), torch.where(kept, clean, xt)


def counted(values: Tensor, batch: Batch) -> Tensor:
    """Return the sum over the positions that count (``loss & corrupt``) of ``values`` [b, l], [b]."""
    return torch.where(batch.loss & batch.corrupt, values, 0.0).sum(-1)
