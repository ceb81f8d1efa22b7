"""The noise tape: recorded noise of a sampler of tokens, with which it returns to a given text.

A sampler is a deterministic function of its initial rows and its noise. Here the noise of each random choice is a
function of a seed and of the choice's address: the number of the call, the position, and the state. A categorical
choice is the argmax of log-weights plus Gumbel noise, a position changes if a uniform number is below its probability.

To record the noise of a given text, the sampler runs from noise, its choices are prescribed so that it ends at the text,
and the noise of each choice is drawn from its distribution given that choice (:mod:`sedd_graph.diffusion.gumbel`). Most
of this noise is still that of the seed; only the rest is stored (:class:`Changes`).

The sampler takes one of two roads. Under a kernel with carry-over unmasking, and with samplers without a grid of times,
the sampler chooses when a position changes, and each new token is the text's. Otherwise the rows after each step are
drawn from the forward process given the text and the rows before the step, and prescribe all choices.

Axes: b batch, l length, n states, k changes, m positions that change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.draws import Draws, placed_uniform
from sedd_graph.diffusion.gumbel import posterior_changes, standard_gumbel
from sedd_graph.diffusion.numerics import take
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.noise_record import FINAL, MOVE, NOISED, Changes, Record
from sedd_graph.diffusion.tokens.road import Bridge, Road
from sedd_graph.errors import UserError

__all__ = ["NoiseTape"]

_TOKEN, _AGAIN, _FRESH, _SHARED = 1, 2, 3, 4  # independent streams of one seed
_CHUNK = 2**22  # float64 numbers held at a time
KEPT = 8.0
"""Amount in nats by which an edit at strength 0 favours each token of the text that is not held."""


class NoiseTape(Draws):
    """Noise of a sampling run of tokens by address, recorded or replayed.

    Args:
        seeds: Seed of the noise of each row, int64 [b].
        device: Device of the rows.
        start: Initial rows, int64 [b, l]; -1 where the tape has none, so that they are drawn; None: nowhere.
        changes: Recorded noise that differs from the seeds'; None for none.
        road: The text to end at; None: the run is a replay.
        places: Index on the tape of each position, int64 [b, l], at least 0 and different within a row; None: the
            positions are those of the tape.
        strength: Share S in [0, 1] of fresh noise: tokens are the argmax of log-weights + (1 - S) z + S g, with g fresh
            Gumbel noise and z the noise of the tape plus :data:`KEPT` for the token of the road's text (DICE, arXiv
            2410.08207, with lambda_1 = 1 - S and lambda_2 = S; its residual favours that token, too). Positions that
            are held have no fresh noise. 0: the noise of the tape alone.
        fresh: Seed of the fresh noise, in addition to that of the row.

    Attributes:
        start: The initial rows, int64 [b, l], from :meth:`prepare` on.
    """

    def __init__(
        self,
        seeds: Tensor,
        *,
        device: torch.device,
        start: Tensor | None = None,
        changes: Changes | None = None,
        road: Road | None = None,
        places: Tensor | None = None,
        strength: float = 0.0,
        fresh: int = 0,
    ) -> None:
        super().__init__(torch.Generator(device).manual_seed(_integer(seeds[:1], _SHARED)))
        self._seeds, self._road, self._strength, self._fresh = seeds.to(device), road, strength, fresh
        self._log = Record(Changes.joined([] if changes is None else [changes]))
        self.start, self._given, self._target = start, places, Tensor()
        self._bridge: Bridge | None = None
        # draws that no replay repeats: the initial rows, and the road
        self._own = torch.Generator(device).manual_seed(_integer(seeds[:1], _FRESH))

    def changes(self) -> Changes:
        """Return the noise recorded in this run that differs from that of the seeds."""
        return Changes.joined(self._log.parts)

    def prepare(self, kernel: Kernel, schedule: Schedule, times: Sequence[float] | None, length: int) -> Tensor:
        """Return the initial rows, int64 [b, l], and prepare for a run.

        Args:
            kernel: The forward process.
            schedule: Total noise as a function of time.
            times: Times at which the sampler's steps start; None if it has no grid of times.
            length: Number of positions l, at least that of the tape. Those beyond the tape are not held.

        Raises:
            UserError: The tape is not one of a model with this number of states.
        """
        rows, device = len(self._seeds), self.generator.device
        road = self._road
        given = road.text if road is not None else self.start
        if given is None or given.shape[1] > length or given.shape[0] != rows:
            raise UserError("the tape has no rows of this model")
        pad = (0, length - given.shape[1])
        own = torch.arange(length).expand(rows, length) if self._given is None else self._given
        self._index(own.to(device), kernel.states)
        if road is not None:
            pads = torch.nn.functional.pad
            road = Road(text=pads(road.text.to(device), pad), held=pads(road.held.to(device), pad))
            self._road = road
        if self.start is None or bool((self.start < 0).any()) or pad[1]:
            drawn = kernel.prior(rows, length, generator=self._own, allowed=None)
            if road is not None and not kernel.carries_over:
                sigma = schedule.sigma(torch.ones(rows, device=device))
                noised = kernel.sample(road.text, sigma, random=Randomness(self._own), corrupt=road.held)
                drawn = torch.where(road.held, noised, drawn)
            if self.start is not None:
                start = torch.nn.functional.pad(self.start.to(device), (0, length - self.start.shape[1]), value=-1)
                drawn = torch.where(start < 0, drawn, start)
            self.start = drawn
        if road is not None:
            self._target = road.text
            if times is not None and not kernel.carries_over:
                self._bridge = Bridge(kernel, schedule, times, road, self._own)
        return self.start.to(device)

    def _index(self, places: Tensor, states: int) -> None:
        """Verify the changes, and set the position of each place, int64 [b, places], -1 for those that are left out."""
        past, rows = self._log.past, len(places)
        past.check(rows, states)
        width = max(int(v.max()) + 1 if v.numel() else 1 for v in (places, past.place))
        self._places = places
        at = torch.arange(places.shape[1], device=places.device).expand_as(places)
        self._position = places.new_full((rows, width), -1).scatter(1, places, at)

    # -- the draws ----------------------------------------------------------------------------------------------------

    def begin_step(self, step: int, x: Tensor) -> None:
        if self._bridge is not None:
            self._target = self._bridge.rows(step, x)

    def uniform(self, *shape: int) -> Tensor:
        call = self._next()
        if shape == tuple(self._places.shape):
            return self._uniform(call)
        inner = torch.arange(math.prod(shape[1:]), device=self._places.device)
        return placed_uniform(self._seeds[:, None], call, _AGAIN, inner).reshape(shape)

    def poisson(self, rate: Tensor, x: Tensor) -> Tensor:
        call = self._next()
        u = self._changed(call, MOVE, self._uniform(call))
        none, one = torch.exp(-rate), torch.exp(-rate) * (1 + rate)
        if self._road is not None:
            goes, stays = self._prescribed(self._road, x)
            v, once, share = self._uniform(call, _AGAIN), (u >= none) & (u < one), one - none
            apart = v * (1 - share)
            u = self._steer(call, u, goes & ~once & (share > 0), none + v * share)
            u = self._steer(call, u, stays & once, torch.where(apart < none, apart, apart + share))
        count, term, below = torch.zeros_like(rate), none.clone(), none.clone()
        while bool((more := (u >= below) & (count < 1e4)).any()):
            count = count + more
            term = term * rate / count.clamp(min=1)
            below = torch.where(more, below + term, below)
        return count

    def jump(
        self, x: Tensor, move: Tensor, weights: Callable[[Tensor], Tensor], *, read: Callable[[Tensor], bool] = bool
    ) -> Tensor:
        call = self._next()
        u = self._changed(call, MOVE, self._uniform(call))
        if self._road is not None:
            goes, stays = self._prescribed(self._road, x)
            v = self._uniform(call, _AGAIN)
            u = self._steer(call, u, goes & (u >= move) & (move > 0), v * move)
            u = self._steer(call, u, stays & (u < move) & (move < 1), move + v * (1 - move))
        moving = u < move
        if not read(moving.any()):
            return x
        drawn = weights(moving).double()
        total = drawn.sum(-1)
        if not bool(((total > 0) & total.isfinite()).all()):
            raise ValueError("noise tape: a row of weights sums to zero or is not finite")
        row, at = moving.nonzero(as_tuple=True)
        found, size = [], max(1, _CHUNK // drawn.shape[-1])
        for first in range(0, len(row), size):
            part = slice(first, first + size)
            found.append(self._tokens(call, drawn[part].log(), row[part], at[part]))
        out = x.clone()
        out[moving] = torch.cat(found)
        return out

    def noisy(self, kernel: Kernel, x: Tensor, sigma: Tensor, *, corrupt: Tensor) -> Tensor:
        call = self._next()
        generator = torch.Generator(x.device).manual_seed(_integer(self._seeds[:1], _SHARED + 1 + call))
        out = kernel.sample(x, sigma, random=Randomness(generator), corrupt=corrupt)
        out = self._changed(call, NOISED, out)
        if self._road is None or self._bridge is None:
            return out
        return self._steer(call, out, self._road.held & corrupt & (out != self._target), self._target, NOISED)

    def part(self, start: int, stop: int) -> NoiseTape:
        made = NoiseTape(self._seeds, device=self.generator.device, strength=self._strength, fresh=self._fresh)
        made.generator, made._own, made._log, made._bridge = self.generator, self._own, self._log, self._bridge
        made._places = self._places[:, start:stop]
        at = self._position - start
        made._position = torch.where((at >= 0) & (at < stop - start), at, -1)
        if self._road is not None:
            made._road = Road(text=self._road.text[:, start:stop], held=self._road.held[:, start:stop])
            made._target = made._road.text
        return made

    def settle(self, x: Tensor) -> Tensor:
        call = self._next()
        x = self._changed(call, FINAL, x)
        if self._road is None:
            return x
        return self._steer(call, x, self._road.held & (x != self._road.text), self._road.text, FINAL)

    # -- noise by address ---------------------------------------------------------------------------------------------

    def _next(self) -> int:
        self._log.call += 1
        return self._log.call - 1

    def _uniform(self, call: int, stream: int = _SHARED) -> Tensor:
        """Return the uniform number of each position in one call, float64 [b, l], without changes."""
        return placed_uniform(self._seeds[:, None], call, stream, self._places, MOVE)

    def _prescribed(self, road: Road, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions that must change and those that must not, bool [b, l] each."""
        held, same = road.held, x == self._target
        return held & ~same & (self._bridge is not None), held & same

    def _past(self, call: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return row, position, state and value of the recorded changes in one call that concern these rows, [k]."""
        past, device = self._log.past, self.generator.device
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
        if not bool(chosen.any()):
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
        """Draw the new tokens of some positions.

        Args:
            call: Number of the call.
            log_weights: Of the new tokens, float64 [m, n].
            row: Rows of the positions, int64 [m].
            at: Indices of the positions, int64 [m].

        Returns:
            int64 [m].
        """
        states = torch.arange(log_weights.shape[-1], device=row.device)
        seeds, places = self._seeds[row][:, None], self._places[row, at][:, None]

        def noise(stream: int, seed: Tensor = seeds) -> Tensor:
            return standard_gumbel(placed_uniform(seed, call, stream, places, states))

        found = noise(_TOKEN)
        past_row, past_at, state, value = self._past(call)
        number = torch.full(self._places.shape, -1, device=row.device).index_put(
            (row, at), torch.arange(len(row), device=row.device)
        )
        index = number[past_row, past_at]
        known = (state >= 0) & (index >= 0)
        found = found.index_put((index[known], state[known]), value[known])
        if self._strength:
            if self._road is not None:
                found = found.scatter_add(1, self._road.text[row, at, None], torch.full_like(places.double(), KEPT))
            found = (1 - self._strength) * found + self._strength * noise(_FRESH, seeds + self._fresh)
        if self._road is not None:
            target = self._target[row, at]
            held = self._road.held[row, at] & (take(log_weights, target) > -torch.inf)
            if bool(held.any()):
                free = noise(_TOKEN)[held]
                again = noise(_AGAIN)[held]
                wanted, changed = posterior_changes(log_weights[held], target[held], free, again)
                found[held] = wanted
                which, new = changed.nonzero(as_tuple=True)
                index = held.nonzero()[:, 0][which]
                self._log.add(call, row[index], places[index, 0], new, wanted[which, new])
        return (log_weights + found).argmax(-1)


def _integer(seeds: Tensor, stream: int) -> int:
    """Return a seed of torch's generator that follows from the first of ``seeds``."""
    return int(placed_uniform(seeds.cpu(), stream) * 2**52)
