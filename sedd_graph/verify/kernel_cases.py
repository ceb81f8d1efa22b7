"""Cases that formulas of token kernels are verified at: noise levels, and pairs of a noisy state and a clean token.

Axes: k noise levels, c pairs, n states.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Proof
from sedd_graph.diffusion.tokens.kernel import Kernel

__all__ = ["Cases", "at_levels", "column_of", "noise_levels", "row_of"]

LOWEST, HIGHEST = 1e-4, 7.0
"""Range of total noise, enlarged to that of the schedule where it ends later, up to :data:`LIMIT`."""
LIMIT = 20.0
NUMBERS = {"full": 2**19, "quick": 2**16}
"""Approximate number of entries of the scores at all cases."""
LEVELS = {"full": (16, 256), "quick": (8, 64)}
"""Fewest and most noise levels; more where there are few states."""
LIKELY = 1e-6
"""Least probability of a noisy state given its clean token; below, rounding of the reference would count."""


def noise_levels(count: int, *, end: float, seed: int, low: float = LOWEST) -> Tensor:
    """Return ``count`` levels of total noise, float64 [k] in order, one at random in each cell of a logarithmic grid.

    Args:
        count: Number of levels.
        end: Total noise at t = 1.
        seed: Seed of the random levels.
        low: The least level.
    """
    cell = torch.arange(count, dtype=torch.float64)
    u = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    high = min(max(end, HIGHEST), LIMIT)
    return torch.exp(math.log(low) + (cell + u) / count * math.log(high / low))


def at_levels(kernel: Kernel, sigma: Tensor) -> Tensor:
    """Return the noise levels of a kernel that correspond to levels ``sigma`` of total noise, of the same shape and dtype.

    They are ``sigma`` itself in continuous time, and in discrete time the step at about the share 1 - exp(-sigma) of
    all steps, at least 1.
    """
    if kernel.steps is None:
        return sigma
    return (-torch.expm1(-sigma) * kernel.steps).round().clamp(min=1)


def row_of(table: Tensor, at: Tensor) -> Tensor:
    """Return rows ``table[k, at[k, c]]`` of one matrix per noise level.

    Args:
        table: Matrices, [k, n, n].
        at: Indices of rows, int64 [k, c].

    Returns:
        The rows, [k, c, n].
    """
    return table.gather(1, at[..., None].expand(-1, -1, table.shape[-1]))


def column_of(table: Tensor, at: Tensor) -> Tensor:
    """Return columns ``table[k, :, at[k, c]]`` of one matrix per noise level.

    Args:
        table: Matrices, [k, n, n].
        at: Indices of columns, int64 [k, c].

    Returns:
        The columns, [k, c, n].
    """
    return row_of(table.transpose(1, 2), at)


@dataclasses.dataclass(frozen=True)
class Cases:
    """Noise levels with the matrices of a kernel, and pairs of a noisy state and a clean token at each level.

    Attributes:
        kernel: Kernel with few states, so that matrices of all pairs of states fit in memory.
        sigma: Total noise, float64 [k] in order.
        p: Transition matrices, float64 [k, n, n]: ``p[k, z, y]`` is the probability of noisy state z given clean y.
        q: Rate matrices per unit of sigma, float64 [k, n, n]: ``q[k, z, y]`` is the rate from state y to state z.
        z: Noisy states, int64 [k, c].
        x0: Clean tokens, int64 [k, c]. The probability of ``z`` given ``x0`` is not small.
    """

    kernel: Kernel
    sigma: Tensor
    p: Tensor
    q: Tensor
    z: Tensor
    x0: Tensor

    @classmethod
    def of(cls, kernel: Kernel, *, end: float, proof: Proof) -> Cases:
        """Choose noise levels, and pairs of a noisy state and a clean token, for the verification of a kernel.

        With few states each level has all pairs. Otherwise each level has a random selection of its own, and all levels
        have the pairs of the first and last tokens.

        Args:
            kernel: Kernel with at most about 64 states.
            end: Total noise at t = 1.
            proof: Strength of the verification.
        """
        n, every = kernel.states, kernel.states * kernel.data_tokens
        fewest, most = LEVELS[proof]
        levels = max(fewest, min(most, NUMBERS[proof] // (every * n)))
        sigma = noise_levels(levels, end=end, seed=21)
        p = kernel.transition_matrix(sigma)
        q = torch.stack([kernel.rate_matrix(s) for s in sigma.tolist()])
        z, x0 = _pairs(kernel, levels, max(8, min(every, NUMBERS[proof] // (levels * n))))
        likely = p[torch.arange(levels)[:, None], z, x0] > LIKELY
        z = torch.where(likely, z, column_of(p, x0).argmax(-1))
        return cls(kernel, sigma, p, q, z, x0)

    @property
    def rates(self) -> Tensor:
        """Rates Q[z, y] from each state y into the noisy state z of each pair, float64 [k, c, n]; 0 where y is z."""
        return row_of(self.q, self.z).scatter(-1, self.z[..., None], 0.0)

    @property
    def ratio(self) -> Tensor:
        """True scores p(y | x0) / p(z | x0) of each pair, float64 [k, c, n]."""
        seen = column_of(self.p, self.x0)
        return seen / seen.gather(-1, self.z[..., None])

    def predictions(self, z: Tensor, seed: int) -> Tensor:
        """Return random logits of the clean token at each noisy state ``z`` [k, c], float64 [k, c, n].

        They are wide, so that probabilities reach 1e-9 and below. Entries of states that are no data tokens are -1e6.
        """
        shape = (*z.shape, self.kernel.states)
        generator = torch.Generator().manual_seed(seed)
        width = torch.tensor([0.5, 5.0, 12.0], dtype=torch.float64)[torch.arange(z.shape[1]) % 3, None]
        logits = width * torch.randn(shape, generator=generator, dtype=torch.float64)
        return logits.masked_fill(torch.arange(self.kernel.states) >= self.kernel.data_tokens, -1e6)

    def carried(self, log_x0: Tensor, z: Tensor) -> Tensor:
        """Return predictions in which each visible token predicts itself (MDLM's carry-over unmasking).

        If visible (unmasked) tokens of the kernel can differ from the clean tokens, ``log_x0`` is returned unchanged.

        Args:
            log_x0: Log-probabilities of the clean token, float64 [k, c, n].
            z: Noisy states, int64 [k, c].

        Returns:
            Log-probabilities, float64 [k, c, n]; -1e6 for the other tokens where a visible token predicts itself.
        """
        if not self.kernel.clamp_safe:
            return log_x0
        one = F.one_hot(z, self.kernel.states).double().log().clamp(min=-1e6)
        return torch.where((z < self.kernel.data_tokens)[..., None], one, log_x0)

    def scores(self, seed: int) -> Tensor:
        """Return random log-scores at each pair, float64 [k, c, n]: from -9 to 9, or the true ones with errors of order 1.

        They are 0 at the noisy state itself.
        """
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(*self.z.shape, self.kernel.states, generator=generator, dtype=torch.float64)
        near = self.ratio.clamp(min=1e-9).log() + 2 * u - 1
        wide = (torch.arange(self.z.shape[1]) % 2 == 0)[:, None]
        return torch.where(wide, 18 * u - 9, near).scatter(-1, self.z[..., None], 0.0)


def _pairs(kernel: Kernel, levels: int, count: int) -> tuple[Tensor, Tensor]:
    """Return ``count`` pairs of a noisy state and a clean token for each level, int64 [k, c] each."""
    n, m = kernel.states, kernel.data_tokens
    every = torch.cartesian_prod(torch.arange(n), torch.arange(m))
    if count >= len(every):
        return every[:, 0].expand(levels, -1), every[:, 1].expand(levels, -1)
    ends = {0, m - 1}
    always = torch.tensor(sorted({(z, x0) for x0 in ends for z in {*ends, x0, n - 1}}))
    order = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(22))]
    rest = max(1, count - len(always))
    which = torch.arange(levels * rest).view(levels, rest) % len(order)
    chosen = torch.cat([always.expand(levels, -1, -1), order[which]], dim=1)
    return chosen[..., 0], chosen[..., 1]
