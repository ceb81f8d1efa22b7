"""The random numbers of a sampling run: from a seeded generator, or addressed by place (counter-based).

A sampler of tokens takes all its random numbers from a :class:`Draws`: which positions change, their new tokens, uniform
numbers, numbers of events, and applications of the forward process. This class takes them from a generator; the
noise tape (:mod:`sedd_graph.diffusion.tokens.noise_tape`) takes them from recorded noise. Axes: b batch, l length, n
states.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.categorical import categorical, pick
from sedd_graph.diffusion.conditions.constraint import Matching
from sedd_graph.diffusion.tokens.kernel import Kernel

__all__ = ["Draws", "Jump", "NewStates", "Where", "placed_uniform", "systematic"]


class Where(NamedTuple):
    """Some positions of a batch.

    Attributes:
        row: Rows of the positions, int64 [k].
        place: Positions in these rows, int64 [k].
    """

    row: Tensor
    place: Tensor


NewStates = Callable[[Where], Tensor]
"""Type of functions from k positions to the weights of the new states there, [k, n], not normalised."""

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
        # wraps around; small numbers cost less on the host than as tensors
        step = ((part + 1) * _GOLDEN + 2**63) % 2**64 - 2**63 if isinstance(part, int) else (part + 1) * _GOLDEN
        found = _mixed(found + step)
    return (((found >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52


_UNIT = 2.0**40
"""Units of a probability in :func:`systematic`: sums of integers do not depend on the order in which a device adds."""


def systematic(start: Tensor, move: Tensor) -> Tensor:
    """Return uniform numbers u for systematic sampling: the positions with u < ``move`` are spread evenly over each row.

    Systematic sampling (Madow and Madow, Annals of Mathematical Statistics 15, 1944) lays the probabilities of a row end to
    end, and chooses the positions in which an integer lies after a shift by ``start``. So each position is chosen with its
    own probability, two positions are never chosen together if the probabilities from one to the other sum to at most 1, and
    the number of chosen positions differs from its mean by less than 1. Positions of probability 0 do not matter.

    Args:
        start: Uniform numbers in [0, 1), float64 [b, 1].
        move: Probability that each position is chosen, [b, l].

    Returns:
        float64 [b, l] in (0, 1), with 40 random bits; each is uniform by itself.
    """
    share = (move.double().nan_to_num(nan=0.0).clamp(0, 1) * _UNIT).round().long()
    before = share.cumsum(-1) - share + (start * _UNIT).long()
    return 1 - ((before & (2**40 - 1)).double() + 0.5) / _UNIT


@dataclasses.dataclass(eq=False)
class Jump:
    """A step of a jump process of which it is drawn which positions change, and not yet to which states.

    Attributes:
        moving: The positions that change, bool [b, l].
        call: Number of the call, by which a noise tape addresses its noise.
        numbers: Uniform number of the new state at each of them, float64 [b, l]; None: not drawn yet.
        spread: Whether the positions were spread evenly, by one number for each row.
    """

    moving: Tensor
    call: int = 0
    numbers: Tensor | None = None
    spread: bool = False


class _Ahead:
    """The numbers that a generator gives after others whose count is known to the device alone.

    On a CPU they are those that it would give if the count were known; on a GPU, whose numbers depend on the shapes in which
    they are drawn, as many are drawn as there may be.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator, self._exact = generator, generator.device.type == "cpu"
        self._state = generator.get_state() if self._exact else None
        self._block = torch.zeros(0, dtype=torch.float64, device=generator.device)
        self._start = torch.zeros((), dtype=torch.int64, device=generator.device)
        self._most = self.taken = 0

    def _draw(self, count: int) -> Tensor:
        return torch.rand(count, generator=self._generator, device=self._generator.device, dtype=torch.float64)

    def _at(self, index: Tensor, most: int) -> Tensor:
        """Return the numbers with these indices, counted from the next one; there may be ``most``."""
        self._most += most
        if (missing := self._most - len(self._block)) > 0:
            self._block = torch.cat([self._block, self._draw(missing)])
        return self._block[(index + self._start).clamp(0, len(self._block) - 1)]

    def take(self, *shape: int) -> Tensor:
        """Return the next numbers, float64 [*shape]."""
        count = math.prod(shape)
        if not self._exact:
            return self._draw(count).view(shape)
        found = self._at(torch.arange(count, device=self._start.device), count)
        self._start, self.taken = self._start + count, self.taken + count
        return found.view(shape)

    def each(self, where: Tensor) -> Tensor:
        """Return a number for each position ``where``, bool [b, l], row by row; float64 [b, l]."""
        if not self._exact:
            return self._draw(where.numel()).view(where.shape)
        rank = where.reshape(-1).long().cumsum(0) - 1
        found = self._at(rank, where.numel())
        self._start = self._start + where.sum()
        return found.view(where.shape)

    def settle(self, count: int) -> None:
        """Leave the generator behind ``count`` numbers, as if no others had been drawn."""
        if self._state is not None:
            self._generator.set_state(self._state)
            self._draw(count)


