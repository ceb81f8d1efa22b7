"""The interfaces of the noise process: kernel, schedule, objective. Implementations come in as components.

The fourth, the sampler, has a module of its own (:mod:`sedd_graph.diffusion.sampler`).

Axes: b batch, l length, n states. ``sigma`` is total noise and ``dsigma`` its derivative in t; t = 0 is clean, t = 1 is
noise. Columns of a rate matrix sum to zero: ``Q[z, y]`` is the rate from y to z.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from sedd_graph.component import Component
from sedd_graph.diffusion.roles import Batch, Draw, Randomness

__all__ = ["Kernel", "Objective", "Schedule"]


class Schedule(Component, ABC):
    """How noise grows with time."""

    abstract: ClassVar[bool] = True

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Total noise, float32 [b], increasing in t."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """Its derivative in t, float32 [b]."""

    def time(self, sigma: Tensor) -> Tensor:
        """The time in [0, 1] at which total noise is ``sigma`` [b], by bisection; the nearer end where there is none."""
        low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
        for _ in range(52 if sigma.dtype == torch.float64 else 30):
            middle = (low + high) / 2
            above = self.sigma(middle) > sigma
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2


class Kernel(Component, ABC):
    """How one token moves. ``states`` counts the mask where there is one; ``mask`` is its index, else None."""

    abstract: ClassVar[bool] = True
    clamp_safe: ClassVar[bool] = False
    """Whether holding observed tokens fixed while sampling is exact (math: only where they could never move)."""

    @property
    def states(self) -> int:
        return self.axis("n")

    @property
    @abstractmethod
    def mask(self) -> int | None:
        """Index of the mask state."""

    @property
    def data_tokens(self) -> int:
        """How many states are data."""
        return self.states - (self.mask is not None)

    @abstractmethod
    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        """x_t given x_0 [b, l] at total noise ``sigma`` [b]; only ``corrupt`` positions move."""

    @abstractmethod
    def prior(self, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        """Rows of pure noise, int64 [rows, length]; ``allowed`` bool [n] bounds the data tokens in it."""

    @abstractmethod
    def rate_matrix(self) -> Tensor:
        """Q, float64 [n, n], for proofs on small vocabularies."""

    @abstractmethod
    def transition_matrix(self, sigma: float) -> Tensor:
        """exp(sigma Q) in closed form, float64 [n, n]: ``P[z, y]`` is the chance to be at z from y."""

    @abstractmethod
    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """Score entropy per position in nats, without the factor dsigma, float32 [b, l] (SEDD, arXiv 2310.16834, eq. 9)."""

    @abstractmethod
    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """The same bound's integrand for a head that predicts the clean token, without dsigma, float32 [b, l]."""

    @abstractmethod
    def log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        """The log score that a prediction of the clean token stands for, exactly, float32 [b, l, n]."""

    @abstractmethod
    def reverse_rate(self, score: Tensor, x: Tensor) -> Tensor:
        """Rates of the reverse process out of x per unit of sigma, 0 at x itself, [b, l, n]."""

    @abstractmethod
    def analytic(self, score: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """Tweedie step by ``step`` [b] of total noise: probabilities [b, l, n], not clamped (SEDD, Theorem 4.2)."""

    @abstractmethod
    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Ancestral step from total noise ``sigma`` down to ``sigma_next`` [b]: probabilities [b, l, n]."""


class Objective(Component, ABC):
    """What training minimises: a bound on -log p(x_0) in nats per sequence."""

    abstract: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()
    """Names of model outputs that it can take, the preferred one first."""
    needs_mask: ClassVar[bool] = False
    """Whether it works only with a kernel that has a mask."""

    @abstractmethod
    def corrupt(
        self,
        batch: Batch,
        kernel: Kernel,
        schedule: Schedule,
        *,
        random: Randomness,
        t: Tensor | None = None,
        xt: Tensor | None = None,
    ) -> Draw:
        """Draw times and corrupted rows; ``t`` and ``xt``, where given, are taken instead. All randomness is here."""

    @abstractmethod
    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        """Nats per sequence, float32 [b]: its mean over draws is the bound. Pure tensor code that compiles."""

    def bound_draw(
        self, batch: Batch, kernel: Kernel, schedule: Schedule, *, random: Randomness
    ) -> tuple[Objective, Draw]:
        """The draw (and the loss to hold it to) for evaluation: the objective itself, or a form of less variance."""
        return self, self.corrupt(batch, kernel, schedule, random=random)
