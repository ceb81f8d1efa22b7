"""The state of a sampling run, and the operations on it that all samplers share.

A :class:`Walk` stores the rows between noise and text. It evaluates the network (only on rows that changed, if its
outputs do not depend on time), samples which positions change and then their new tokens, and enforces the conditions on
the text. The host waits for the device once in a step, when it needs to know how many positions change. Axes: b batch,
l length, n states, g groups of positions of one row, m positions of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_graph.diffusion.categorical import sharpen
from sedd_graph.diffusion.conditions.constraint import Matching
from sedd_graph.diffusion.draws import Jump, NewStates, Where
from sedd_graph.diffusion.numerics import take
from sedd_graph.diffusion.tokens.particles import ImportanceWeights
from sedd_graph.diffusion.tokens.predictions import Predictions
from sedd_graph.diffusion.tokens.readings import Law, Readings
from sedd_graph.diffusion.tokens.stage import Outputs, Rows, StagedDenoise
from sedd_graph.diffusion.tokens.walk_settings import ROUNDING, T_MIN, Denoise, OnStep, SamplerConfig, WalkSettings

__all__ = ["ROUNDING", "T_MIN", "Denoise", "OnStep", "SamplerConfig", "Walk", "WalkSettings"]


NextStates = Callable[[Mapping[str, Tensor], Tensor, Tensor, Tensor], Tensor]
"""Type of functions to next-state probabilities, [g, m, n]; arguments as of :data:`~sedd_graph.diffusion.tokens.readings.Law`."""


class _Counts(NamedTuple):
    """What the host knows of some steps: of each how many positions change, and where new tokens are needed, and how many."""

    totals: list[int]
    wheres: list[Tensor]
    counts: list[int]


class _Change(NamedTuple):
    """A step of some positions: which change with what probability, and the weights of their new states."""

    move: Tensor
    weights: NewStates
    must: bool


class Walk(Predictions):
    """The state of a sampling run: rows between noise and text.

    Args:
        denoise: Evaluates the network.
        x: Initial rows, int64 [b, l].
        settings: The process, and the conditions on the rows.
        config: Temperature and nucleus truncation.

    Attributes:
        weights: Importance weights of the rows; None without ``settings.unconditioned``.
        told: What ``ahead`` of the last :meth:`draw` returned.

    Raises:
        UserError: No completion of a row satisfies ``settings.matching``.
    """

    def __init__(self, denoise: Denoise, x: Tensor, settings: WalkSettings, config: SamplerConfig) -> None:
        super().__init__(denoise, x, settings)
        kernel, matching = settings.kernel, settings.matching
        self._config, self._on_step, self._steps = config, settings.on_step, 0
        data = torch.arange(kernel.states, device=x.device) != (-1 if kernel.mask is None else kernel.mask)
        self._allowed = data if settings.allowed is None else data & settings.allowed
        self.weights: ImportanceWeights | None = None
        if settings.unconditioned is not None:
            self.weights = ImportanceWeights(len(x), data & settings.unconditioned, config.temperature)
        self._matching = matching
        if matching is not None:
            matching.feasible(x, self.masked, self._allowed)
        self.told = list[float]()
        self._clamped = torch.zeros((), dtype=torch.int64, device=x.device)
        self._readings = Readings(self.free, kernel.states, tabular=kernel.tabular)
        # numbers of groups of positions that are read: all free ones, and the masked ones (None: not known to the host)
        self._most: int | None = None
        self._groups: int | None = None
        self._drawn: Tensor | None = None
        if self._allowed.dim() > 1:
            self._replace_disallowed(self.free)  # the prior was drawn without conditions on positions
        self.end_step()

    # -- rows ---------------------------------------------------------------------------------------------------------

    @property
    def masked(self) -> Tensor:
        """Positions that are free and masked, bool [b, l]; all False for a kernel without mask."""
        return torch.zeros_like(self.free) if self.kernel.mask is None else self.free & (self.x == self.kernel.mask)

    @property
    def joint(self) -> bool:
        """Whether tokens of a row are drawn together, since rows must match a regular expression."""
        return self._matching is not None

    @property
    def clamped(self) -> int:
        """Number of positions so far whose probabilities were clamped, summed over steps; reading it waits for the device."""
        return int(self._clamped)

    def count_clamped(self, where: Tensor) -> None:
        """Add the number of the positions ``where``, bool [b, l], to :attr:`clamped`."""
        self._clamped = self._clamped + where.sum()

    def put(self, x: Tensor) -> None:
        """Assign new tokens to the free positions of the rows; the others are unchanged.

        Args:
            x: New rows, int64 [b, l].
        """
        if x is not self._drawn:
            self._stale = self._groups = None
        self.x = torch.where(self.free, x, self.x)

    def end_step(self, x: Tensor | None = None) -> None:
        """End a step: call the callback with the rows.

        Args:
            x: Rows to pass to the callback, int64 [b, l]; None: the current rows.
        """
        if self._on_step is not None:
            self._on_step(self._steps, self.x if x is None else x)
        self.draws.begin_step(self._steps, self.x)
        self._steps += 1

    def reveal(self, chosen: Tensor, t: Tensor) -> bool:
        """Replace the masks at chosen positions by sampled tokens.

        The network is evaluated only on the rows with a chosen position, and its position-wise end only at the chosen
        positions; if rows must match a regular expression (:attr:`WalkSettings.matching`), at all masks of these rows.

        Args:
            chosen: bool [b, l], masked positions.
            t: Times of the rows, [b].

        Returns:
            Whether any position was chosen.
        """
        chosen = chosen & self.free
        outputs, before = self.outputs_where_drawn(t, chosen.any(1), places=True), self.x
        drawn = self.draw(chosen, self.clean_at(outputs), must=True)
        self.put(drawn)
        return drawn is not before

    # -- moves --------------------------------------------------------------------------------------------------------

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform numbers in (0, 1], float64 of shape ``[*shape]``."""
        return self.draws.uniform(*shape)

    def draw(
        self,
        move: Tensor,
        weights: Tensor | NewStates,
        *,
        must: bool = False,
        note: Callable[[Where, Tensor], None] | None = None,
        ahead: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Sample new tokens at free positions that change, and return the resulting rows.

        :attr:`x` is unchanged. If rows must match a regular expression (:attr:`WalkSettings.matching`), only masks
        change. All masks of a row with at least one changing position are then sampled jointly given that the row
        matches, those that do not change remain masked in the result, and ``weights`` are required at all of them.

        Args:
            move: Probability that a position changes, [b, l]; or bool [b, l], the positions that change: then no random
                numbers are taken if there are none.
            weights: Weights of the new token, not normalised, [b, l, n]; or a function that returns them for some
                positions. Weights of the mask and of disallowed tokens are ignored.
            must: True: where all allowed tokens have weight 0, the new token is uniform over the allowed ones. False:
                the old token remains there.
            note: Called with some positions and their new tokens, after each call of ``weights``.
            ahead: Draws the uniform numbers that follow, and returns a small tensor whose values :attr:`told` holds
                afterwards. So the host waits once for both.

        Returns:
            The rows with new tokens, int64 [b, l]; :attr:`x` itself if no position changes.

        Raises:
            UserError: As of :meth:`transfer`.
        """
        states = (lambda where, held=weights: held[where.row, where.place]) if isinstance(weights, Tensor) else weights
        if self._matching is not None:
            drawn = self._draw_matching(self._matching, move, states, must=must)
            self.told = [] if ahead is None else self.transfer(ahead())
            return drawn
        change = _Change(move, states, must)
        if move.dtype == torch.bool:
            where = move & self.free
            counts = self._counts([where], None)
            if not counts.totals[0]:
                return self.x
            jump = self.draws.begin_jump(self.x, where.double())
        else:
            jump = self.draws.begin_jump(self.x, move.double() * self.free)
            counts = self._counts([jump.moving], None if ahead is None else ahead())
        self._drawn = self._end(jump, change, self.x, counts, 0, note)
        return self._drawn

    def draw_each(self, changes: Sequence[tuple[Tensor, NewStates, bool]], when: Tensor) -> bool:
        """Take two steps of different positions, one after another; the host waits once.

        Args:
            changes: Of each step ``move`` [b, l], ``weights`` and ``must``, as of :meth:`draw`.
            when: bool [], whether the second step is taken; if not, it takes no random numbers.

        Returns:
            The value of ``when``.
        """
        first, second = (_Change(*change) for change in changes)
        if self._matching is not None or self.draws.in_turn:
            self.put(self.draw(first.move, first.weights, must=first.must))
            if happens := self.read(when):
                self.put(self.draw(second.move, second.weights, must=second.must))
            return happens
        jumps = [self.draws.begin_jump(self.x, first.move.double() * self.free)]
        jumps.append(self.draws.begin_jump(self.x, second.move.double() * self.free, when=when))
        counts = self._counts([jump.moving for jump in jumps], when)
        out = self._end(jumps[0], first, self.x, counts, 0, None)
        happens = bool(self.told[0])
        self._drawn = self._end(jumps[1], second, out, counts, 1, None, happens=happens)
        self.put(self._drawn)
        return happens

    def _counts(self, moving: Sequence[Tensor], ahead: Tensor | None) -> _Counts:
        """Let the host know how many positions change, bool [b, l] each, and evaluate the outputs that wait for this.

        Args:
            moving: The positions of each step.
            ahead: Further values for :attr:`told`.
        """
        rows = torch.stack([m.any(1) for m in moving]).any(0)
        waiting, wheres = self._waiting, list(moving)
        values = [m.sum() for m in moving]
        asked = torch.ones_like(rows)
        if waiting is not None:
            if waiting.need is not None:
                asked = waiting.need
                wheres = [m & asked[:, None] for m in moving]
            if self.timeless:
                asked = asked & rows & self._unseen(waiting.x)
        values += [m.sum() for m in wheres] + [asked.sum(), torch.stack([m.sum(1).amax() for m in wheres]).amax()]
        stale = rows | self._unseen(self.x)
        values += [stale.sum(), self._readings.used(self.masked)]
        n = len(moving)
        found = self.transfer(*values, *([] if ahead is None else [ahead]))
        self.told = found[2 * n + 4 :]
        totals, counts = [int(v) for v in found[:n]], [int(v) for v in found[n : 2 * n]]
        some, width, stale_count, groups = (int(v) for v in found[2 * n : 2 * n + 4])
        self._stale = Rows(stale, stale_count) if self.timeless else None
        self._groups = groups
        if waiting is not None and (some or any(totals)):
            at = None
            if waiting.places and not isinstance(self._denoise, StagedDenoise):
                at = _first(wheres[0], Rows(asked, some), width)
            waiting.ensure(Rows(asked, some), at)
            self._waiting = None
        return _Counts(totals, wheres, counts)

    def _end(
        self,
        jump: Jump,
        change: _Change,
        x: Tensor,
        counts: _Counts,
        number: int,
        note: Callable[[Where, Tensor], None] | None,
        *,
        happens: bool = True,
    ) -> Tensor:
        """Draw the new tokens of one step, and return the rows, int64 [b, l]; ``x`` itself if no position changes."""

        def new_tokens(where: Where) -> Tensor:
            allowed, rows, permitted = self._weights(change.weights, where)
            if self.weights is not None:
                self.weights.add(where.row, permitted)
            states = torch.arange(self.kernel.states, device=rows.device)
            other = (allowed if change.must else states == self.x[where.row, where.place, None]).to(rows.dtype)
            return torch.where(rows.sum(-1, keepdim=True) > 0, rows, other)

        index = torch.nonzero_static(counts.wheres[number], size=counts.counts[number])
        where, total = Where(index[:, 0], index[:, 1]), counts.totals[number] if happens else None
        out = self.draws.end_jump(jump, x, where, total, new_tokens, size=self._readings.size, note=note)
        return out if total else x

    def _weights(self, weights: NewStates, where: Where) -> tuple[Tensor, Tensor, Tensor]:
        """Return the allowed tokens and the sharpened weights at m positions.

        The allowed tokens are bool [n] or [m, n], the weights float64 [m, n]. The third tensor is the log of the share
        of each distribution that is allowed, [m]; it is empty without importance weights.
        """
        allowed = self._allowed
        if allowed.dim() > 1:
            allowed = allowed.expand(*self.x.shape, -1)[where.row, where.place]
        rows = weights(where)
        permitted = rows.new_zeros(0) if self.weights is None else self.weights.permitted(rows, allowed)
        sharp = sharpen(rows * allowed, temperature=self._config.temperature, top_p=self._config.top_p)
        return allowed, sharp, permitted

    def _draw_matching(self, matching: Matching, move: Tensor, weights: NewStates, *, must: bool) -> Tensor:
        moving = self.draws.going(self.x, move.double() * self.masked)
        rows = moving.any(-1)
        hidden = self.masked & rows[:, None]
        waiting = self._waiting
        asked = rows if waiting is None or not self.timeless else rows & self._unseen(waiting.x)
        if waiting is not None and waiting.need is not None:
            asked = asked & waiting.need
        count, some, width = (int(v) for v in self.transfer(hidden.sum(), asked.sum(), hidden.sum(1).amax()))
        if not count:
            return self.x
        if waiting is not None:
            staged = not waiting.places or isinstance(self._denoise, StagedDenoise)
            waiting.ensure(Rows(asked, some), None if staged else _first(hidden, Rows(asked, some), width))
            self._waiting = None
        index = hidden.nonzero()
        allowed, drawn, permitted = self._weights(weights, Where(index[:, 0], index[:, 1]))
        allowed = allowed.expand(len(drawn), -1)
        possible = drawn.sum(-1) > 0
        drawn = torch.where(possible[:, None], drawn, allowed.to(drawn.dtype))
        if not must:
            moving[hidden] &= possible
        out = self.x.clone()
        out[moving] = self.draws.matched(matching, self.x, rows, hidden, drawn, allowed, moving)
        if self.weights is not None:
            left = hidden & ~moving
            before = matching.log_chance(self.x[rows], rows, hidden[rows], drawn)
            after = matching.log_chance(out[rows], rows, left[rows], drawn[left[hidden]])
            self.weights.add_rows(rows, before, after)
            self.weights.add(moving.nonzero()[:, 0], permitted[moving[hidden]])
        return out

    def _replace_disallowed(self, where: Tensor) -> None:
        """Replace disallowed data tokens at ``where`` bool [b, l] by allowed ones, drawn uniformly."""
        allowed = self._allowed.expand(*self.x.shape, -1)
        wrong = where & ~take(allowed, self.x)
        if self.kernel.mask is not None:
            wrong &= self.x != self.kernel.mask
        if bool(wrong.any()):
            self.x = self.draws.replaced(self.x, wrong, allowed)

    def advance(self, outputs: Outputs, law: NextStates, *, final: bool = False, only: Tensor | None = None) -> None:
        """Take one step with the next-state probabilities that follow from the network's outputs.

        They are computed for a few positions at a time, and only where the kernel lets positions change. Negative
        probabilities, and probabilities of changing that sum to more than 1, are clamped and counted in :attr:`clamped`.

        Args:
            outputs: The network's outputs for the current rows.
            law: Function from outputs at positions to next-state probabilities, normalised up to rounding; the entry of the
                current state is the probability of no change.
            final: True for noise removal: every masked position changes.
            only: bool [b, l], positions that may change, at most one in each row; None: all free ones.
        """
        chance, weights = self.chances(outputs, law, only=only)
        if final:
            chance = torch.where(self.masked, 1.0, chance)
        self.put(self.draw(chance * (self.free if only is None else self.free & only), weights, must=final))

    def chances(self, outputs: Outputs, law: NextStates, *, only: Tensor | None = None) -> tuple[Tensor, NewStates]:
        """Return the probability that each position changes, [b, l], and the weights of the states that it changes to.

        Arguments as of :meth:`advance`.
        """

        def step(
            found: Mapping[str, Tensor], x: Tensor, row: Tensor, place: Tensor
        ) -> tuple[tuple[Tensor, ...], Tensor]:
            return _apart(law(found, x, row, place), x)

        (chance, clamped), weights = self.scan(outputs, step, only=only)
        self.count_clamped(clamped)
        return chance, weights

    def scan(
        self, outputs: Outputs, law: Law, *, only: Tensor | None = None, given: bool = False
    ) -> tuple[tuple[Tensor, ...], NewStates]:
        """Evaluate a law at the positions that may change (:meth:`~sedd_graph.diffusion.tokens.readings.Readings.scan`).

        Under a kernel with carry-over unmasking these are the masked ones, elsewhere its numbers are 0.

        Args:
            outputs: The network's outputs for the current rows.
            law: The law.
            only: bool [b, l], positions that may change, at most one in each row; None: all free ones.
            given: Whether given positions count as free.
        """
        where = self.masked if self.kernel.carries_over else torch.ones_like(self.free) if given else self.free
        if only is not None:
            where = where & only
        count = self._readings.most(only is not None)
        if self._readings.apart and only is None and not given:
            if self._most is None:
                self._most = int(self.transfer(self._readings.used(self.free))[0])
            count = self._most
        if self.kernel.carries_over and only is None and self._groups is not None:
            count = min(count, self._groups)
        return self._readings.scan(outputs, law, where, count=count, one=only is not None)

    def move(self, weights: Tensor, *, final: bool = False, only: Tensor | None = None) -> None:
        """Take one step with the given next-state probabilities at all positions, see :meth:`advance`.

        Args:
            weights: Next-state probabilities, normalised up to rounding, [b, l, n]; the entry of the current state is
                the probability of no change.
            final: True for noise removal: every masked position changes.
            only: bool [b, l], positions that may change; None: all free ones.
        """
        free = self.free if only is None else self.free & only
        (chance, clamped), elsewhere = _apart(weights, self.x)
        self.count_clamped(clamped & free)
        if final:
            chance = torch.where(self.masked, 1.0, chance)
        self.put(self.draw(chance * free, elsewhere, must=final))

    def remask(self, chance: Tensor) -> None:
        """Replace free positions by the mask, each independently with its own probability.

        Args:
            chance: Probability of masking each position, [b, l].
        """
        mask = self.kernel.require_mask()
        self.put(self.x.masked_fill(self.uniform(*self.x.shape) <= chance, mask))

    def noise(self, where: Tensor, sigma: Tensor) -> None:
        """Apply the forward process from clean text to total noise ``sigma`` at the positions ``where``.

        The tokens at these positions count as clean; disallowed tokens in the result are replaced by allowed ones,
        drawn uniformly.

        Args:
            where: bool [b, l], positions to noise; those that are not free are ignored.
            sigma: Total noise, [b].
        """
        where = where & self.free
        self.put(self.draws.noisy(self.kernel, self.x, sigma, corrupt=where))
        if self._may_be_disallowed:
            self._replace_disallowed(where)

    @cached_property
    def _may_be_disallowed(self) -> bool:
        """Whether noise may lead to a disallowed data token."""
        if self.kernel.carries_over:  # it leads to the mask
            return False
        data = self.kernel.data_tokens
        return self._allowed.dim() > 1 or int(self.transfer(self._allowed.sum())[0]) < data


def _apart(weights: Tensor, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the parts of next-state probabilities ``weights``, [g, m, n], of the states ``x``, int64 [g, m].

    They are the probability of a change, [g, m]; whether probabilities had to be clamped, bool [g, m]; and the weights of all
    other states, [g, m, n].
    """
    wrong = -weights.clamp(max=0).sum(-1) > ROUNDING
    weights = weights.clamp(min=0)
    stay = take(weights, x)
    elsewhere = weights.scatter(-1, x[..., None], 0.0)
    away = elsewhere.sum(-1)
    return (away / (away + stay).clamp(min=1e-30), (away > 1 + ROUNDING) | wrong), elsewhere


def _first(where: Tensor, rows: Rows, width: int) -> Tensor:
    """Return the positions ``where``, bool [b, l], of some rows in order, and others behind them: int64 [r, width]."""
    index = torch.nonzero_static(rows.mask, size=rows.count)[:, 0]
    return where[index].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
