"""Changes of noise on a noise tape: what a sampling run records beside the seed.

Axes: k changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_graph.errors import UserError

__all__ = ["FINAL", "MOST", "MOVE", "NOISED", "Changes", "Record"]

MOVE, NOISED, FINAL = -1, -2, -3
"""Codes in place of a state in :class:`Changes`: the uniform number that decides whether a position changes; the token
after an application of the forward process; the token at the end of the run, where the sampler cannot draw the text's."""
MOST = 2**26
"""Largest number of changes of a tape."""


class Changes(NamedTuple):
    """Noise that differs from that of the seed, sorted by call.

    Attributes:
        call: Number of the call of :class:`~sedd_graph.diffusion.tokens.noise_tape.NoiseTape` in the run, from 0, int64 [k].
        row: Index of the row, int64 [k].
        place: Index of the position on the tape, int64 [k].
        state: State whose Gumbel noise is changed, or one of :data:`MOVE`, :data:`NOISED` and :data:`FINAL`, int64 [k].
        value: The noise, or the token, float64 [k].
    """

    call: Tensor
    row: Tensor
    place: Tensor
    state: Tensor
    value: Tensor

    @staticmethod
    def joined(parts: Sequence[Changes]) -> Changes:
        """Return the changes of all ``parts``, in order."""
        none = torch.zeros(0, dtype=torch.int64)
        empty = Changes(none, none, none, none, none.double())
        return Changes(*(torch.cat(column) for column in zip(empty, *parts, strict=True)))

    @staticmethod
    def sorted(parts: Sequence[Changes]) -> Changes:
        """Return the changes of all ``parts`` in the order of their calls."""
        found = Changes.joined(parts)
        order = found.call.argsort(stable=True)
        return Changes(*(column[order] for column in found))

    def check(self, rows: int, states: int) -> None:
        """Verify that the changes are those of ``rows`` rows and of a model with ``states`` states.

        Raises:
            UserError: They are not, or are not sorted by call.
        """
        bounds = ((self.row, 0, rows), (self.place, 0, MOST), (self.state, FINAL, states), (self.call, 0, 2**62))
        if any(len(v) and (int(v.min()) < low or int(v.max()) >= high) for v, low, high in bounds):
            raise UserError("the tape's noise is not that of rows and states of this model")
        tokens = self.value[(self.state == NOISED) | (self.state == FINAL)]
        if not bool(self.value.isfinite().all()) or bool(((tokens < 0) | (tokens >= states)).any()):
            raise UserError("the tape's noise is not finite, or its tokens are not those of this model")
        if bool((self.call.diff() < 0).any()):
            raise UserError("the tape's noise is not in the order of its calls")


class Record:
    """The state that all parts of a tape share: the number of the next call, and what is recorded."""

    def __init__(self, past: Changes) -> None:
        self.call, self.count, self.past = 0, 0, past
        self.parts: list[Changes] = []

    def add(self, call: int, row: Tensor, place: Tensor, state: Tensor | int, value: Tensor) -> None:
        """Record changes in one call, all [k]."""
        self.count += len(row)
        if self.count > MOST:
            raise UserError(f"a tape holds at most {MOST:,} changes of noise: take fewer steps, or less text at a time")
        full = row if isinstance(state, Tensor) else torch.full_like(row, state)
        state = state if isinstance(state, Tensor) else full
        columns = torch.full_like(row, call), row, place, state, value.double()
        self.parts.append(Changes(*(column.cpu() for column in columns)))
