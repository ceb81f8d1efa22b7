"""The interface of samplers of vectors whose steps are bijections on a grid, so that text and noise determine each other.

A step moves a state of k streams of vectors in the coordinates of the probability-flow ODE
(:mod:`sedd_graph.diffusion.vectors.flow`). All numbers of a state are multiples of a grid spacing, sums of which do not
round, so that a step is inverted to the last bit. A bijection of a bounded grid neither gathers nor spreads its points: it
has volume 1, while the flow has the divergence of E[x_0 | x_t]. A second stream, which contracts where the first
expands, is therefore needed. Axes: b batch, l length, k streams, d width of a vector.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sedd_graph.diffusion.grid import Grid
from sedd_graph.diffusion.vectors.flow import root_snr
from sedd_graph.diffusion.vectors.gaussian import along, noise_std
from sedd_graph.diffusion.vectors.kernel import Estimate
from sedd_graph.diffusion.vectors.sampler import VectorSampler, VectorWalk
from sedd_graph.errors import UserError

__all__ = ["Field", "Level", "OnState", "ReversibleSampler", "State", "levels_of"]

State = tuple[Tensor, ...]
"""Streams of vectors on the grid, float64 [b, l, d] each. The first is the sample in the coordinates of the ODE."""
OnState = Callable[[State], None]
"""Callback that gets the state after each step."""


class Level(NamedTuple):
    """A noise level between two steps, each float64 [b].

    Attributes:
        t: Time.
        noise: Standard deviation of the noise, sqrt(1 - alpha_bar).
        s: Root of the signal-to-noise ratio, the integration variable of the ODE.
    """

    t: Tensor
    noise: Tensor
    s: Tensor


def levels_of(walk: VectorWalk, times: Tensor) -> list[Level]:
    """Return the noise levels at ``times`` float64 [n]."""
    every = [t.expand(len(walk.x)) for t in times]
    return [Level(t, noise_std(walk.sigma(t)), root_snr(walk.sigma(t))) for t in every]


class Field:
    """The right-hand side of the ODE, E[x_0 | x_t] as the network estimates it: ``field(y, level)``, float64 [b, l, d].

    It is a function of its arguments alone: a self-conditioned network is conditioned on its first estimate at the same
    vectors. At given positions it is the embedding of the given token. The last evaluation is kept, since a step starts
    where the one before ended.

    Args:
        walk: The sampling run, which evaluates the network.
    """

    def __init__(self, walk: VectorWalk) -> None:
        self._walk = walk
        self._seen: tuple[Tensor, Level, Estimate] | None = None

    def __call__(self, y: Tensor, level: Level) -> Tensor:
        walk, found = self._walk, self.estimate(y, level).x0
        return torch.where(walk.free, found, walk.given).double()

    def estimate(self, y: Tensor, level: Level) -> Estimate:
        """Return the estimate of the clean rows at vectors ``y`` [b, l, d] and a noise level."""
        seen = self._seen
        if seen is not None and seen[0] is y and seen[1] is level:
            return seen[2]
        walk = self._walk
        x = (along(level.noise, y) * y).to(walk.x.dtype)
        if not walk.settings.renoise:
            x = torch.where(walk.free, x, walk.given)
        found = walk.refined(level.t, x=x)
        self._seen = (y, level, found)
        return found


class ReversibleSampler(VectorSampler):
    """A sampler of the probability-flow ODE whose steps are bijections of states on a grid.

    A subclass implements :meth:`advance`, and :meth:`retreat` if it is not the same step with its ends exchanged. The
    steps are the same functions in sampling and in inversion, with equal arguments, so that rounding errors of the
    network's arithmetic are equal too.
    """

    abstract: ClassVar[bool] = True
    grid: ClassVar[Grid] = Grid(bits=20, dtype=torch.float64)
    """Grid of all numbers of a state, of the kind that ``arithmetic: exact`` rounds streams to, but finer."""
    streams: ClassVar[int] = 2
    """Number k of streams of a state."""

    @abstractmethod
    def advance(self, field: Field, state: State, start: Level, end: Level) -> State:
        """Return the state after one step.

        Args:
            field: The right-hand side of the ODE.
            state: The state at ``start``. Changes that are added to it must be rounded to :attr:`grid`.
            start: Noise level before the step.
            end: Noise level after the step.
        """

    def retreat(self, field: Field, state: State, start: Level, end: Level) -> State:
        """Return the state before a step from ``start`` to ``end``, given the one after: the inverse of :meth:`advance`.

        By default the step with its ends exchanged, which is the inverse of a symmetric step.
        """
        return self.advance(field, state, end, start)

    def begin(self, y: Tensor) -> State:
        """Return the state that represents vectors ``y`` [b, l, d], at either end: all streams are equal to them."""
        first = self.grid.snap(y)
        return (first,) * self.streams

    def forward(
        self, walk: VectorWalk, state: State, levels: Sequence[Level], on_state: OnState | None = None
    ) -> State:
        """Return the state at the last level, from that at the first; report the rows after each step.

        Args:
            walk: The sampling run, whose vectors follow the state.
            state: State at the first level.
            levels: Noise levels, decreasing.
            on_state: Callback for the state after each step; None: no callback.

        Raises:
            UserError: Numbers of the state are too large for the grid, or outputs of the network are not finite.
        """
        field = Field(walk)
        for start, end in itertools.pairwise(levels):
            state = self.advance(field, state, start, end)
            if on_state is not None:
                on_state(state)
            walk.x = (along(end.noise, state[0]) * state[0]).to(walk.x.dtype)
            walk.end_step()
        self._check(state)
        walk.conclude(field.estimate(state[0], levels[-1]), levels[-1].t)
        return state

    def backward(self, walk: VectorWalk, state: State, levels: Sequence[Level]) -> State:
        """Return the state at the first level, from that at the last: the inverse of :meth:`forward`."""
        field = Field(walk)
        for start, end in reversed(list(itertools.pairwise(levels))):
            state = self.retreat(field, state, start, end)
        self._check(state)
        return state

    def walk(self, walk: VectorWalk, times: Tensor) -> None:
        classifier = walk.settings.classifier
        if classifier is not None and classifier.config.updates:
            raise UserError(
                "sample: the classifier's updates need a sampler that draws noise, such as ddpm: take updates: 0"
            )
        levels = levels_of(walk, times)
        y = walk.x.double() / along(levels[0].noise, walk.x.double())
        self.forward(walk, self.begin(y), levels)

    def _check(self, state: State) -> None:
        """Raise :class:`UserError` if sums of numbers of a state may have been rounded."""
        largest = max(float(x.detach().abs().max()) for x in state)
        if not largest < self.grid.limit / 4:
            raise UserError(
                f"sample: the vectors reached {largest:.3g}; exact steps on a grid of 2^-{self.grid.bits} need them below "
                f"{self.grid.limit / 4:.3g}: take a schedule with more noise at its end, or the sampler ode"
            )
