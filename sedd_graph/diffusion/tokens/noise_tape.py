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

from collections.abc import Sequence

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.categorical import categorical
from sedd_graph.diffusion.conditions.constraint import Matching
from sedd_graph.diffusion.draws import Jump, Where, placed_uniform, systematic
from sedd_graph.diffusion.numerics import take
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.addressed_noise import AGAIN, FRESH, GROUP, SHARED, TURN, AddressedNoise, seed_of
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.noise_record import FINAL, MOVE, NOISED, Changes
from sedd_graph.diffusion.tokens.road import Bridge, Road
from sedd_graph.errors import UserError

__all__ = ["NoiseTape"]


class NoiseTape(AddressedNoise):
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
            Gumbel noise and z the noise of the tape plus :data:`~sedd_graph.diffusion.tokens.addressed_noise.KEPT` for the token of the road's text (DICE, arXiv
            2410.08207, with lambda_1 = 1 - S and lambda_2 = S; its residual favours that token, too). Positions that
            are held have no fresh noise. 0: the noise of the tape alone.
        fresh: Seed of the fresh noise, in addition to that of the row.

    Attributes:
        start: The initial rows, int64 [b, l], from :meth:`prepare` on.
    """

    in_turn = True

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
        super().__init__(seeds, device=device, changes=changes, road=road, strength=strength, fresh=fresh)
        self.start, self._given = start, places
        # draws that no replay repeats: the initial rows, and the road
        self._own = torch.Generator(device).manual_seed(seed_of(seeds[:1], FRESH))

    def prepare(
        self,
        kernel: Kernel,
        schedule: Schedule,
        times: Sequence[float] | None,
        length: int,
        *,
        particles: int = 1,
    ) -> Tensor:
        """Return the initial rows, int64 [b * particles, l], and prepare for a run.

        Args:
            kernel: The forward process.
            schedule: Total noise as a function of time.
            times: Times at which the sampler's steps start; None if it has no grid of times.
            length: Number of positions l, at least that of the tape. Those beyond the tape are not held.
            particles: Number of rows that are drawn for each row of the tape. The first of each group is the one of the
                tape, and the one that is chosen.

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
        if particles == 1:
            return self.start.to(device)
        return self._grouped(particles, road)

    def _grouped(self, particles: int, road: Road | None) -> Tensor:
        """Take several rows for each one of the tape, and return all initial rows, int64 [b * particles, l]."""
        number = torch.arange(particles, device=self.generator.device)
        self._particles = particles
        self._turn = (placed_uniform(self._seeds, TURN) * particles).long()
        self._seeds = (
            self._seeds[:, None] ^ (placed_uniform(self._seeds[:, None], GROUP, number) * 2**52).long() * (number > 0)
        ).reshape(-1)
        self._log.past = self._log.past._replace(row=self._log.past.row * particles)
        self._places, self._position = (x.repeat_interleave(particles, 0) for x in (self._places, self._position))
        if road is not None:
            first = (number == 0).repeat(len(road.text))[:, None]
            text = road.text.repeat_interleave(particles, 0)
            self._road = Road(text=text, held=road.held.repeat_interleave(particles, 0) & first)
            self._target = text
        if self.start is None:
            raise UserError("the tape has no initial rows")
        return self.start.to(self.generator.device).repeat_interleave(particles, 0)

    def require_match(self, matching: Matching, allowed: Tensor, length: int) -> None:
        """Raise :class:`UserError` unless the text at which rows are to end can match a regular expression.

        Args:
            matching: The constraint.
            allowed: bool [n], [l, n] or [b, l, n], tokens that may be drawn.
            length: Number of positions that must match.
        """
        if self._road is None:
            return
        text, held = self._road.text[:, :length], self._road.held[:, :length]
        if bool(held.any()):
            rows = slice(None, None, self._particles)
            may = allowed[..., :length, :] if allowed.dim() > 1 else allowed
            matching.feasible(text[rows], ~held[rows], may[rows] if may.dim() > 2 else may)

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

    def begin_jump(self, x: Tensor, move: Tensor, *, when: Tensor | None = None, spread: bool = False) -> Jump:
        call = self._log.call
        return Jump(self.going(x, move, spread=spread), call)

    def _numbers(self, jump: Jump, where: Where, total: int | None) -> Tensor:
        return where.row  # none are needed: the noise has an address

    def _states(self, jump: Jump, weights: Tensor, where: Where, numbers: Tensor) -> Tensor:
        weights = weights.double()
        total = weights.sum(-1)
        if not bool(((total > 0) & total.isfinite()).all()):
            raise ValueError("noise tape: a row of weights sums to zero or is not finite")
        return self._tokens(jump.call, weights.log(), where.row, where.place)

    def going(self, x: Tensor, move: Tensor, *, spread: bool = False) -> Tensor:
        call = self._next()
        row = placed_uniform(self._seeds[:, None], call, SHARED, 0, MOVE)
        u = self._changed(call, MOVE, systematic(row, move) if spread else self._uniform(call))
        if self._road is not None:
            goes, stays = self._prescribed(self._road, x)
            v = self._uniform(call, AGAIN)
            u = self._steer(call, u, goes & (u >= move) & (move > 0), v * move)
            u = self._steer(call, u, stays & (u < move) & (move < 1), move + v * (1 - move))
        return u < move

    def matched(
        self, matching: Matching, x: Tensor, rows: Tensor, hidden: Tensor, weights: Tensor, may: Tensor, moving: Tensor
    ) -> Tensor:
        kinds, tokens = self._next(), self._next()
        own, here, goes = rows.nonzero()[:, 0], hidden[rows], moving[rows]
        led = torch.zeros(len(own), dtype=torch.bool, device=x.device)
        x, target = x[rows], x[rows]
        if self._road is not None:
            text, held = self._road.text[rows], self._road.held[rows]
            given = goes & held if bool(self._road.held.any(-1).eq(self._road.held.all(-1)).all()) else here & held
            x = torch.where(given, text, x)

            def again(weights: Tensor, row: Tensor, at: Tensor, kind: Tensor | None) -> Tensor:
                return categorical(weights, generator=self._own)

            target, possible = matching.completed(x, rows, here, weights, may, given, again)
            led = possible & held.all(-1)
            fixed = given & (possible & ~led)[:, None]  # an edit: the other tokens are drawn given its words
            here, weights, may = here & ~fixed, weights[~fixed[here]], may[~fixed[here]]

        def pick(weights: Tensor, row: Tensor, at: Tensor, kind: Tensor | None) -> Tensor:
            wanted, favoured = target[row, at], None if self._road is None else self._road.text[own[row], at]
            if kind is None:
                wanted, favoured = matching.kinds(wanted), None if favoured is None else matching.kinds(favoured)
            call = kinds if kind is None else tokens
            return self._choices(call, weights.log(), own[row], at, wanted, led[row], favoured)

        free = goes & here
        found = matching.draw(x, rows, here, weights, may, free, pick=pick)
        return x.masked_scatter(free, found)[goes]

    def select(self, share: Tensor) -> Tensor:
        call, groups = self._next(), torch.arange(len(share), device=share.device)
        first = groups * self._particles
        u = self._changed(call, MOVE, self._uniform(call))[first, 0]
        turned = (torch.arange(self._particles, device=share.device) + self._turn[:, None]) % self._particles
        cdf = share.gather(1, turned).cumsum(-1)
        cdf = cdf / cdf[:, -1:]
        if self._road is not None and bool(self._road.held.any()):
            # the first particle of each group, which ends at the text, is at this place of the turned group
            place = (-self._turn) % self._particles
            high = take(cdf, place)
            low = torch.where(place > 0, take(cdf, (place - 1).clamp(min=0)), 0.0)
            if bool((high <= low).any()):
                raise UserError(
                    "the model gives a text no probability under the conditions on samples, so that this particle is never "
                    "chosen"
                )
            wanted = low + self._uniform(call, AGAIN)[first, 0] * (high - low)
            wanted = torch.where((wanted >= low) & (wanted < high), wanted, low)
            full = self._uniform(call)
            where = torch.zeros_like(full, dtype=torch.bool)
            where[first, 0] = True
            u = self._steer(call, full, where, full.index_put((first, torch.zeros_like(first)), wanted))[first, 0]
        found = torch.searchsorted(cdf, u[:, None], right=True)[:, 0].clamp(max=self._particles - 1)
        return take(turned, found)

    def noisy(self, kernel: Kernel, x: Tensor, sigma: Tensor, *, corrupt: Tensor) -> Tensor:
        call = self._next()
        generator = torch.Generator(x.device).manual_seed(seed_of(self._seeds[:1], SHARED + 1 + call))
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
