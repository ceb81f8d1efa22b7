"""Base class of kernels in discrete time, given as a sequence of step matrices Q_1 ... Q_T (D3PM, arXiv 2107.03006).

The matrices need not commute, so the process has no rate matrix, and transition probabilities are ordered products:
P(i | j) = Q_i ... Q_{j+1}. Column convention: ``Q[z, y]`` is the probability of state z after the step, given y before
it. Axes: b batch, l length, n states, T steps, m tables.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.component.outputs import LOG_X0, Output
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.categorical import categorical, inverse_cdf
from sedd_graph.diffusion.numerics import tiny
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.errors import UserError

__all__ = ["MOST_BYTES", "StepKernel", "step_tables"]

MOST_STATES = 4096
"""Largest number of states of a kernel in discrete time."""
MOST_BYTES = 2 * 2**30
"""Largest size of the tables of a kernel: step matrices and their cumulative products, float64."""


def step_tables(steps: Tensor) -> Tensor:
    """Return the tables of a kernel: cumulative products P(0) ... P(T), the step matrices Q_1 ... Q_T, and one of NaN.

    Args:
        steps: Step matrices, float64 [T, n, n]; each column sums to 1.

    Returns:
        float64 [2 T + 2, n, n]; P(0) is the identity.
    """
    count, n = len(steps), steps.shape[-1]
    tables = steps.new_full((2 * count + 2, n, n), torch.nan)
    tables[0] = torch.eye(n, dtype=steps.dtype)
    for i in range(count):
        torch.matmul(steps[i], tables[i], out=tables[i + 1])
    tables[count + 1 : -1] = steps
    return tables


class _Visited(NamedTuple):
    """Transition matrices of the steps that a sampler takes.

    Attributes:
        before: The step that each one leads down to, int64 [T + 1]; -1 for those that are not taken.
        number: Index of its matrix among ``products``, int64 [T + 1].
        products: NaN, which pairs of other steps get, the identity, the k matrices, and those from clean text, float64
            [2 k + 2, n, n]; None if no step of the kernel is skipped.
        taken: Number k of steps that are taken.
    """

    before: Tensor
    number: Tensor
    products: Tensor | None
    taken: int


class StepKernel(Kernel):
    """Base class of kernels in discrete time, defined by T step matrices.

    Subclasses define ``steps``, ``own_schedule``, ``mask`` and :meth:`step_matrices`. Total noise is the number of steps
    taken; it is rounded to a whole number. The prior is the mean over clean tokens of the distribution after the last
    step: the uniform distribution, if all matrices are doubly stochastic.

    Raises:
        UserError: There are more than :data:`MOST_STATES` states, or the tables would exceed :data:`MOST_BYTES`.
    """

    abstract: ClassVar[bool] = True
    tabular = True
    tables: Tensor
    law: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        if self.states > MOST_STATES:
            raise UserError(
                f"{type(self).__name__.lower()} holds tables of states x states: {self.states:,} states are more than the "
                f"{MOST_STATES:,} it takes; take a kernel in continuous time, such as neighbours or uniform"
            )
        self._visited: _Visited | None = None
        size = (2 * self.steps + 2) * self.states**2 * 8
        if size > MOST_BYTES:
            raise UserError(
                f"{type(self).__name__.lower()}: {self.steps:,} steps of {self.states:,} states need tables of "
                f"{size / 2**30:,.3g} GiB (2 x steps x states x states numbers of 8 bytes), more than the "
                f"{MOST_BYTES / 2**30:g} GiB allowed; take fewer steps or states, or a kernel in continuous time, "
                "such as neighbours or uniform"
            )
        self.register_buffer("tables", self.make_tables(), persistent=False)
        self.register_buffer("law", self.tables[self.steps][:, : self.data_tokens].mean(1), persistent=False)

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of steps T."""

    @abstractmethod
    def step_matrices(self) -> Tensor:
        """Return the step matrices, float64 [T, n, n]: entry [i, z, y] is the probability of z after step i + 1 given y."""

    def make_tables(self) -> Tensor:
        """Return :func:`step_tables` of the matrices; a subclass may cache them. The result is not changed in place."""
        return step_tables(self.step_matrices())

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        return ((LOG_X0,),)

    # -- transition probabilities -------------------------------------------------------------------------------------

    def _step(self, sigma: Tensor) -> Tensor:
        """Return the number of steps taken at total noise ``sigma``, int64 of the same shape."""
        return sigma.round().long().clamp(0, self.steps)

    def _between(self, now: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return tables [m, n, n] and the index of P(now | before) among them, int64 [b], for steps ``now`` and ``before``.

        Single steps and steps from clean text are in :attr:`tables`. Others are products of the skipped steps, one for
        each pair that occurs. Compiled code cannot compute these, and gets NaN.
        """
        known = torch.where(before == now, 0, torch.where(before == 0, now, self.steps + now))
        missing = (before != now) & (before != 0) & (before != now - 1)
        if torch.compiler.is_compiling():
            return self.tables, torch.where(missing, len(self.tables) - 1, known)
        if self._visited is not None:
            visited = self._visited
            if visited.products is None:
                return self.tables, torch.where(missing, len(self.tables) - 1, known)
            number = visited.number[now]
            clean = torch.where((before == 0) & (number > 0), number + visited.taken, (before == now).long())
            return visited.products, torch.where(visited.before[now] == before, number, clean)
        if not bool(missing.any()):
            return self.tables, known
        pairs, at = torch.stack([now, before], 1).unique(dim=0, return_inverse=True)
        return torch.stack([self._product(i, j) for i, j in pairs.tolist()]), at

    @contextlib.contextmanager
    def visiting(self, times: Sequence[float]) -> Iterator[None]:
        visited = [*(round(t * self.steps) for t in times), 0]
        pairs = list(pairwise(visited))
        before = torch.full((self.steps + 1,), -1)
        index = torch.zeros_like(before)
        products = None
        if any(then not in (0, now - 1) for now, then in pairs):
            for number, (now, then) in enumerate(pairs, 2):
                before[now], index[now] = then, number
            steps = (self._product(now, then) for now, then in pairs)
            products = torch.stack([self.tables[-1], self.tables[0], *steps, *(self.tables[now] for now, _ in pairs)])
        device = self.tables.device
        self._visited = _Visited(before.to(device), index.to(device), products, len(pairs))
        try:
            yield
        finally:
            self._visited = None

    def _product(self, now: int, before: int) -> Tensor:
        """Return P(now | before), the product of the steps after ``before`` up to ``now``, float64 [n, n]."""
        if before == 0 or before >= now:
            return self.tables[now if before == 0 else 0]
        out = self.tables[self.steps + before + 1]
        for step in range(before + 2, now + 1):
            out = self.tables[self.steps + step] @ out
        return out

    def _columns(self, x0: Tensor, sigma: Tensor) -> Tensor:
        """Return the distribution of x_t given ``x0`` [b, l], float64 [b, l, n]."""
        return self.tables.transpose(1, 2)[self._step(sigma)[:, None], x0]

    def _mixed(self, x0_probs: Tensor, sigma: Tensor) -> Tensor:
        """Return the distribution of x_t under a prediction of the clean token, float64 [b, l, n], clamped above 0."""
        mixed = x0_probs.double() @ self.tables[self._step(sigma)].transpose(1, 2)
        return mixed.clamp(min=tiny(mixed))

    def transition_matrix(self, sigma: float | Tensor, start: float = 0.0) -> Tensor:
        level = torch.as_tensor(sigma, dtype=torch.float64)
        now = self._step(level.reshape(-1)).to(self.tables.device)
        tables, at = self._between(now, self._step(torch.full_like(now, start, dtype=torch.float64)))
        return tables[at].reshape(*level.shape, self.states, self.states)

    # -- draws --------------------------------------------------------------------------------------------------------

    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        moved = inverse_cdf(self._columns(x0, sigma).cumsum(-1), random.rand48(*x0.shape)[..., None])[..., 0]
        return torch.where(corrupt, moved, x0)

    def prior(self, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        law = self.law.to(generator.device)
        weights = law
        if allowed is not None:
            states = allowed.to(law.device).clone()
            if self.mask is not None:
                states[self.mask] = True
            kept = law * states
            weights = kept if bool(kept.sum() > 0) else states.to(law.dtype)
        return categorical(weights.expand(rows, length, -1), generator=generator)

    def prior_divergence(self, x0: Tensor, sigma: Tensor) -> Tensor:
        seen = self._columns(x0, sigma)
        return (torch.xlogy(seen, seen) - torch.xlogy(seen, self.law)).sum(-1)

    # -- reverse steps ------------------------------------------------------------------------------------------------

    def log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        mixed = self._mixed(log_x0.exp(), sigma).log()
        return (mixed - mixed.gather(-1, xt[..., None])).to(log_x0.dtype)

    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        tables, at = self._between(self._step(sigma), self._step(sigma_next))
        weights = tables[at[:, None], x] * self._mixed(x0_probs, sigma_next)
        return (weights / weights.sum(-1, keepdim=True).clamp(min=tiny(weights))).to(x0_probs.dtype)

    # -- what only continuous time has --------------------------------------------------------------------------------

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{type(self).__name__.lower()} is a kernel in discrete time, without {what}")

    def rate_matrix(self, sigma: float) -> Tensor:
        self._refuse("rates")

    def reverse_rate(self, score: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        self._refuse("rates")

    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        self._refuse("score entropy")

    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        self._refuse("a bound in continuous time")

    def analytic(self, score: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        self._refuse("Tweedie steps")