class Draws:
    """Random numbers of a sampling run from a seeded generator.

    Args:
        generator: Random number generator on the device of the rows.

    Attributes:
        generator: This generator. Samplers of tokens call the methods below instead, so that a noise tape can record
            and replay what they draw; the generator of a noise tape is seeded by the tape.
        fault: Whether weights of a new state were all zero, or not finite: bool [] on the device.
        in_turn: Whether a jump must end before the next one begins.
    """

    in_turn = False

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.fault = torch.zeros((), dtype=torch.bool, device=generator.device)
        self._open: list[Jump] = []
        self._ahead: _Ahead | None = None
        self._used = 0

    def _rand(self, *shape: int) -> Tensor:
        """Return the next uniform numbers in [0, 1), float64 [*shape]; a jump may not have ended yet."""
        if not self._open:
            return torch.rand(*shape, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        return self._reserved().take(*shape)

    def _reserved(self) -> _Ahead:
        """Give numbers to all jumps that have not ended."""
        self._ahead = _Ahead(self.generator) if self._ahead is None else self._ahead
        for jump in self._open:
            if jump.numbers is None:
                jump.numbers = self._ahead.each(jump.moving)
        return self._ahead

    def begin_step(self, step: int, x: Tensor) -> None:
        """Note that step ``step`` (from 0) starts with the rows ``x``, int64 [b, l]."""

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform numbers in (0, 1], float64 of shape ``[*shape]``, the first axis being the batch."""
        return 1 - self._rand(*shape)

    def poisson(self, rate: Tensor, x: Tensor) -> Tensor:
        """Draw numbers of events.

        Args:
            rate: Expected numbers of events, float64 [b, l].
            x: The current rows, int64 [b, l]. A position is to change if it has exactly one event.

        Returns:
            float64 [b, l].
        """
        return torch.poisson(rate, generator=self.generator)

    def begin_jump(self, x: Tensor, move: Tensor, *, when: Tensor | None = None, spread: bool = False) -> Jump:
        """Draw which positions change in one step of a jump process, which :meth:`end_jump` ends.

        Other numbers may be drawn in between, and further jumps begun: they are those that would follow the new states.
        So the host waits once for all of them.

        Args:
            x: The current rows, int64 [b, l].
            move: Probability that each position changes, [b, l].
            when: bool [], whether the step is taken at all, False only if ``move`` is 0; another jump must have been begun.
                None: it is.
            spread: As of :meth:`going`.
        """
        jump = Jump(self.going(x, move, spread=spread), spread=spread)
        self._open.append(jump)
        return jump

    def end_jump(
        self,
        jump: Jump,
        x: Tensor,
        where: Where,
        total: int | None,
        weights: NewStates,
        *,
        size: int,
        note: Callable[[Where, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw the new states of a jump.

        Args:
            jump: The jump.
            x: The current rows, int64 [b, l].
            where: The m positions that change, row by row; those at which no new state is needed may be left out.
            total: Number of positions that change, left out or not; None: the step is not taken.
            weights: Weights of the new states, called for ``size`` positions at a time, in order.
            size: As above.
            note: Called after each call of ``weights``, with its positions and the new states, int64 [k].

        Returns:
            The rows after the step, int64 [b, l].
        """
        numbers = self._numbers(jump, where, total)
        out = x.clone()
        for start in range(0, len(where.row), size):
            part = Where(*(v[start : start + size] for v in where))
            found = self._states(jump, weights(part), part, numbers[start : start + size])
            out[part.row, part.place] = found
            if note is not None:
                note(part, found)
        return out

    def _states(self, jump: Jump, weights: Tensor, where: Where, numbers: Tensor) -> Tensor:
        """Draw new states, int64 [k], from ``weights`` [k, n] by uniform numbers, float64 [k]."""
        found, fault = pick(weights, numbers)
        self.fault = self.fault | fault
        return found

    def _numbers(self, jump: Jump, where: Where, total: int | None) -> Tensor:
        """Return the uniform numbers of new states, float64 [m], and end the jump."""
        if self._ahead is not None:
            self._reserved()
        self._open.remove(jump)
        if total is None and self._ahead is not None:
            self._ahead.taken -= len(jump.moving) if jump.spread else jump.moving.numel()
        total = total or 0
        self._used += total
        if self._ahead is not None and not self._open:
            self._ahead.settle(self._used + self._ahead.taken)
            self._ahead = None
        self._used = self._used if self._open else 0
        if jump.numbers is not None:
            return jump.numbers[where.row, where.place]
        numbers = torch.rand(total, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        if len(where.row) == total:
            return numbers
        rank = (jump.moving.reshape(-1).long().cumsum(0) - 1).view(jump.moving.shape)
        return numbers[rank[where.row, where.place]]

    def going(self, x: Tensor, move: Tensor, *, spread: bool = False) -> Tensor:
        """Draw which positions change, bool [b, l].

        Args:
            x: The current rows, int64 [b, l].
            move: Probability that each position changes, [b, l].
            spread: Whether they are spread evenly over each row (:func:`systematic`) in place of drawn independently.
        """
        u = systematic(self._rand(len(move), 1), move) if spread else self._rand(*move.shape)
        return u < move.double()

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
