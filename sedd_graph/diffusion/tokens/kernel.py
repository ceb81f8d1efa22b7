"""The interface of kernels: forward processes that noise each token independently. Implementations are components.

Axes: b batch, l length, n states. ``sigma`` is total noise, 0 for clean text. ``Q[z, y]`` is the rate from state y to
state z; columns of a rate matrix sum to zero.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.outputs import LOG_SCORE, LOG_X0, Output
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.errors import UserError

__all__ = ["INEXACT", "LOSS", "ONLY_MASKS", "Kernel", "Replacement", "needs_float64", "tweedie"]

LOSS = 1e-4
"""Largest rounding error of the probabilities of a Tweedie step for which scores stay float32."""
INEXACT = 1e-2
"""Rounding error of Tweedie's probabilities at which a step is refused."""
SOUNDED = 8
"""Number of positions per row at which the effect of rounded log-scores is estimated, to save time."""

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
    extra_states: ClassVar[int] = 0
    """Number of states without a network output: the last axis of the graph's output has n minus this many entries."""

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


def needs_float64(kernel: Kernel, sigma: Tensor, sigma_next: Tensor) -> bool:
    """Return whether the scores of a Tweedie step must be float64, since rounding in float32 would exceed :data:`LOSS`.

    Args:
        kernel: The kernel.
        sigma: Total noise, [b].
        sigma_next: Total noise after the step, [b].
    """
    if kernel.carries_over:  # nothing is inverted
        return False
    return not kernel.amplification(sigma, sigma_next) * torch.finfo(torch.float32).eps <= LOSS


def _clamped(chances: Tensor) -> Tensor:
    """Return probabilities [..., n] as a step uses them: not negative, of sum 1."""
    kept = chances.clamp(min=0)
    return kept / kept.sum(-1, keepdim=True).clamp(min=1e-30)


def tweedie(
    kernel: Kernel, score: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, *, unit: float = 0.0
) -> Tensor:
    """Return the next-state probabilities :meth:`Kernel.analytic`, and verify that rounding errors in them are small.

    A Tweedie step multiplies by the inverse of a transition matrix, which amplifies rounding errors by a factor that is
    exponential in the fastest rate of the kernel times the step. Two kinds of rounding are verified:

    - In the step itself: without rounding the probabilities sum to 1 for any scores.
    - In the network's log-scores. At high noise the clean tokens change log-scores by little; where log-scores are not
      close to 0 besides, as with unequal token frequencies, float32 loses this change. The effect is estimated by a
      change of all log-scores by their rounding error, at the first positions of each row. What counts is the change
      of the probabilities after negative ones are clamped, as samplers do.

    Positions with scores that are not finite are not verified.

    Args:
        kernel: The kernel.
        score: Scores, [b, l, n]; float64 where :func:`needs_float64`.
        x: Noisy rows, int64 [b, l].
        sigma: Total noise, [b].
        sigma_next: Total noise after the step, [b].
        unit: Relative rounding error of the log-scores that ``score`` is the exponential of; 0: they are not rounded.

    Returns:
        Next-state probabilities of sum 1, not clamped, [b, l, n].

    Raises:
        UserError: A probability, or the sum of the probabilities at a position, is off by more than :data:`INEXACT`.
    """
    before, after = sigma.to(score.dtype), sigma_next.to(score.dtype)
    found = kernel.analytic(score, x, before, after)
    finite = score.isfinite().all(-1)  # outputs that are not finite are the network's error
    apart = torch.where(finite, (found.sum(-1) - 1).abs().nan_to_num(nan=torch.inf), 0.0)
    if unit and apart.numel():
        few, at = score[:, :SOUNDED], x[:, :SOUNDED]
        signs = 1.0 - 2.0 * (torch.arange(few.shape[-1], device=few.device) % 2)
        rounded = few + signs * unit * torch.xlogy(few, few).abs()
        changed = kernel.analytic(rounded, at, before, after)
        moved = (_clamped(changed) - _clamped(found[:, :SOUNDED])).abs().amax(-1)
        moved = torch.where(finite[:, :SOUNDED], moved.nan_to_num(nan=torch.inf), 0.0)
        apart = torch.cat([apart, moved], dim=-1)
    gap = float(apart.max()) if apart.numel() else 0.0
    if gap > INEXACT:
        longest = float((sigma - sigma_next).max())
        raise UserError(
            f"a Tweedie step over {longest:.3g} of total noise is too long for {type(kernel).__name__}: its probabilities "
            f"are off by {gap:.2g}; take more steps, less noise at t = 1, or the sampler 'ancestral'"
        )
    return found
