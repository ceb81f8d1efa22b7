"""The random numbers of a sampling run: from a seeded generator, or addressed by place (counter-based).

A sampler of tokens takes all its random numbers from a :class:`Draws`: which positions change, their new tokens, uniform
numbers, numbers of events, and applications of the forward process. This class takes them from a generator; the
noise tape (:mod:`sedd_graph.diffusion.tokens.noise_tape`) takes them from recorded noise. Axes: b batch, l length, n
states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.categorical import categorical, going, jump
from sedd_graph.diffusion.conditions.constraint import Matching
from sedd_graph.diffusion.tokens.kernel import Kernel

__all__ = ["Draws", "placed_uniform"]

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_M1, _M2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _mixed(z: Tensor) -> Tensor:
    """Return the splitmix64 finaliser of each element of ``z``, int64 (the bits of unsigned integers)."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _M1
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _M2
    return z ^ ((z >> 31) & (2**33 - 1))


def placed_uniform(seed: Tensor, *address: Tensor | int) -> Tensor:
    """Return uniform numbers that are a function of a seed and an address, such as (call, position, state).

    The numbers are a hash (splitmix64), the same on every device, and do not depend on which other numbers are drawn.

    Args:
        seed: Seeds, int64.
        *address: Integers, or int64 tensors that broadcast with ``seed``.

    Returns:
        float64 in (0, 1) with 52 random bits each, of the broadcast shape.
    """
    found = _mixed(seed + _GOLDEN)
    for part in address:
        found = _mixed(found + (torch.as_tensor(part, device=seed.device) + 1) * _GOLDEN)  # wraps around
    return (((found >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52


class Draws:
    """Random numbers of a sampling run from a seeded generator.

    Args:
        generator: Random number generator on the device of the rows.

    Attributes:
        generator: This generator. Samplers of tokens call the methods below instead, so that a noise tape can record
            and replay what they draw; the generator of a noise tape is seeded by the tape.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def begin_step(self, step: int, x: Tensor) -> None:
        """Note that step ``step`` (from 0) starts with the rows ``x``, int64 [b, l]."""

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform numbers in (0, 1], float64 of shape ``[*shape]``, the first axis being the batch."""
        return 1 - torch.rand(*shape, generator=self.generator, device=self.generator.device, dtype=torch.float64)

    def poisson(self, rate: Tensor, x: Tensor) -> Tensor:
        """Draw numbers of events.

        Args:
            rate: Expected numbers of events, float64 [b, l].
            x: The current rows, int64 [b, l]. A position is to change if it has exactly one event.

        Returns:
            float64 [b, l].
        """
        return torch.poisson(rate, generator=self.generator)

    def jump(
        self, x: Tensor, move: Tensor, weights: Callable[[Tensor], Tensor], *, read: Callable[[Tensor], bool] = bool
    ) -> Tensor:
        """Draw one step of a jump process; arguments and result as of :func:`sedd_graph.diffusion.categorical.jump`."""
        return jump(x, move, weights, generator=self.generator, read=read)

    def going(self, x: Tensor, move: Tensor) -> Tensor:
        """Draw which positions change, bool [b, l].

        Args:
            x: The current rows, int64 [b, l].
            move: Probability that each position changes, [b, l].
        """
        return going(move, generator=self.generator)

    def matched(
        self, matching: Matching, x: Tensor, rows: Tensor, hidden: Tensor, weights: Tensor, may: Tensor, moving: Tensor
    ) -> Tensor:
        """Draw tokens given that rows match a regular expression.

        Args:
            matching: The constraint.
            x: The current rows, int64 [b, l].
            rows: bool [b], the rows in which positions change.
            hidden: bool [b, l], all masks of these rows; h of them.
            weights: float64 [h, n], weights of the tokens under the masks.
            may: bool [h, n], tokens that are allowed there.
            moving: bool [b, l], those of the hidden positions that change; g of them.

        Returns:
            The new tokens, int64 [g].
        """

        def pick(weights: Tensor, row: Tensor, at: Tensor, kind: Tensor | None) -> Tensor:
            return categorical(weights, generator=self.generator)

        return matching.draw(x[rows], rows, hidden[rows], weights, may, moving[rows], pick=pick)

    def select(self, share: Tensor) -> Tensor:
        """Choose one particle of each group.

        Args:
            share: Probability of each particle of a group, float64 [groups, particles].

        Returns:
            Indices within the groups, int64 [groups].
        """
        return categorical(share, generator=self.generator)

    def noisy(self, kernel: Kernel, x: Tensor, sigma: Tensor, *, corrupt: Tensor) -> Tensor:
        """Draw from the forward process; arguments and result as of :meth:`Kernel.sample`."""
        return kernel.sample(x, sigma, random=Randomness(self.generator), corrupt=corrupt)

    def replaced(self, x: Tensor, wrong: Tensor, allowed: Tensor) -> Tensor:
        """Replace tokens by allowed ones, drawn uniformly.

        Args:
            x: The rows, int64 [b, l].
            wrong: bool [b, l], the positions of these tokens.
            allowed: bool [b, l, n], the allowed tokens.

        Returns:
            The new rows, int64 [b, l].
        """
        x = x.clone()
        x[wrong] = categorical(allowed[wrong].double(), generator=self.generator)
        return x

    def part(self, start: int, stop: int) -> Draws:
        """Return the random numbers of the positions from ``start`` up to ``stop``, which a sampler takes for a row."""
        return self

    def settle(self, x: Tensor) -> Tensor:
        """Return the rows at the end of the run; a noise tape restores tokens that the sampler cannot draw.

        Args:
            x: The rows after the last step, int64 [b, l].
        """
        return x
