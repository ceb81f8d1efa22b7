"""The interface of kernels, the noise of single tokens. Implementations are components.

Axes: b batch, l length, n states. ``sigma`` is total noise and ``dsigma`` its derivative in t; t = 0 is clean, t = 1 is
noise. Columns of a rate matrix sum to zero: ``Q[z, y]`` is the rate from y to z.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.outputs import LOG_SCORE, LOG_X0, Output
from sedd_graph.diffusion.batch import Randomness

__all__ = ["ONLY_MASKS", "Kernel"]


ONLY_MASKS = "a kernel that only masks, all tokens at one rate"


class Kernel(Component, ABC):
    """How one token moves. ``states`` counts the mask where there is one; ``mask`` is its index, else None.

    Noise is measured by its total ``sigma``; a kernel may change its ways as it grows. A prediction of the clean token
    (``log_x0``) is, for every kernel, its posterior given all *other* positions, which under a mask is all there is to know.
    """

    abstract: ClassVar[bool] = True
    example: ClassVar[Mapping[str, Any]] = {}
    """A Config for tables and tests, where some keys have no default."""
    clamp_safe: ClassVar[bool] = False
    """Whether a data token that is seen is a clean one, so that holding observed tokens fixed while sampling is exact."""
    learned: ClassVar[bool] = False
    """Whether it has parameters, which are trained and kept with the network's."""
    masks_evenly: ClassVar[bool] = False
    """Whether all that ever happens is that tokens are masked, all at one rate: what forms that count masks ask for."""

    extra_states: ClassVar[int] = 0
    """States beyond those of the last axis of the output."""

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        """Return the outputs that a graph may have under this kernel: alternatives, of each of which it has all."""
        return ((LOG_SCORE,), (LOG_X0,))

    def translate(self, outputs: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Mapping[str, Tensor]:
        """Turn outputs of the kernel's own into ``log_score`` or ``log_x0``, float32 [b, l, n], at rows ``x`` int64 [b, l] and
        total noise ``sigma`` [b]. A kernel that declares no other :meth:`parametrizations` leaves it."""
        return outputs

    def express(self, outputs: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Mapping[str, Tensor]:
        """Invert :meth:`translate`: the kernel's own outputs that stand for standard ones. Proofs use it to state a perfect
        network."""
        return outputs

    @property
    def rate_bound(self) -> float | None:
        """An upper bound on the reverse rate of leaving any state, per position, on the clock log(exp(sigma) - 1), for the
        scores of any distribution; None where no bound is known."""
        return None

    @property
    def carries_over(self) -> bool:
        """Whether a seen token is a clean one and stays, and all others are masked (carry-over unmasking)."""
        return self.clamp_safe and self.mask is not None

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        """``config`` cut down to ``states`` states, for a proof: what a Config says of single tokens, for a few of them."""
        return config

    def unmixed(self, sigma: float) -> float | None:
        """How far noise at total noise ``sigma`` is from the prior, total variation from the worst token looked at.

        None where a toy of the kernel tells as much.
        """
        return None

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
    def rate_matrix(self, sigma: float) -> Tensor:
        """Q at total noise ``sigma`` > 0, per unit of it, float64 [n, n], for proofs on small vocabularies."""

    @abstractmethod
    def transition_matrix(self, sigma: float | Tensor, start: float = 0.0) -> Tensor:
        """float64 [n, n]: ``P[z, y]`` is the chance to be at z at noise ``sigma``, having been at y at ``start``.

        In closed form; it solves dP/dsigma = Q(sigma) P. For ``sigma`` float64 [b] it is [b, n, n].
        """

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
    def reverse_rate(self, score: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Rates of the reverse process out of x per unit of ``sigma`` [b], 0 at x itself, [b, l, n]."""

    @abstractmethod
    def analytic(self, score: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Tweedie step from ``sigma`` down to ``sigma_next`` [b]: probabilities [b, l, n], not clamped (SEDD, Theorem 4.2)."""

    @abstractmethod
    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Ancestral step from total noise ``sigma`` down to ``sigma_next`` [b]: probabilities [b, l, n]."""
