"""The interface of exact inversion: a bijection between states at the lowest noise, around a text, and states of noise.

Axes: b batch, l length, k streams of a state, d width of a vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from sedd_graph.engine.network import Network

__all__ = ["Held", "Inversion", "Reached"]


class Held(NamedTuple):
    """Tokens that are given on the way from noise to text.

    Attributes:
        tokens: The tokens, int64 [b, l]; any id elsewhere.
        where: Positions whose tokens are given, bool [b, l].
    """

    tokens: Tensor
    where: Tensor


class Reached(NamedTuple):
    """End of a road from noise.

    Attributes:
        tokens: The decoded tokens, int64 [b, l].
        state: The state at the lowest noise, int64 [b, l, k, d], in units of the grid's spacing.
    """

    tokens: Tensor
    state: Tensor


class Inversion(ABC):
    """A sampler whose road from noise to text is a bijection of states of integers, with its number of steps.

    A state has k streams of vectors for each token, int64 [b, l, k, d], in units of a grid spacing.
    """

    steps: int
    """Number of steps, counting the last, which decodes the tokens."""
    shape: tuple[int, int]
    """Number of streams k, and width d."""
    tokens: int
    """Number of tokens."""

    @abstractmethod
    def around(self, network: Network, tokens: Tensor, seeds: Tensor) -> Tensor:
        """Draw a state at the lowest noise from which ``tokens`` are decoded, int64 [b, l, k, d].

        Noise at a position is drawn again, at last without spread, while another token is decoded there. A token that
        the network does not decode even so is left to the caller.

        Args:
            network: The network.
            tokens: The tokens, int64 [b, l].
            seeds: Seed of the noise of each row, int64 [b].
        """

    @abstractmethod
    def to_noise(self, network: Network, state: Tensor) -> Tensor:
        """Return the state at the highest noise that leads to ``state`` at the lowest; both int64 [b, l, k, d]."""

    @abstractmethod
    def to_text(
        self,
        network: Network,
        noise: Tensor,
        *,
        held: Held | None = None,
        on_state: Callable[[Tensor], None] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Reached:
        """Walk from a state at the highest noise to the lowest, and decode the tokens: inverts :meth:`to_noise`.

        Args:
            network: The network.
            noise: State at the highest noise, int64 [b, l, k, d].
            held: Tokens that are given; None: none.
            on_state: Callback for the state after each step, int64 [b, l, k, d].
            on_step: Callback for the number of each step and the rounded rows, int64 [b, l].
        """

    @abstractmethod
    def mixed(self, noise: Tensor, new: Tensor, *, strength: float, seeds: Tensor) -> Tensor:
        """Return a state at the highest noise, mixed with fresh noise that keeps its variance, int64 [b, l, k, d].

        Args:
            noise: State at the highest noise, int64 [b, l, k, d].
            new: Positions that have fresh noise alone, bool [b, l].
            strength: Share of the variance that is fresh, from 0 to 1.
            seeds: Seed of the fresh noise of each row, int64 [b].
        """
