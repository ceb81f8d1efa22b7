"""Noise of a sampling run by address: a function of a seed and of the place of each choice, and recorded changes of it.

Axes: b rows, l positions, n states, k changes, m positions that change.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sedd_graph.diffusion.draws import Draws, placed_uniform
from sedd_graph.diffusion.gumbel import posterior_changes, standard_gumbel
from sedd_graph.diffusion.numerics import take
from sedd_graph.diffusion.tokens.noise_record import MOVE, Changes, Record
from sedd_graph.diffusion.tokens.road import Bridge, Road

__all__ = ["AGAIN", "FRESH", "GROUP", "SHARED", "TURN", "AddressedNoise", "seed_of"]

TOKEN, AGAIN, FRESH, SHARED, TURN, GROUP = range(1, 7)
"""Numbers of independent streams of one seed."""
KEPT = 8.0
"""Amount in nats by which an edit favours each token of the text that is not held."""


class AddressedNoise(Draws):
    """Noise by address, and what a run records of it.

    Args:
        seeds: Seed of the noise of each row, int64 [b].
        device: Device of the rows.
        changes: Recorded noise that differs from the seeds'; None for none.
        road: The text to end at; None: the run is a replay.
        strength: Share of fresh noise, in [0, 1].
        fresh: Seed of the fresh noise, in addition to that of the row.
    """

    def __init__(
        self,
        seeds: Tensor,
        *,
        device: torch.device,
        changes: Changes | None,
        road: Road | None,
        strength: float,
        fresh: int,
    ) -> None:
        super().__init__(torch.Generator(device).manual_seed(seed_of(seeds[:1], SHARED)))
        self._seeds, self._road, self._strength, self._fresh = seeds.to(device), road, strength, fresh
        self._log = Record(Changes.joined([] if changes is None else [changes]))
        self._places, self._position, self._target = Tensor(), Tensor(), Tensor()
        self._bridge: Bridge | None = None
        self._particles, self._turn = 1, Tensor()

    def changes(self) -> Changes:
        """Return the noise recorded in this run that differs from that of the seeds."""
        found = Changes.joined(self._log.parts)
        return found._replace(row=found.row // self._particles)

    def uniform(self, *shape: int) -> Tensor:
        call = self._next()
        if shape == tuple(self._places.shape):
            return self._uniform(call)
        inner = torch.arange(math.prod(shape[1:]), device=self._places.device)
        return placed_uniform(self._seeds[:, None], call, AGAIN, inner).reshape(shape)

    def poisson(self, rate: Tensor, x: Tensor) -> Tensor:
        call = self._next()
        u = self._changed(call, MOVE, self._uniform(call))
        none, one = torch.exp(-rate), torch.exp(-rate) * (1 + rate)
        if self._road is not None:
            goes, stays = self._prescribed(self._road, x)
            v, once, share = self._uniform(call, AGAIN), (u >= none) & (u < one), one - none
            apart = v * (1 - share)
            u = self._steer(call, u, goes & ~once & (share > 0), none + v * share)
            u = self._steer(call, u, stays & once, torch.where(apart < none, apart, apart + share))
        count, term, below = torch.zeros_like(rate), none.clone(), none.clone()
        while bool((more := (u >= below) & (count < 1e4)).any()):
            count = count + more
            term = term * rate / count.clamp(min=1)
            below = torch.where(more, below + term, below)
        return count

    def _next(self) -> int:
        self._log.call += 1
        return self._log.call - 1

    def _uniform(self, call: int, stream: int = SHARED) -> Tensor:
        """Return the uniform number of each position in one call, float64 [b, l], without changes."""
        return placed_uniform(self._seeds[:, None], call, stream, self._places, MOVE)

    def _prescribed(self, road: Road, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions that must change and those that must not, bool [b, l] each."""
        held, same = road.held, x == self._target
        return held & ~same & (self._bridge is not None), held & same

    def _past(self, call: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return row, position, state and value of the recorded changes in one call that concern these rows, [k]."""
        past, device = self._log.past, self.generator.device
        if not len(past.call):
            none = torch.zeros(0, dtype=torch.int64, device=device)
            return none, none, none, none.double()
        low, high = torch.searchsorted(past.call, torch.tensor([call, call + 1])).tolist()
        row, place, state, value = (column[low:high].to(device) for column in past[1:])
        at = self._position[row, place]
        keep = at >= 0
        if self._road is not None:
            keep = keep & ~self._road.held[row, at.clamp(min=0)]
        return row[keep], at[keep], state[keep], value[keep]

    def _changed(self, call: int, code: int, values: Tensor) -> Tensor:
        """Return ``values`` [b, l] with the recorded ones of one kind in their places."""
        row, at, state, value = self._past(call)
        chosen = state == code
        if not len(state) or not bool(chosen.any()):
            return values
        return values.index_put((row[chosen], at[chosen]), value[chosen].to(values.dtype))

    def _steer(self, call: int, values: Tensor, where: Tensor, new: Tensor, code: int = MOVE) -> Tensor:
        """Return ``values`` with those of ``new`` at ``where``, all [b, l], and record them."""
        if self._road is None or not bool(where.any()):
            return values
        row, at = where.nonzero(as_tuple=True)
        self._log.add(call, row, self._places[row, at], code, new[where])
        return torch.where(where, new, values)

    def _tokens(self, call: int, log_weights: Tensor, row: Tensor, at: Tensor) -> Tensor:
        """Draw the new tokens of some positions; arguments and result are those of :meth:`_choices`."""
        if self._road is None:
            return self._choices(call, log_weights, row, at, row, torch.zeros_like(row, dtype=torch.bool), None)
        return self._choices(
            call, log_weights, row, at, self._target[row, at], self._road.held[row, at], self._road.text[row, at]
        )

    def _choices(
        self,
        call: int,
        log_weights: Tensor,
        row: Tensor,
        at: Tensor,
        target: Tensor,
        led: Tensor,
        favoured: Tensor | None,
    ) -> Tensor:
        """Draw a state for each of some positions, such as its new token.

        Args:
            call: Number of the call.
            log_weights: Of the n states, float64 [m, n].
            row: Rows of the positions, int64 [m].
            at: Indices of the positions, int64 [m].
            target: Prescribed states, int64 [m].
            led: bool [m], draws whose state is prescribed, as far as it has weight; their noise is recorded.
            favoured: States that an edit favours, int64 [m]; None: none.

        Returns:
            int64 [m].
        """
        states = torch.arange(log_weights.shape[-1], device=row.device)
        seeds, places = self._seeds[row][:, None], self._places[row, at][:, None]

        def noise(stream: int, seed: Tensor = seeds) -> Tensor:
            return standard_gumbel(placed_uniform(seed, call, stream, places, states))

        found = noise(TOKEN)
        past_row, past_at, state, value = self._past(call)
        if len(state):
            number = torch.full(self._places.shape, -1, device=row.device).index_put(
                (row, at), torch.arange(len(row), device=row.device)
            )
            index = number[past_row, past_at]
            known = (state >= 0) & (index >= 0)
            found = found.index_put((index[known], state[known]), value[known])
        if self._strength:
            if favoured is not None:
                found = found.scatter_add(1, favoured[:, None], torch.full_like(places.double(), KEPT))
            found = (1 - self._strength) * found + self._strength * noise(FRESH, seeds + self._fresh)
        if bool(led.any()):
            held = led & (take(log_weights, torch.where(led, target, 0)) > -torch.inf)
            if bool(held.any()):
                free = noise(TOKEN)[held]
                again = noise(AGAIN)[held]
                wanted, changed = posterior_changes(log_weights[held], target[held], free, again)
                found[held] = wanted
                which, new = changed.nonzero(as_tuple=True)
                index = held.nonzero()[:, 0][which]
                self._log.add(call, row[index], places[index, 0], new, wanted[which, new])
        return (log_weights + found).argmax(-1)


def seed_of(seeds: Tensor, stream: int) -> int:
    """Return a seed of torch's generator that follows from the first of ``seeds``."""
    return int(placed_uniform(seeds.cpu(), stream) * 2**52)
