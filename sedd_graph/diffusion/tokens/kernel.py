"""The interface of kernels: noise that changes each token independently. Implementations are components.

Axes: b batch, l length, n states. ``sigma`` is total noise, 0 for clean text. Columns of a rate matrix sum to zero:
``Q[z, y]`` is the rate from y to z.
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
from sedd_graph.errors import UserError

__all__ = ["ONLY_MASKS", "Kernel"]


ONLY_MASKS = "a kernel that only masks, all tokens at one rate"
"""Completes the message of a component that needs :attr:`Kernel.masks_evenly`."""


class Kernel(Component, ABC):
    """The forward process of one token: a Markov chain over n states, in total noise instead of time.

    Rates may depend on ``sigma``. A prediction of the clean token (``log_x0``) is, for every kernel, its posterior given all
    *other* positions. A mask carries no information on its token, so under a mask this is the posterior given the whole row.
    """

    abstract: ClassVar[bool] = True
    example: ClassVar[Mapping[str, Any]] = {}
    """Values of the Config keys without default, for tests and generated tables."""
    clamp_safe: ClassVar[bool] = False
    """True if a visible data token is always the clean one. Sampling with given tokens held fixed is then exact."""
    learned: ClassVar[bool] = False
    """True if the kernel has parameters, which are trained and saved with the network's."""
    masks_evenly: ClassVar[bool] = False
    """True if the only transition is from a token to the mask, at the same rate for every token. Objectives and samplers that
    count masks require it."""
    extra_states: ClassVar[int] = 0
    """Number of states that the last axis of the graph's output lacks."""

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        """Return the alternative sets of outputs that a graph may have under this kernel."""
        return ((LOG_SCORE,), (LOG_X0,))

    def translate(self, outputs: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Mapping[str, Tensor]:
        """Convert the kernel's own outputs to ``log_score`` or ``log_x0``, float32 [b, l, n].

        Override it together with :meth:`parametrizations`.

        Args:
            outputs: The graph's outputs by name.
            x: Noisy rows, int64 [b, l].
            sigma: Total noise, [b].
        """
        return outputs

    def express(self, outputs: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Mapping[str, Tensor]:
        """Invert :meth:`translate`. Proofs use it to express a perfect network in the kernel's own outputs."""
        return outputs

    @property
    def rate_bound(self) -> float | None:
        """Upper bound on the reverse rate of leaving any state, per position, for the scores of any distribution.

        Rates are per unit of the clock log(exp(sigma) - 1). None if no bound is known.
        """
        return None

    @property
    def carries_over(self) -> bool:
        """True if every token is either clean or masked, and clean tokens stay (carry-over unmasking, MDLM)."""
        return self.clamp_safe and self.mask is not None

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        """Return ``config`` reduced to ``states`` states, for a proof: Config values per token are reduced to a few tokens."""
        return config

    def unmixed(self, sigma: float) -> float | None:
        """Return the largest total variation between the distribution at total noise ``sigma`` and the prior over clean tokens.

        None if the kernel's toy gives the same number. Large vocabularies may be evaluated on some of their tokens.
        """
        return None

    @property
    def states(self) -> int:
        """Number of states n, the mask included."""
        return self.axis("n")

    @property
    @abstractmethod
    def mask(self) -> int | None:
        """Index of the mask state; None for a kernel without mask."""

    def require_mask(self) -> int:
        """Return the index of the mask state. Raises :class:`UserError` for a kernel without mask."""
        if self.mask is None:
            raise UserError(f"{type(self).__name__} has no mask state; take a kernel with one, such as absorb")
        return self.mask

    @property
    def data_tokens(self) -> int:
        """Number of states that are tokens of the data."""
        return self.states - (self.mask is not None)

    @abstractmethod
    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        """Draw x_t given x_0.

        Args:
            x0: Clean tokens, int64 [b, l].
            sigma: Total noise, [b].
            random: Source of uniform numbers.
            corrupt: bool [b, l], positions that noise may change.

        Returns:
            int64 [b, l].
        """

    @abstractmethod
    def prior(self, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        """Draw rows of pure noise, int64 [rows, length]; data tokens in them are among ``allowed`` bool [n] (None: all)."""

    @abstractmethod
    def rate_matrix(self, sigma: float) -> Tensor:
        """Return the rate matrix Q per unit of total noise, at total noise ``sigma`` > 0, float64 [n, n]; for proofs on small vocabularies."""

    @abstractmethod
    def transition_matrix(self, sigma: float | Tensor, start: float = 0.0) -> Tensor:
        """Return transition probabilities from noise ``start`` to ``sigma`` in closed form, the solution of dP/dsigma = Q(sigma) P.

        Returns:
            float64 [n, n], ``P[z, y]`` from y to z; [b, n, n] for ``sigma`` float64 [b].
        """

    @abstractmethod
    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """Return the score entropy of each position without the factor dsigma (SEDD, arXiv 2310.16834, eq. 9).

        Args:
            log_score: float32 [b, l, n].
            xt: Noisy rows, int64 [b, l].
            x0: Clean rows, int64 [b, l].
            sigma: Total noise, [b].

        Returns:
            Nats, float32 [b, l].
        """

    @abstractmethod
    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """Return the integrand of the same bound for a prediction ``log_x0`` [b, l, n] of the clean token, without dsigma.

        Other arguments and result as for :meth:`score_entropy`.
        """

    @abstractmethod
    def log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        """Return the log-score, float32 [b, l, n], that a prediction of the clean token implies. Exact."""

    @abstractmethod
    def reverse_rate(self, score: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the rates of the reverse process out of ``x``, per unit of ``sigma`` [b], [b, l, n]; 0 at ``x`` itself."""

    @abstractmethod
    def analytic(self, score: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Return the probabilities of a Tweedie step from ``sigma`` down to ``sigma_next`` [b] (SEDD, theorem 4.2).

        Returns:
            [b, l, n], not clamped: scores that belong to no distribution can give negative values.
        """

    @abstractmethod
    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Return the probabilities of an ancestral step from total noise ``sigma`` down to ``sigma_next`` [b], [b, l, n].

        ``x0_probs`` [b, l, n] are the predicted probabilities of the clean token.
        """
