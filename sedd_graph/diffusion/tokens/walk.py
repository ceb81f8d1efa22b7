"""The state of a sampling run, and the operations on it that all samplers share.

A :class:`Walk` stores the rows between noise and text. It evaluates the network (only on rows that changed, if its
outputs do not depend on time), samples which positions change and then their new tokens, and enforces the conditions on
the text. The host waits for the device once in a step, when it needs to know how many positions change. Axes: b batch,
l length, n states, g groups of positions of one row, m positions of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from sedd_graph.diffusion.draws import NewStates
from sedd_graph.diffusion.numerics import take
from sedd_graph.diffusion.tokens.drawing import Drawing
from sedd_graph.diffusion.tokens.readings import Law
from sedd_graph.diffusion.tokens.stage import Outputs
from sedd_graph.diffusion.tokens.walk_settings import ROUNDING, T_MIN, Denoise, OnStep, SamplerConfig, WalkSettings

__all__ = ["ROUNDING", "T_MIN", "Denoise", "NextStates", "OnStep", "SamplerConfig", "Walk", "WalkSettings"]

NextStates = Callable[[Mapping[str, Tensor], Tensor, Tensor, Tensor], Tensor]
"""Type of functions to next-state probabilities, [g, m, n]; arguments as of :data:`~sedd_graph.diffusion.tokens.readings.Law`."""


class Walk(Drawing):
    """The state of a sampling run: rows between noise and text.

    Args:
        denoise: Evaluates the network.
        x: Initial rows, int64 [b, l].
        settings: The process, and the conditions on the rows.
        config: Temperature and nucleus truncation.

    Raises:
        UserError: No completion of a row satisfies ``settings.matching``.
    """

    def __init__(self, denoise: Denoise, x: Tensor, settings: WalkSettings, config: SamplerConfig) -> None:
        super().__init__(denoise, x, settings, config)
        self._on_step, self._steps = settings.on_step, settings.first_step
        self._clamped = torch.zeros((), dtype=torch.int64, device=x.device)
        self._most: int | None = None  # groups of free positions; None: not known to the host
        self.end_step()

    # -- rows ---------------------------------------------------------------------------------------------------------

    @property
    def clamped(self) -> int:
        """Number of positions so far whose probabilities were clamped, summed over steps; reading it waits for the device."""
        return int(self._clamped)

    def count_clamped(self, where: Tensor) -> None:
        """Add the number of the positions ``where``, bool [b, l], to :attr:`clamped`."""
        self._clamped = self._clamped + where.sum()

    def end_step(self, x: Tensor | None = None) -> None:
        """End a step: call the callbacks with the rows and their confidences.

        Args:
            x: Rows to pass to the callback, int64 [b, l]; None: the current rows.
        """
        step = self._steps
        self.show_step(self.x if x is None else x)
        self.draws.begin_step(step, self.x)

    @property
    def watched(self) -> bool:
        """Whether there are callbacks of steps."""
        return self._on_step is not None or self._confidences is not None

    def show_step(self, x: Tensor) -> None:
        """Call the callbacks of a step whose random numbers are not apart from those of the steps around it.

        Args:
            x: The rows after the step, int64 [b, l].
        """
        if self._confidences is not None:
            self._confidences.end_step(self._steps, x)
        if self._on_step is not None:
            self._on_step(self._steps, x)
        self._steps += 1

    def reveal(self, chosen: Tensor, t: Tensor, *, ahead: Callable[[], Tensor] | None = None) -> bool:
        """Replace the masks at chosen positions by sampled tokens.

        The network is evaluated only on the rows with a chosen position, and its position-wise end only at the chosen
        positions; if rows must match a regular expression (:attr:`WalkSettings.matching`), at all masks of these rows.

        Args:
            chosen: bool [b, l], masked positions.
            t: Times of the rows, [b].
            ahead: As of :meth:`draw`.

        Returns:
            Whether any position was chosen.
        """
        chosen = chosen & self.free
        outputs, before = self.outputs_where_drawn(t, chosen.any(1), places=True), self.x
        drawn = self.draw(chosen, self.clean_at(outputs), must=True, ahead=ahead)
        self.put(drawn)
        return drawn is not before

    # -- moves --------------------------------------------------------------------------------------------------------

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
        chance, weights = self.chances(outputs, law, only=only, hold=final or self._many)
        if final:
            chance = torch.where(self.masked, 1.0, chance)
        self.put(self.draw(chance * (self.free if only is None else self.free & only), weights, must=final))

    def chances(
        self, outputs: Outputs, law: NextStates, *, only: Tensor | None = None, hold: bool = False
    ) -> tuple[Tensor, NewStates]:
        """Return the probability that each position changes, [b, l], and the weights of the states that it changes to.

        Arguments as of :meth:`advance` and :meth:`scan`.
        """

        def step(
            found: Mapping[str, Tensor], x: Tensor, row: Tensor, place: Tensor
        ) -> tuple[tuple[Tensor, ...], Tensor]:
            return _apart(law(found, x, row, place), x)

        (chance, clamped), weights = self.scan(outputs, step, only=only, hold=hold)
        self.count_clamped(clamped)
        return chance, weights

    def scan(
        self, outputs: Outputs, law: Law, *, only: Tensor | None = None, given: bool = False, hold: bool = False
    ) -> tuple[tuple[Tensor, ...], NewStates]:
        """Evaluate a law at the positions that may change (:meth:`~sedd_graph.diffusion.tokens.readings.Readings.scan`).

        Under a kernel with carry-over unmasking these are the masked ones, elsewhere its numbers are 0.

        Args:
            outputs: The network's outputs for the current rows.
            law: The law.
            only: bool [b, l], positions that may change, at most one in each row; None: all free ones.
            given: Whether given positions count as free.
            hold: Whether many positions are expected to change: their weights are then computed once.
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
        one = only is not None
        return self._readings.scan(outputs, law, where, count=count, one=one, hold=hold and not one)

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
    total = weights.sum(-1)
    elsewhere = weights.clamp(min=0)
    stay = take(elsewhere, x)
    elsewhere.scatter_(-1, x[..., None], 0.0)
    away = elsewhere.sum(-1)
    wrong = away + stay - total > ROUNDING  # what was clamped
    return (away / (away + stay).clamp(min=1e-30), (away > 1 + ROUNDING) | wrong), elsewhere
