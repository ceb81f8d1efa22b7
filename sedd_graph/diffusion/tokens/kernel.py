"""The interface of kernels: forward processes that noise each token independently. Implementations are components.

Axes: b batch, l length, n states. ``sigma`` is total noise, 0 for clean text. ``Q[z, y]`` is the rate from state y to
state z; columns of a rate matrix sum to zero.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.outputs import LOG_SCORE, LOG_X0, Output
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.errors import UserError

__all__ = ["CONTINUOUS", "ONLY_MASKS", "Kernel", "Replacement"]

CONTINUOUS = "a kernel in continuous time"
"""Phrase for error messages of components that refuse kernels with a number of :attr:`Kernel.steps`."""
ONLY_MASKS = "a kernel that only masks, all tokens at one rate"
"""Phrase for error messages of components that require :attr:`Kernel.masks_evenly`."""


class Replacement(NamedTuple):
    """A transition matrix in a form linear in n: P[z, y] = ``keep[y]`` 1[z = y] + (1 - ``keep[y]``) ``target[z]``.

    Attributes:
        keep: Probability that each state is not replaced, float64 [n].
        target: Distribution of the replacement, float64 [n], which does not depend on the state.
    """

    keep: Tensor
    target: Tensor


class Kernel(Component, ABC):
    """The forward process of one token: a Markov jump process over n states, with total noise sigma as its time.

    Rates may depend on ``sigma``. Under every kernel, ``log_x0`` is the log-posterior of the clean token at a position
    given all *other* positions of the noisy row. A mask carries no information on its token, so at a masked position
    this is the posterior given the whole row.
    """

    abstract: ClassVar[bool] = True
    example: ClassVar[Mapping[str, Any]] = {}
    """Values for the Config keys without default, for tests and generated documentation."""
    clamp_safe: ClassVar[bool] = False
    """True if every visible (unmasked) data token equals the clean token.

    Sampling with given tokens held fixed is then exact.
    """
    learned: ClassVar[bool] = False
    """True if the kernel has trained parameters, which are saved with the network's."""
    masks_evenly: ClassVar[bool] = False
    """True if the only transition is from a data token to the mask, at the same rate for every token.

    Objectives and samplers that count masks require this property.
    """
    tabular: ClassVar[bool] = False
    """True if formulas take a table of n x n numbers for each row; losses are then evaluated on whole rows."""
    extra_states: ClassVar[int] = 0
    """Number of states without a network output: the last axis of the graph's output has n minus this many entries."""

    @classmethod
    def own_schedule(cls, config: ComponentConfig) -> Mapping[str, Any] | None:
        """Return the only schedule of a kernel in discrete time, as a blueprint declares one; None: any schedule.

        The result is ``op`` and the keys of the schedule's Config, such as ``{"op": "steps_taken", "steps": 12}``. Blueprints
        with such a kernel declare no schedule.
        """
        return None

    @property
    def steps(self) -> int | None:
        """Number of steps T of a kernel in discrete time; None for a kernel in continuous time.

        The total noise of a kernel in discrete time is the number of steps taken, from 0 to T. Such a kernel has
        transition probabilities between any two steps, and neither rates nor scores: objectives and samplers must
        declare that they use none (``discrete``).
        """
        return None

    def visiting(self, times: Sequence[float]) -> contextlib.AbstractContextManager[None]:
        """Return a context within which a sampler steps along these times, downwards, and then to clean text.

        A kernel in discrete time may compute what it needs for them once, and need not wait for the device in each step.
        """
        return contextlib.nullcontext()

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        """Return the sets of network outputs that this kernel can read; a graph has all outputs of one set.

        By default there are two sets of one output each: ``log_score``, and ``log_x0``.
        """
        return ((LOG_SCORE,), (LOG_X0,))

    def translate(self, outputs: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Mapping[str, Tensor]:
        """Convert kernel-specific outputs of the graph to ``log_score`` or ``log_x0``.

        The default returns ``outputs``. A kernel that overrides :meth:`parametrizations` overrides this method as well.

        Args:
            outputs: The graph's outputs by name.
            x: Noisy rows, int64 [b, l].
            sigma: Total noise, [b].

        Returns:
            ``log_score`` or ``log_x0`` by name, float32 [b, l, n].
        """
        return outputs

    def express(self, outputs: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Mapping[str, Tensor]:
        """Convert ``log_score`` or ``log_x0`` to kernel-specific outputs: the inverse of :meth:`translate`.

        Used in numerical verification to express a perfect network in these outputs.

        Args:
            outputs: ``log_score`` or ``log_x0`` by name, float32 [b, l, n].
            x: Noisy rows, int64 [b, l].
            sigma: Total noise, [b].

        Returns:
            The graph's outputs by name.
        """
        return outputs

    @property
    def rate_bound(self) -> float | None:
        """Upper bound on the total reverse rate of leaving a state at one position; None if unknown.

        It holds for the scores of any distribution. Rates are per unit of the transformed time log(exp(sigma) - 1).
        """
        return None

    def amplification(self, sigma: Tensor, sigma_next: Tensor) -> float:
        """Return the factor by which :meth:`analytic` amplifies rounding errors of scores, at most; infinite if unknown.

        Args:
            sigma: Total noise, [b].
            sigma_next: Total noise after the step, [b].
        """
        return math.inf

    @property
    def carries_over(self) -> bool:
        """True if the kernel has carry-over unmasking (MDLM).

        Every token is then either clean or masked, and the reverse process never changes a clean token.
        """
        return self.clamp_safe and self.mask is not None

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        """Return ``config`` reduced to a vocabulary of ``states`` states, for numerical verification.

        Config values with one entry per token are reduced to ``states`` entries.
        """
        return config

    def unmixed(self, sigma: float) -> float | None:
        """Return the total variation distance between noise at ``sigma`` and the prior, maximised over clean tokens.

        Large vocabularies may be evaluated on a subset of their tokens.

        Args:
            sigma: Total noise.

        Returns:
            The distance, in [0, 1]; None if the kernel reduced by :meth:`toy` has the same distance.
        """
        return None

    def prior_divergence(self, x0: Tensor, sigma: Tensor) -> Tensor:
        """Return KL(q(x_t | x_0) || prior) at each position: the part of a bound that noise at its end leaves.

        Args:
            x0: Clean tokens, int64 [b, l].
            sigma: Total noise at the end, [b].

        Returns:
            Nats, float64 [b, l]; infinite where noise leaves a state that the prior never has.

        Raises:
            UserError: The kernel does not define it.
        """
        raise UserError(f"{type(self).__name__} does not define the divergence of noise from its prior")

    @property
    def states(self) -> int:
        """Number of states n, the mask included."""
        return self.axis("n")

    @property
    @abstractmethod
    def mask(self) -> int | None:
        """Index of the mask state; None for a kernel without mask."""

    def require_mask(self) -> int:
        """Return the index of the mask state.

        Raises:
            UserError: The kernel has no mask.
        """
        if self.mask is None:
            raise UserError(f"{type(self).__name__} has no mask state; take a kernel with one, such as absorb")
        return self.mask

    @property
    def data_tokens(self) -> int:
        """Number of states that are data tokens: all but the mask."""
        return self.states - (self.mask is not None)

    @abstractmethod
    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        """Draw noisy tokens x_t given clean tokens x_0.

        Args:
            x0: Clean tokens, int64 [b, l].
            sigma: Total noise, [b].
            random: Source of uniform numbers.
            corrupt: bool [b, l], positions that noise may change.

        Returns:
            Noisy tokens x_t, int64 [b, l].
        """

    @abstractmethod
    def prior(self, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        """Draw rows of pure noise.

        Args:
            rows: Number of rows.
            length: Number of positions per row.
            generator: Random number generator; the result is on its device.
            allowed: bool [n], data tokens that may be drawn; None: all.

        Returns:
            int64 [rows, length].
        """

    @abstractmethod
    def rate_matrix(self, sigma: float) -> Tensor:
        """Return the rate matrix Q at total noise ``sigma`` > 0, per unit of sigma, float64 [n, n].

        Used for numerical verification on small vocabularies.
        """

    @abstractmethod
    def transition_matrix(self, sigma: float | Tensor, start: float = 0.0) -> Tensor:
        """Return the transition matrix P of the forward process in closed form: the solution of dP/dsigma = Q(sigma) P.

        Args:
            sigma: Total noise at the end, a number or float64 [b].
            start: Total noise at the start.

        Returns:
            float64 [n, n], where ``P[z, y]`` is the probability of state z at ``sigma`` given state y at ``start``;
            [b, n, n] for ``sigma`` [b].
        """

    def replacement(self, sigma: float, start: float = 0.0) -> Replacement | None:
        """Return the transition matrix as a probability of replacement and its target; None if it has no such form.

        Reversible noise reads it at large vocabularies, in place of :meth:`transition_matrix`, which takes n^2 numbers.

        Args:
            sigma: Total noise at the end.
            start: Total noise at the start.
        """
        return None

    @abstractmethod
    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """Return the score entropy at each position (SEDD, arXiv 2310.16834, eq. 9).

        It is the integrand of the bound on -log p(x_0) per unit of sigma. Multiply by dsigma/dt for the integrand per
        unit of time.

        Args:
            log_score: The network's log-scores, float32 [b, l, n].
            xt: Noisy rows, int64 [b, l].
            x0: Clean rows, int64 [b, l].
            sigma: Total noise, [b].

        Returns:
            Nats, float32 [b, l].
        """

    @abstractmethod
    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """Return the integrand of the negative ELBO at each position for a prediction of the clean token.

        The bound is that of :meth:`score_entropy`, as a function of ``log_x0``. The integrand is per unit of sigma;
        multiply by dsigma/dt for the integrand per unit of time.

        Args:
            log_x0: The network's log-probabilities of the clean token, float32 [b, l, n].
            xt: Noisy rows, int64 [b, l].
            x0: Clean rows, int64 [b, l].
            sigma: Total noise, [b].

        Returns:
            Nats, float32 [b, l].
        """

    @abstractmethod
    def log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        """Return the log-scores that follow exactly from a prediction of the clean token.

        Args:
            log_x0: Log-probabilities of the clean token, float32 [b, l, n].
            xt: Noisy rows, int64 [b, l].
            sigma: Total noise, [b].

        Returns:
            float32 [b, l, n].
        """

    @abstractmethod
    def reverse_rate(self, score: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the rates of the reverse process from the current state to each state, per unit of sigma.

        Args:
            score: Scores, [b, l, n].
            x: Noisy rows, int64 [b, l].
            sigma: Total noise, [b].

        Returns:
            [b, l, n]; 0 at the current state ``x``.
        """

    @abstractmethod
    def analytic(self, score: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Return next-state probabilities of a Tweedie step from ``sigma`` down to ``sigma_next`` (SEDD, theorem 4.2).

        Args:
            score: Scores, [b, l, n].
            x: Noisy rows, int64 [b, l].
            sigma: Total noise, [b].
            sigma_next: Total noise after the step, [b].

        Returns:
            [b, l, n], not clamped: scores that are not those of a distribution can give negative values.
        """

    @abstractmethod
    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Return the next-state probabilities of an ancestral sampling step from ``sigma`` down to ``sigma_next``.

        Args:
            x0_probs: Predicted probabilities of the clean token, [b, l, n].
            x: Noisy rows, int64 [b, l].
            sigma: Total noise, [b].
            sigma_next: Total noise after the step, [b].

        Returns:
            [b, l, n].
        """
