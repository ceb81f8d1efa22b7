"""Random choices of a sampling run: which positions change, and their new tokens, given the conditions on the text.

The host waits for the device once for all that a step draws. Axes: b batch, l length, n states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_graph.diffusion.categorical import sharpen
from sedd_graph.diffusion.conditions.constraint import Matching
from sedd_graph.diffusion.draws import Jump, NewStates, Where
from sedd_graph.diffusion.numerics import take
from sedd_graph.diffusion.tokens.confidence import Confidences
from sedd_graph.diffusion.tokens.particles import ImportanceWeights
from sedd_graph.diffusion.tokens.predictions import Predictions
from sedd_graph.diffusion.tokens.readings import Readings
from sedd_graph.diffusion.tokens.stage import Rows, StagedDenoise
from sedd_graph.diffusion.tokens.walk_settings import Denoise, SamplerConfig, WalkSettings

__all__ = ["Drawing"]

MANY = 8
"""Many positions change if they are at least one in so many: holding all weights then takes less time than computing some again."""


class _Counts(NamedTuple):
    """Numbers of positions of some steps, copied to the host.

    Attributes:
        totals: Number of positions that change in each step.
        wheres: Of each step, the positions at which new tokens are needed, bool [b, l] on the device.
        counts: Their number.
    """

    totals: list[int]
    wheres: list[Tensor]
    counts: list[int]


class _Change(NamedTuple):
    """A step of some positions: which change with what probability, and the weights of their new states."""

    move: Tensor
    weights: NewStates
    must: bool


class Drawing(Predictions):
    """The rows of a sampling run, and the choice of new tokens.

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
        self._config, self._spread, self.told = config, config.spread, list[float]()
        data = torch.arange(kernel.states, device=x.device) != (-1 if kernel.mask is None else kernel.mask)
        self._allowed = data if settings.allowed is None else data & settings.allowed
        self.weights: ImportanceWeights | None = None
        if settings.unconditioned is not None:
            self.weights = ImportanceWeights(len(x), data & settings.unconditioned, config.temperature)
        told = settings.on_confidence
        self._confidences = None if told is None else Confidences(x, kernel.mask, told)
        self._matching = matching
        if matching is not None:
            matching.feasible(x, self.masked, self._allowed)
        self._readings = Readings(self.free, kernel.states, tabular=kernel.tabular)
        self._groups: int | None = None  # groups of masked positions; None: not known to the host
        self._many = True  # whether many positions changed in the last step, or it is the first
        self._drawn: Tensor | None = None
        if self._allowed.dim() > 1:
            self._replace_disallowed(self.free)  # the prior was drawn without conditions on positions

    @property
    def masked(self) -> Tensor:
        """Positions that are free and masked, bool [b, l]; all False for a kernel without mask."""
        return torch.zeros_like(self.free) if self.kernel.mask is None else self.free & (self.x == self.kernel.mask)

    @property
    def joint(self) -> bool:
        """Whether tokens of a row are drawn together, since rows must match a regular expression."""
        return self._matching is not None

    def put(self, x: Tensor) -> None:
        """Assign new tokens to the free positions of the rows; the others are unchanged.

        Args:
            x: New rows, int64 [b, l].
        """
        if x is not self._drawn:
            self._stale = self._groups = None
        self.x = torch.where(self.free, x, self.x)

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform numbers in (0, 1], float64 of shape ``[*shape]``."""
        return self.draws.uniform(*shape)

    def going(self, move: Tensor) -> Tensor:
        """Draw which positions change, each with probability ``move`` [b, l]; bool [b, l]."""
        return self.draws.going(self.x, move, spread=self._spread)

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
            counts = self._counts([where], None if ahead is None else ahead())
            if not counts.totals[0]:
                return self.x
            jump = self.draws.begin_jump(self.x, where.double())
        else:
            jump = self.draws.begin_jump(self.x, move.double() * self.free, spread=self._spread)
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
        spread = self._spread
        jumps = [self.draws.begin_jump(self.x, first.move.double() * self.free, spread=spread)]
        jumps.append(self.draws.begin_jump(self.x, second.move.double() * self.free, when=when, spread=spread))
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
        self._groups, self._many = groups, MANY * sum(totals) >= self.x.numel()
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
        told = note if self._confidences is None else self._noting(self._confidences, note)
        out = self.draws.end_jump(jump, x, where, total, new_tokens, size=self._readings.size, note=told)
        return out if total else x

    @staticmethod
    def _noting(
        confidences: Confidences, note: Callable[[Where, Tensor], None] | None
    ) -> Callable[[Where, Tensor], None]:
        def noted(where: Where, tokens: Tensor) -> None:
            confidences.note(where, tokens)
            if note is not None:
                note(where, tokens)

        return noted

    def _weights(self, weights: NewStates, where: Where) -> tuple[Tensor, Tensor, Tensor]:
        """Return the allowed tokens and the sharpened weights at m positions.

        The allowed tokens are bool [n] or [m, n], the weights float64 [m, n]. The third tensor is the log of the share
        of each distribution that is allowed, [m]; it is empty without importance weights.
        """
        allowed = self._allowed
        if allowed.dim() > 1:
            allowed = allowed.expand(*self.x.shape, -1)[where.row, where.place]
        rows = weights(where)
        if self._confidences is not None:
            self._confidences.hold(rows)
        permitted = rows.new_zeros(0) if self.weights is None else self.weights.permitted(rows, allowed)
        sharp = sharpen(rows * allowed, temperature=self._config.temperature, top_p=self._config.top_p)
        return allowed, sharp, permitted

    def _draw_matching(self, matching: Matching, move: Tensor, weights: NewStates, *, must: bool) -> Tensor:
        moving = self.going(move.double() * self.masked)
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
        if self._confidences is not None:
            self._confidences.note(Where(index[:, 0], index[:, 1]), out[hidden])
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


def _first(where: Tensor, rows: Rows, width: int) -> Tensor:
    """Return the positions ``where``, bool [b, l], of some rows in order, and others behind them: int64 [r, width]."""
    index = torch.nonzero_static(rows.mask, size=rows.number)[:, 0]
    return where[index].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
